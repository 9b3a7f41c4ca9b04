"""Properties of sampling plans on synthetic catalogs."""

from __future__ import annotations

import hashlib
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.core.schema import ConfigError
from data_pipeline.sampling.config import DataConfig
from data_pipeline.sampling.constraints import SHARE
from data_pipeline.sampling.plan import Plan, accumulation, audio_per_step_check, make_plan, useful_worlds
from tests.support.catalogs import SECOND, catalogue_of, random_shards, reader_config, with_texts


def epoch_rows(plan: Plan, epoch: int = 0) -> Counter[tuple[int, int]]:
    """Counts how often each (shard, row) appears in an epoch."""
    seen: Counter[tuple[int, int]] = Counter()
    for g in range(plan.layout(epoch).steps):
        for micro in plan.step(epoch, g):
            seen.update(zip(micro.shard_n.tolist(), micro.row_n.tolist(), strict=True))
    return seen


cases = st.fixed_dictionaries({
    "seed": st.integers(0, 10_000),
    "n_shards": st.integers(1, 12),
    "per_shard": st.integers(20, 90),
    "micro_batches": st.sampled_from([1, 2, 4, 6]),
    "batch_seconds": st.sampled_from([96.0, 150.0, 400.0]),
    "ratio": st.sampled_from([1.03, 1.1, 1.5]),
    "window": st.integers(1, 6),
    "crop": st.booleans(),
})  # fmt: skip


bounded = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def plan_of(case: dict[str, object], **values: object) -> Plan:
    shards = random_shards(case["seed"], case["n_shards"], case["per_shard"])  # type: ignore[arg-type]
    config = reader_config(
        batch_seconds=case["batch_seconds"], micro_batches=case["micro_batches"], bucket_ratio=case["ratio"],
        shuffle_window=case["window"], crop_to_shortest=case["crop"], **values,
    )  # fmt: skip
    return make_plan(catalogue_of(shards), config, 3)


@bounded
@given(cases)
def test_each_usable_segment_appears_equally_often(case: dict[str, object]) -> None:
    plan = plan_of(case)
    seen = epoch_rows(plan, epoch=1)
    usable = plan.constraints.usable(plan.catalogue.length_N) > 0
    turns = int(plan.layout(1).turn_U.max()) + 1
    assert len(seen) == usable.sum()
    assert set(seen.values()) == {turns}
    enough = plan.layout(1).samples // turns >= 20 * plan.constraints.batch
    assert turns == 1 or not enough


@bounded
@given(cases)
def test_padding_is_bounded(case: dict[str, object]) -> None:
    plan = plan_of(case)
    layout, rules = plan.layout(0), plan.constraints
    for number in range(len(layout.step_W1) - 1):
        window = plan.window(0, number)
        inside = ~window.spanning_K
        bound = 0 if rules.crop else 1 - 1 / rules.ratio
        padding = 1 - window.samples_K / window.padded_K
        assert (padding[inside] <= bound + 1e-9).all()
        assert window.spanning_K.sum() < len(rules.edges)
        if rules.crop:
            assert padding.max() == 0
        mean = window.samples_K.sum() + window.cropped
        assert (window.padded_K[~inside] <= rules.ordinary_limit(mean / len(inside)) + rules.ratio * len(inside)).all()


@bounded
@given(cases)
def test_audio_per_step_matches_the_recipe(case: dict[str, object]) -> None:
    plan = plan_of(case)
    found = audio_per_step_check(plan, 1, plan.constraints.micro_batches)
    assert found.seconds == pytest.approx(found.configured, rel=0.025)
    layout = plan.layout(0)
    total = 0
    for number in range(len(layout.step_W1) - 1):
        window = plan.window(0, number)
        audio = window.samples_K[window.order_GV].sum(axis=1)
        total += int(audio.sum()) + window.cropped
        mean = (audio.sum() + window.cropped) / len(audio)
        if mean < plan.constraints.micro_batches * plan.constraints.longest:
            continue  # no micro-batch may be empty: when each holds a single segment, its length sets the amount
        assert (audio <= mean + plan.constraints.longest).all()
        if window.cropped == 0:
            assert (audio >= mean - plan.constraints.longest).all()
    assert total == layout.samples


