"""The attention decoder's head: targets, smoothing, memories left out, texts that do not count, refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.core.schema import ConfigError, load
from data_pipeline.core.types import Batch
from data_pipeline.text.artefact import TokensConfig, make_tokens
from launch.workers.build import require_fitting_labels
from pretrain.config import Config
from pretrain.heads import ctc, sequence
from pretrain.interfaces.frames import EncoderOutput, StepContext
from pretrain.interfaces.models import Memory, ModelShape
from pretrain.interfaces.objectives import HeadPlan
from pretrain.interop.hf_ctc import ctc_head
from tests.support.contract_cases import CASES, make

SHAPE = ModelShape(dim=16, n_layers=2, feature_dim=80, feature_rate_hz=100.0, rate_hz=25.0)
CTX = StepContext(seed=0, step=4)


def head(**values: Any) -> sequence.Sequence:
    torch.manual_seed(0)
    decoder = {"layers": 1, "heads": 2, "ffn_dim": 16, "max_tokens": 6, "dropout": 0.0}
    return sequence.build(load(sequence.Config, {"vocabulary": 5, "decoder": decoder, **values}), SHAPE)


def batch(ids: list[list[int]], keys: int = 0) -> Batch:
    ids_BN = torch.tensor(ids)
    names = tuple(f"k{keys + row}" for row in range(len(ids)))
    lengths_B = torch.full((len(ids),), 16_000)
    return Batch(torch.zeros(len(ids), 16_000), lengths_B, names, 0, tokens={"text": ids_BN})


def encoded(rows: int, frames: int = 7) -> EncoderOutput:
    generator = torch.Generator().manual_seed(0)
    layers = tuple(torch.randn(rows, frames, 16, generator=generator) for _ in range(3))
    return EncoderOutput(layers, torch.full((rows,), frames), 25.0)


def plan(rows: list[bool]) -> HeadPlan:
    return HeadPlan(torch.tensor(0.0), torch.tensor(rows))


def inputs_of_decoder(made: sequence.Sequence, data: Batch, rows: list[bool]) -> tuple[Tensor, list[Memory]]:
    """Returns the tokens and the memories that the decoder is given in a forward pass."""
    seen: list[tuple[Tensor, list[Memory]]] = []
    hook = made.decoder.register_forward_pre_hook(lambda _, given: seen.append(given))
    made(encoded(len(rows)), data, plan(rows), CTX)
    hook.remove()
    return seen[0]


def test_the_decoder_reads_the_start_before_the_tokens() -> None:
    data = batch([[3, 1, -1], [2, 2, 4], [-1, -1, -1]])
    read_BN, _ = inputs_of_decoder(head(), data, [True, True, False])
    assert read_BN.tolist() == [[6, 3, 1, 5], [6, 2, 2, 4], [6, 5, 5, 5]]


def test_the_loss_is_smoothed_cross_entropy_summed_over_tokens_and_end() -> None:
    made, data = head().eval(), batch([[3, 1, -1], [2, 2, 4], [-1, -1, -1]])
    rows = [True, True, False]
    found = made(encoded(3), data, plan(rows), CTX)
    read_BN, memories = inputs_of_decoder(made, data, rows)
    log_p_BNV = made.decoder(read_BN, memories).log_softmax(-1)
    expected = torch.zeros(())
    for row, targets in enumerate([[3, 1, 5], [2, 2, 4, 5], []]):
        for place, target in enumerate(targets):
            expected -= 0.9 * log_p_BNV[row, place, target] + 0.1 * log_p_BNV[row, place].mean()
    torch.testing.assert_close(found.total, expected)
    assert int(found.count) == 7


def test_memories_are_left_out_by_segment_and_never_all() -> None:
    made = head(memory_layers=[1, 2], memory_drop=0.6)
    data = batch([[1]] * 200)
    kept_KB = torch.stack([memory.lengths_B > 0 for memory in inputs_of_decoder(made, data, [True] * 200)[1]])
    assert bool(kept_KB.any(0).all())
    assert 0.2 < float(kept_KB.float().mean()) < 0.8
    later = batch([[1]] * 100, keys=100)
    half = torch.stack([memory.lengths_B > 0 for memory in inputs_of_decoder(made, later, [True] * 100)[1]])
    assert torch.equal(half, kept_KB[:, 100:])


def test_a_memory_that_is_left_out_is_not_heard() -> None:
    made = head(memory_layers=[1, 2]).eval()
    out = encoded(1)
    read_1N = torch.tensor([[6, 1]])
    memories = made.memories(out)
    muted = [memories[0]._replace(lengths_B=torch.zeros(1, dtype=torch.int64)), memories[1]]
    other = made.memories(out._replace(layers=(out.layers[0], out.layers[1] + 1.0, out.layers[2])))
    also = [other[0]._replace(lengths_B=torch.zeros(1, dtype=torch.int64)), other[1]]
    torch.testing.assert_close(made.decoder(read_1N, muted), made.decoder(read_1N, also))


def run_config(tokens: Path | None, **values: Any) -> Config:
    data = {"shards": "none", "tokens": {"text": str(tokens)} if tokens else {}}
    given = {"data": data, "objective": {"name": "none"}, "frontend": {"name": "log_mel"}}
    heads = {"text": {"name": "sequence", "vocabulary": 3, **values}}
    return load(Config, {**given, "encoder": {"name": "transformer"}, "heads": heads})


def test_tokens_must_be_read_and_of_the_size_of_the_decoder(tmp_path: Path) -> None:
    make_tokens(load(TokensConfig, {"shards": "s", "out": str(tmp_path)}), ["abc"])
    require_fitting_labels(run_config(tmp_path))
    with pytest.raises(ConfigError, match=r"heads\.text\.tokens=text: data\.tokens has no"):
        require_fitting_labels(run_config(None))
    with pytest.raises(ConfigError, match=r"heads\.text\.vocabulary=9: .* has 3 tokens"):
        require_fitting_labels(run_config(tmp_path, vocabulary=9))


@pytest.mark.parametrize("values", [{"layers": [1], "memory_layers": [2]}, {"memory_layers": [-1]}])
def test_layers_that_do_not_fit_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="memory_layers"):
        head(**values)
    with pytest.raises(ValueError, match="at most 2"):
        head(memory_layers=[3])


def test_texts_that_are_too_long_are_counted() -> None:
    made, data = head().eval(), batch([[1, 2, 3, 4, 0, 1], [1, 2, -1, -1, -1, -1]])
    found = made(encoded(2), data, plan([False, True]), CTX)
    assert tuple(map(float, found.metrics["infeasible"])) == (1.0, 2.0)
    assert int(found.count) == 3
    assert dataclasses.asdict(made.config)["decoder"]["max_tokens"] == 6


def test_a_ctc_head_on_tokens_is_not_exported_with_an_empty_vocabulary() -> None:
    heads = {"task": {"name": "ctc", "tokens": "text", "vocabulary": 27}}
    values = {"data": {"shards": "none"}, "objective": {"name": "none"}, "frontend": {"name": "log_mel"}}
    config = load(Config, {**values, "encoder": {"name": "transformer"}, "heads": heads})
    with pytest.raises(ConfigError, match=r"heads\.task\.tokens=text"):
        ctc_head(config, make("none", heads=heads))


def test_ctc_needs_the_number_of_its_tokens() -> None:
    with pytest.raises(ConfigError, match="vocabulary"):
        load(ctc.Config, {"tokens": "text"})


@pytest.mark.parametrize(
    ("objective", "field", "said"),
    [
        (
            "best_rq",
            {"memory_layers": [1, 3]},
            r"heads\.task\.memory_layers=\[1, 3\]: must be at most encoder\.layers=2",
        ),
        (
            "data2vec2",
            {"memory_layers": [1, 2]},
            r"heads\.task\.memory_layers=\[1, 2\]: .*set heads\.task\.input=whole",
        ),
        ("data2vec2", {"layers": [1]}, r"heads\.task\.layers=\[1\]: .*set heads\.task\.input=whole"),
    ],
)
def test_layers_that_the_objective_does_not_give_are_refused(objective: str, field: dict[str, Any], said: str) -> None:
    values = {"data": {"shards": "none"}, "objective": CASES[objective], "frontend": {"name": "log_mel"}}
    values |= {"encoder": {"name": "transformer", "layers": 2}}
    task = {"name": "sequence", "vocabulary": 5} | field
    with pytest.raises(ConfigError, match=said):
        load(Config, values | {"heads": {"task": task}})
    if objective == "data2vec2":
        load(Config, values | {"heads": {"task": task | {"input": "whole"}}})
