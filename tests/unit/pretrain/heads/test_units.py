"""Text to units and back: what is learned is written again; prompts; refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from data_pipeline.core.schema import ConfigError, load
from data_pipeline.core.types import Batch
from pretrain.generation.units import unit_frames, write
from pretrain.heads import units
from pretrain.inference.sampling import NoEndError, Sampling
from pretrain.interfaces.frames import EncoderOutput, StepContext
from pretrain.interfaces.models import Memory, ModelShape
from pretrain.interfaces.objectives import HeadPlan
from pretrain.nn.unit_runs import runs_of
from tests.support.contract_cases import DECODER, TEXTS, TOWER, batch, labelled

SHAPE = ModelShape(dim=16, n_layers=2, feature_dim=80, feature_rate_hz=100.0, rate_hz=25.0)
GREEDY = Sampling(temperature=0.0)


def plan(data: Batch, rows: list[bool]) -> HeadPlan:
    units_B = runs_of(data.targets["level_0"]).lengths_B
    return HeadPlan(torch.tensor(0.0), torch.tensor(rows), sizes_B=units_B)


def head(**values: Any) -> units.Units:
    torch.manual_seed(0)
    sizes = {"vocabulary": 27, "units": 12, "levels": ["level_0"], "same": "", "tower": TOWER}
    decoder = DECODER | {"dim": 32, "dropout": 0.0}
    return units.build(load(units.Config, sizes | {"decoder": decoder} | values), SHAPE)


def encoded(rows: int = 2, frames: int = 25) -> EncoderOutput:
    generator = torch.Generator().manual_seed(0)
    layers = tuple(torch.randn(rows, frames, 16, generator=generator) for _ in range(3))
    return EncoderOutput(layers, torch.tensor([frames, frames - 7][:rows]), 25.0)


def trained(made: units.Units, data: Batch, updates: int = 120) -> units.Units:
    optimizer = torch.optim.Adam(made.parameters(), lr=5e-3)
    for step in range(updates):
        out = made(encoded(), data, plan(data, [True, True]), StepContext(seed=0, step=step))
        optimizer.zero_grad()
        (out.total / out.count).backward()
        optimizer.step()
    return made.eval()


def text_ids(data: Batch, row: int) -> list[int]:
    return [number for number in data.tokens["text"][row].tolist() if number >= 0]


def test_learned_units_are_written_from_their_text_at_every_level() -> None:
    data = labelled(batch())
    made = trained(head(levels=["level_0", "level_1"], prompt_drop=0.5), data)
    for row in range(2):
        wanted = [[unit for unit in data.targets[f"level_{n}"][row].tolist() if unit >= 0] for n in range(2)]
        found = unit_frames(made, text_ids(data, row), encoded(1), GREEDY) if row else None
        ids = write(made, text_ids(data, row), None, GREEDY)
        assert ids == runs_of(torch.tensor([wanted[0]])).ids_BN[0].tolist()
        if found is not None:
            assert len(found) == 2
            assert [len(level) for level in found] == [len(found[0])] * 2
            hits = sum(a == b for a, b in zip(found[0], wanted[0], strict=False))
            assert abs(len(found[0]) - 25) <= 2
            assert hits >= 20


def test_learned_texts_are_written_from_their_units() -> None:
    data = labelled(batch())
    made = trained(head(direction="units_to_text"), data)
    for row in range(2):
        runs = runs_of(data.targets["level_0"][row : row + 1])
        assert write(made, runs.ids_BN[0, : int(runs.lengths_B[0])].tolist(), None, GREEDY) == text_ids(data, row)


def prompts(made: units.Units, data: Batch, rows: list[bool], step: int = 0) -> Memory:
    seen: list[Memory] = []
    hook = made.from_prompt.register_forward_pre_hook(lambda _, given: frames.append(given[0]))
    start = made.decoder.register_forward_pre_hook(lambda _, given: seen.append(given[1][1]))
    frames: list[torch.Tensor] = []
    made(encoded(len(rows)), data, plan(data, rows), StepContext(seed=0, step=step))
    hook.remove()
    start.remove()
    return Memory(frames[0], seen[0].lengths_B)


def test_a_prompt_is_a_part_of_another_segment_of_the_same_speaker() -> None:
    data, layers = labelled(batch()), encoded().layers[-1]
    made = head(prompt_seconds=0.4, prompt_drop=0.0)
    prompt = prompts(made, data, [True, True])
    assert prompt.lengths_B.tolist() == [10, 10]
    for row, other in ((0, 1), (1, 0)):
        places = [n for n in range(25) if torch.equal(layers[other, n], prompt.x_BMD[row, 0])]
        assert len(places) == 1
        assert torch.equal(prompt.x_BMD[row], layers[other, places[0] : places[0] + 10])
    assert prompts(made, data, [True, False]).lengths_B.tolist() == [0, 0]
    alike = dataclasses.replace(data, labels={"speaker": ("ann", "ann")})
    assert prompts(head(same="speaker", prompt_drop=0.0), alike, [True, True]).lengths_B.tolist() == [18, 25]
    assert prompts(head(same="speaker", prompt_drop=0.0), data, [True, True]).lengths_B.tolist() == [0, 0]


def test_prompts_are_left_out_in_training_alone() -> None:
    made = head(prompt_drop=0.5)
    found = [prompts(made, labelled(batch()), [True, True], step).lengths_B.count_nonzero() for step in range(30)]
    assert 15 < sum(map(int, found)) < 45
    assert all(prompts(made.eval(), labelled(batch()), [True, True], step).lengths_B.all() for step in range(5))


def test_an_end_that_never_comes_is_an_error() -> None:
    made = head().eval()
    torch.nn.init.constant_(made.decoder.out.bias[made.end :], -100.0)
    with pytest.raises(NoEndError, match="no end after"):
        write(made, [1, 2, 3], None, Sampling())


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="levels"):
        head(levels=["level_0", "level_1"], direction="units_to_text")
    with pytest.raises(ConfigError, match="max_read=5"):
        write(head(max_read=5).eval(), [1] * 6, None, GREEDY)
    with pytest.raises(ConfigError, match="there are 0"):
        write(head().eval(), [], None, GREEDY)
    with pytest.raises(ConfigError, match="direction=units_to_text"):
        unit_frames(head(direction="units_to_text").eval(), [1], None, GREEDY)


def test_equal_seeds_write_equal_units() -> None:
    made, data = head().eval(), labelled(batch())
    torch.nn.init.constant_(made.decoder.out.bias[made.end :], 1.0)
    torch.nn.init.constant_(made.length.bias, 3.0)
    found = [write(made, text_ids(data, 0), encoded(1), Sampling(seed=seed)) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    assert len(TEXTS[0]) == len(text_ids(data, 0))


def test_lines_train_the_tower_alone_beside_the_rows_that_count() -> None:
    data = labelled(batch())
    without = dataclasses.replace(data, tokens={"text": data.tokens["text"]})
    ctx = StepContext(seed=0, step=0)
    made = head(masked_weight=0.5, prompt_drop=0.5).eval()
    plain = made(encoded(), without, plan(data, [True, False]), ctx)
    more = made(encoded(), data, plan(data, [True, False]), ctx)
    assert "lines" not in plain.metrics
    assert plain.count == more.count
    lines = more.metrics["lines"][0]
    assert float((more.total - plain.total).detach()) == pytest.approx(float(lines.detach()), rel=1e-5)
    lines.backward()
    changed = {name.split(".")[0] for name, weight in made.named_parameters() if weight.grad is not None}
    assert changed == {"tower"}
    again = made(encoded(), data, plan(data, [True, False]), dataclasses.replace(ctx, step=1))
    assert float(again.metrics["lines"][0].detach()) != float(lines.detach())
    too_long = head(masked_weight=0.5, max_read=8).eval()(encoded(), data, plan(data, [True, False]), ctx)
    assert float(too_long.metrics["lines"][0].detach()) == 0.0
    assert "lines" not in head(direction="units_to_text")(encoded(), data, plan(data, [True, True]), ctx).metrics


def test_lines_are_modelled_after_training() -> None:
    data = labelled(batch())
    made = head(masked_weight=1.0)
    before = float(made(encoded(), data, plan(data, [True, True]), StepContext(seed=0, step=500)).metrics["lines"][0])
    trained(made, data)
    after = float(made(encoded(), data, plan(data, [True, True]), StepContext(seed=0, step=500)).metrics["lines"][0])
    assert after < 0.75 * before