@bounded
@given(cases, st.integers(0, 10**6))
def test_a_step_does_not_depend_on_the_steps_read_before(case: dict[str, object], pick: int) -> None:
    walked, fresh = plan_of(case), plan_of(case)
    steps = walked.layout(0).steps
    wanted = pick % steps
    for g in range(wanted):
        walked.step(0, g)
    for a, b in zip(walked.step(0, wanted), fresh.step(0, wanted), strict=True):
        assert np.array_equal(a.row_n, b.row_n)
        assert np.array_equal(a.shard_n, b.shard_n)
        assert np.array_equal(a.length_n, b.length_n)


@bounded
@given(st.integers(0, 1000), st.sampled_from([0.3, 0.5, 0.8]))
def test_mixing_repeats_each_group_by_its_exact_factor(seed: int, alpha: float) -> None:
    rng = np.random.default_rng(seed)
    shards = random_shards(seed, 6, 60, low=3, high=15)
    share = [0.75, 0.2, 0.05]
    groups = [list(rng.choice(3, len(shard), p=share)) for shard in shards]
    catalogue = catalogue_of(shards, groups, 3)
    plan = make_plan(catalogue, reader_config(mix_alpha=alpha, shuffle_window=2), seed)
    seen = epoch_rows(plan)
    turns = int(plan.layout(0).turn_U.max()) + 1
    times = np.array([
        seen[s, r] for s in range(6) for r in range(60)
    ])  # fmt: skip
    for g in range(3):
        of_group = times[catalogue.group_N == g]
        share_g = Fraction(int(plan.repeats_G[g]), SHARE)
        assert of_group.sum() == turns * (len(of_group) * int(plan.repeats_G[g]) + SHARE // 2) // SHARE
        assert of_group.min() >= turns * int(share_g)
        assert of_group.max() <= turns * (int(share_g) + 1)
    hours = [catalogue.length_N[catalogue.group_N == g].sum(dtype=float) for g in range(3)]
    for g in range(3):
        assert plan.repeats_G[g] / SHARE == pytest.approx((max(hours) / hours[g]) ** (1 - alpha), rel=1e-3)


def test_epochs_differ_and_are_reproducible() -> None:
    make = lambda seed: make_plan(catalogue_of(random_shards(1, 4, 80)), reader_config(), seed)  # noqa: E731
    first, again, other = make(0), make(0), make(1)
    rows = lambda plan, epoch: [m.row_n.tolist() for g in range(5) for m in plan.step(epoch, g)]  # noqa: E731
    assert rows(first, 0) == rows(again, 0)
    assert rows(first, 0) != rows(first, 1)
    assert rows(first, 0) != rows(other, 0)
    assert first.hash == again.hash != other.hash


def test_windows_limit_the_number_of_open_shards() -> None:
    plan = make_plan(catalogue_of(random_shards(2, 40, 200)), reader_config(shuffle_window=8), 0)
    layout = plan.layout(0)
    assert len(layout.window_W1) - 1 == 5
    assert np.diff(layout.window_W1).max() <= 8


def test_segments_of_the_shards_of_a_window_are_shuffled_together() -> None:
    plan = make_plan(catalogue_of([[10.0] * 200] * 8), reader_config(shuffle_window=8, max_seconds=15.6), 0)
    shards = np.concatenate([m.shard_n for g in range(20) for m in plan.step(0, g)])
    assert len(set(shards.tolist())) == 8
    assert (np.diff(shards) == 0).mean() < 0.3


def test_a_tiny_corpus_keeps_all_its_audio_with_little_padding() -> None:
    """Each shard has 0.4 h, like one LibriSpeech speaker: mostly 12 to 16 s, and a few short segments."""
    rng = np.random.default_rng(0)
    lengths = list(np.concatenate([rng.uniform(12, 16.5, 95), rng.uniform(2, 12, 20)]))
    plan = make_plan(
        catalogue_of([lengths[i::4] for i in range(4)]), reader_config(batch_seconds=60.0, micro_batches=2), 0
    )
    window = plan.window(0, 0)
    used = plan.constraints.usable(plan.catalogue.length_N).sum()
    assert window.samples_K.sum() + window.cropped == used
    assert window.cropped < 0.01 * used
    assert 1 - window.samples_K.sum() / window.padded_K.sum() < 0.03


def test_default_settings_pad_less_than_three_percent() -> None:
    rng = np.random.default_rng(0)
    shards = [list(np.clip(rng.gamma(3.0, 3.0, 2000), 1, 30)) for _ in range(32)]
    plan = make_plan(catalogue_of(shards), DataConfig(shards="x"), 0)
    window = plan.window(0, 0)
    assert 1 - window.samples_K.sum() / window.padded_K.sum() < 0.03
    assert window.cropped == 0


def test_any_number_of_ranks_up_to_the_micro_batches_can_share_them() -> None:
    assert [accumulation(6, world) for world in range(1, 7)] == [6, 3, 2, 2, 2, 1]
    with pytest.raises(ConfigError, match=r"data.micro_batches=6 .* 7 ranks: run on at most 6"):
        accumulation(6, 7)
    assert useful_worlds(8) == [1, 2, 3, 4, 8]


def test_wrong_accumulation_is_refused() -> None:
    plan = make_plan(catalogue_of(random_shards(1, 4, 80)), reader_config(), 0)
    assert audio_per_step_check(plan, 2, 2).configured == 64
    with pytest.raises(ConfigError, match="must accumulate 2 steps"):
        audio_per_step_check(plan, 2, 1)


def test_impossible_sizes_are_refused_with_a_remedy() -> None:
    catalogue = catalogue_of(random_shards(1, 4, 80))
    with pytest.raises(
        ConfigError, match=r"raise data\.batch_seconds to at least 124\.8 or lower data\.micro_batches to at most 4"
    ):
        make_plan(catalogue, reader_config(batch_seconds=64.0, micro_batches=8), 0)
    with pytest.raises(ConfigError, match=r"less than a fiftieth"):
        make_plan(catalogue_of([[3.0, 4.0]]), reader_config(batch_seconds=6400.0), 0)
    with pytest.raises(ConfigError, match=r"max_seconds=5 is below"):
        make_plan(catalogue, reader_config(min_seconds=6.0, max_seconds=5.0), 0)


def test_a_memory_cap_is_met_or_refused() -> None:
    catalogue = catalogue_of(random_shards(1, 12, 200))
    with pytest.raises(ConfigError, match=r"raise data\.micro_batches to 10") as refused:
        make_plan(catalogue, reader_config(batch_seconds=320.0, micro_batches=4, cap_seconds=52.0), 0)
    assert "52" in str(refused.value)
    plan = make_plan(catalogue, reader_config(batch_seconds=320.0, micro_batches=10, cap_seconds=52.0), 0)
    layout = plan.layout(0)
    windows = [plan.window(0, w) for w in range(len(layout.step_W1) - 1)]
    assert max(int(window.padded_K.max()) for window in windows) <= 52 * SECOND
    config = reader_config(batch_seconds=320.0, micro_batches=10, cap_seconds=52.0, cap_quadratic=0.05)
    with pytest.raises(ConfigError, match="cap_seconds"):
        make_plan(catalogue, config, 0)


def test_the_largest_micro_batches_of_a_step_come_first() -> None:
    plan = make_plan(catalogue_of(random_shards(1, 8, 80)), reader_config(), 0)
    for g in range(plan.layout(0).steps):
        sizes = [micro.padded_samples for micro in plan.step(0, g)]
        assert sizes == sorted(sizes, reverse=True)


def digest(plan: Plan) -> str:
    """Returns a hash of every third step of two epochs."""
    found = hashlib.sha256()
    for epoch in (0, 3):
        for g in range(0, plan.layout(epoch).steps, 3):
            for micro in plan.step(epoch, g):
                for column in (micro.shard_n, micro.row_n, micro.length_n, micro.repeat_n):
                    found.update(np.ascontiguousarray(column, np.int64).tobytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize(
    ("values", "plan_hash", "steps"),
    [
        ({}, "22146f21dfc00cf7", "a97687ef46e72c69"),
        ({"mix_alpha": 0.5}, "4a0a33db67ad6288", "fa99c604da01ebcd"),
        ({"crop_to_shortest": True, "shuffle_window": 2}, "88a914c96c2712d9", "461b69ec02e126fc"),
        ({"batch_seconds": 400.0, "micro_batches": 10, "cap_seconds": 90.0}, "aec3ee9058b9c4fb", "b624c1910d0a0faa"),
    ],
)
def test_plans_of_earlier_versions_are_unchanged(values: dict[str, Any], plan_hash: str, steps: str) -> None:
    """Checkpoints store the plan hash, and a resume continues with the same steps."""
    shards = random_shards(5, 9, 70, low=2, high=15)
    groups = [list(np.random.default_rng(i).integers(0, 3, 70)) for i in range(9)]
    plan = make_plan(catalogue_of(shards, groups, 3), reader_config(**values), 11)
    assert (plan.hash, digest(plan)) == (plan_hash, steps)


@pytest.mark.parametrize("window", [3, 32])
@pytest.mark.parametrize("micro_batches", [2, 5])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_every_step_has_the_share_of_texts(share: float, micro_batches: int, window: int) -> None:
    catalogue = catalogue_of(random_shards(2, 12, 90, low=1, high=8))
    # short segments have texts, and each third shard has none
    shard_N = np.repeat(np.arange(12), 90)
    text_N = (catalogue.length_N < 4 * SECOND) & (shard_N % 3 > 0)
    config = reader_config(
        batch_seconds=200.0, micro_batches=micro_batches, max_seconds=8.0, min_seconds=1.0, bucket_ratio=1.2,
        shuffle_window=window, labels=("text",), text_share=share,
    )  # fmt: skip
    plan = make_plan(with_texts(catalogue, text_N), config, 3)
    found = []
    for g in range(plan.layout(0).steps):
        texts = total = 0
        for micro in plan.step(0, g):
            text_n = text_N[catalogue.starts_S[micro.shard_n] + micro.row_n]
            assert text_n.all() or not text_n.any()
            assert micro.padded_samples <= plan.largest_micro_batch()
            texts, total = texts + int(micro.length_n[text_n].sum()), total + micro.samples
        found.append(texts / total)
    assert np.mean(found) == pytest.approx(share, abs=0.02)
    if window == 32:
        assert found == pytest.approx([share] * len(found), abs=0.06)  # 4 s of 100 s, twice
    else:
        assert 0.3 * share < min(found) < max(found) < share + 0.25
    times = epoch_rows(plan)
    assert set(times) == {(s, r) for s in range(12) for r in range(90)}
    for kind in (text_N, ~text_N):
        counts = [times[int(n) // 90, int(n) % 90] for n in np.flatnonzero(kind)]
        assert max(counts) - min(counts) <= plan.layout(0).turns


def test_many_repeats_of_few_texts_are_in_every_step() -> None:
    catalogue = catalogue_of(random_shards(2, 5, 200, low=1, high=4))
    text_N = np.arange(1000) % 100 == 0
    config = reader_config(
        batch_seconds=16.0, micro_batches=2, max_seconds=4.0, min_seconds=1.0, labels=("text",), text_share=0.5
    )
    plan = make_plan(with_texts(catalogue, text_N), config, 0)
    for g in range(0, plan.layout(0).steps, 7):
        texts = [text_N[catalogue.starts_S[m.shard_n] + m.row_n].all() for m in plan.step(0, g)]
        assert sorted(texts) == [False, True]


def test_the_hash_covers_which_segments_have_a_text() -> None:
    catalogue = catalogue_of(random_shards(2, 4, 60))
    some = np.arange(240) % 3 == 0
    hashes = {make_plan(with_texts(catalogue, some), reader_config(), 0).hash}
    for share, text_N in ((0.5, some), (0.4, some), (0.5, np.roll(some, 1))):
        hashes.add(make_plan(with_texts(catalogue, text_N), reader_config(labels=("text",), text_share=share), 0).hash)
    assert len(hashes) == 4


@pytest.mark.parametrize(("text", "message"), [(False, "no segment with a text"), (True, "a text of each segment")])
def test_a_share_of_texts_that_cannot_be_reached_is_refused(text: bool, message: str) -> None:
    catalogue = with_texts(catalogue_of(random_shards(2, 2, 60)), np.full(120, text))
    with pytest.raises(ConfigError, match=f"data.text_share=0.5: the shards have {message}"):
        make_plan(catalogue, reader_config(labels=("text",), text_share=0.5), 0)


def test_few_texts_are_in_any_micro_batch() -> None:
    """Where a window has fewer texts than steps."""
    catalogue, config = catalogue_of(random_shards(2, 4, 60)), reader_config(labels=("text",), text_share=0.01)
    n = int(np.argmax(catalogue.length_N > 10 * SECOND))
    plan = make_plan(with_texts(catalogue, np.arange(240) == n), config, 0)
    assert epoch_rows(plan)[n // 60, n % 60] >= 1
