"""Plan summaries and the search for memory caps."""

from __future__ import annotations

import pytest

from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.sampling.plan import make_plan
from data_pipeline.sampling.summary import describe_plan, to_text
from pretrain.profiling.memory_caps import find_caps, most_rows
from tests.support.catalogs import catalogue_of, random_shards, reader_config


def test_description_agrees_with_the_steps() -> None:
    groups = [[i % 2 for i in range(80)] for _ in range(6)]
    config = reader_config(min_seconds=1.0, max_seconds=12.0)
    plan = make_plan(catalogue_of(random_shards(1, 6, 80), groups, 2), config, 0)
    report = describe_plan(plan, config, world=2)
    steps = [plan.step(0, g) for g in range(plan.layout(0).steps)]
    samples = sum(micro.samples for step in steps for micro in step)
    padded = sum(micro.padded_samples for step in steps for micro in step)
    assert report.steps == len(steps)
    assert report.padding == pytest.approx(1 - samples / padded)
    assert report.hours * 3600 * SAMPLE_RATE == pytest.approx(samples, rel=0.01)
    assert report.segments + report.left_out_segments == 480
    assert sum(group.hours for group in report.groups) == pytest.approx(report.hours)
    assert report.largest_micro_batch_seconds * SAMPLE_RATE == max(m.padded_samples for step in steps for m in step)
    assert plan.largest_micro_batch() >= report.largest_micro_batch_seconds * SAMPLE_RATE
    text = to_text(report)
    assert f"{report.steps} steps" in text
    assert "1, 2, 4" in text


def test_mixed_hours_equal_those_of_the_epoch() -> None:
    groups = [[int(i >= 72) for i in range(80)] for _ in range(6)]
    config = reader_config(mix_alpha=0.5)
    plan = make_plan(catalogue_of(random_shards(1, 6, 80, low=4, high=15), groups, 2), config, 0)
    report = describe_plan(plan, config)
    large, small = report.groups
    assert large.epoch_hours == pytest.approx(large.hours)
    assert small.epoch_hours / large.epoch_hours == pytest.approx((small.hours / large.hours) ** 0.5, rel=0.01)
    assert large.epoch_hours + small.epoch_hours == pytest.approx(report.hours, rel=0.02)


@pytest.mark.parametrize("limit", [1, 2, 3, 17, 100, 1000])
@pytest.mark.parametrize("start", [1, 10, 5000])
def test_bisection_finds_nearly_the_limit_and_never_exceeds_it(limit: int, start: int) -> None:
    requests = []

    def fits(rows: int) -> bool:
        requests.append(rows)
        return rows <= limit

    found = most_rows(fits, start)
    assert limit - max(1, 0.06 * limit) <= found <= limit
    assert len(requests) < 30


def test_caps_hold_at_every_length_and_too_little_memory_is_an_error() -> None:
    memory = lambda rows, s: rows * s * (1 + 0.03 * s)  # noqa: E731
    caps = find_caps(lambda rows, s: memory(rows, s) <= 1500, [2.0, 5.6, 15.6], 100.0)
    assert caps.rows[0][0] == 15.6
    assert caps.cap_quadratic == pytest.approx(0.03, abs=0.01)
    for seconds in (2.0, 4.0, 8.0, 15.6):
        rows = int(caps.cap_seconds / (seconds * (1 + caps.cap_quadratic * seconds)))
        assert 0.85 * 1500 < memory(rows, seconds) < 1.02 * 1500
    with pytest.raises(ValueError, match=r"not even one segment of 15\.6 s"):
        find_caps(lambda rows, s: s < 10, [2.0, 15.6], 100.0)
