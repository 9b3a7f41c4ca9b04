"""A supernet: its subnets equal what they are cut to, each micro-batch trains the right one, and it resumes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.core.schema import ConfigError, load
from launch.main import main
from pretrain.checkpointing.locate import find_checkpoint
from pretrain.checkpointing.weights import LoadedCheckpoint, load_checkpoint
from pretrain.compression.cut import cut_subnet
from pretrain.config import Config
from pretrain.interfaces.frames import EncoderOutput, StepContext
from pretrain.interfaces.subnets import Space, Subnet
from pretrain.nn.block_stack import BlockStack
from pretrain.nn.importance import importance, sort_by_importance
from pretrain.objectives.distil import Distil, DistilPlan
from pretrain.train_module import TrainModule, build_model
from tests.support.contract_cases import batch, small
from tests.support.parity_table import Parity
from tests.support.training import config as training_config
from tests.support.training import run

ENCODERS: dict[str, dict[str, Any]] = {
    "post-norm": small("encoders", "transformer", layers=3),
    "pre-norm": small("encoders", "transformer", layers=3, norm="pre", positions="rope"),
    "conformer": small("encoders", "conformer", layers=3),
}
ELASTIC = {"blocks": [1, 2, 3], "heads": [1, 2], "ffn": [16, 40, 64]}


def values_of(encoder: str, **elastic: Any) -> dict[str, Any]:
    return {
        "data": {"shards": "none", "micro_batches": 4},
        "frontend": {"name": "log_mel"},
        "encoder": ENCODERS[encoder],
        "objective": {"name": "distil", "mask_prob": 0.0, "elastic": ELASTIC | elastic},
    }


def supernet(encoder: str = "pre-norm", **elastic: Any) -> LoadedCheckpoint:
    """Returns a supernet in which all weights, biases and norms are random."""
    config = load(Config, values_of(encoder, **elastic))
    module = build_model(config)
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in module.model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return LoadedCheckpoint(module, config, 7)


def parts(module: TrainModule) -> tuple[Distil, Space]:
    assert isinstance(module.objective, Distil)
    space = module.objective.space()
    assert space is not None
    return module.objective, space


@torch.no_grad()
def set_to(module: TrainModule, subnet: Subnet) -> EncoderOutput:
    """Returns what the supernet computes for two utterances when it is set to a subnet."""
    data, (_, space) = batch(), parts(module)
    frames = module.model.project(module.model.extract(data.wave_BT, data.lengths_B))
    output: EncoderOutput = module.model.encoder(frames, None, space.gates(subnet, torch.device("cpu")))
    return output


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_cut_subnet_equals_the_supernet_set_to_it(encoder: str, parity: Parity) -> None:
    found = supernet(encoder)
    found.module.eval()
    subnets: list[Subnet] = [((1, 16),), ((2, 40), (1, 64)), ((1, 64), (2, 16), (2, 40)), ((2, 64),) * 3]
    for subnet in subnets:
        cut = cut_subnet(found, subnet)
        assert cut.config.encoder.widths == subnet  # type: ignore[attr-defined]
        expected = set_to(found.module, subnet)
        with torch.no_grad():
            data = batch()
            output = cut.module.model.eval()(data.wave_BT, data.lengths_B)
        assert len(output.layers) == len(expected.layers) == len(subnet) + 1
        valid_BF = expected.final.valid_BF()
        for one, other in zip(output.layers, expected.layers, strict=True):
            error = float((one - other)[valid_BF].abs().max() / other[valid_BF].abs().max())
            parity("cut = supernet set to it: all layers, as a share of the largest", 1e-6, error)
    whole, part = (set_to(found.module, subnet).layers[3] for subnet in (subnets[3], subnets[2]))
    assert float((whole - part).abs().max()) > 1e-3
    with pytest.raises(ConfigError, match=r"trains \[1, 2, 3\] blocks, each with \[1, 2\] heads and \[16, 40, 64\]"):
        cut_subnet(found, ((2, 41),))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_sorting_by_importance_changes_no_output(encoder: str) -> None:
    module = supernet(encoder).module.eval()
    stack, data = module.model.encoder, batch()
    assert isinstance(stack, BlockStack)
    with torch.no_grad():
        before = module.model(data.wave_BT, data.lengths_B).layers
        sort_by_importance(stack)
        after = module.model(data.wave_BT, data.lengths_B).layers
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)
    for score in importance(stack):
        for part in (score.heads_H, *score.channels):
            assert torch.equal(part, part.sort(descending=True).values)


def test_each_micro_batch_trains_its_own_subnet() -> None:
    """The sandwich rule: 0 the largest, 1 the smallest, others drawn ones, the same for any number of ranks."""
    objective, space = parts(supernet(warmup_steps=2).module)
    later, first = StepContext(3, 2), StepContext(3, 1)
    assert [objective.subnet_of(number, first) for number in range(4)] == [None] * 4
    assert (objective.subnet_of(0, later), objective.subnet_of(1, later)) == (None, space.smallest)
    drawn = [objective.subnet_of(number, StepContext(3, step)) for step in range(2, 60) for number in (2, 3)]
    assert drawn == [objective.subnet_of(number, StepContext(3, step)) for step in range(2, 60) for number in (2, 3)]
    assert all(subnet is not None and space.holds(subnet) for subnet in drawn)
    assert {len(subnet or ()) for subnet in drawn} == {1, 2, 3}
    assert len(set(drawn)) > 50, "blocks have sizes of their own"
    assert objective.eval().subnet_of(1, later) is None
    assert space.size == 6 + 6**2 + 6**3 == len({*_all(space)})


def _all(space: Space) -> list[Subnet]:
    found: list[Subnet] = [()]
    subnets: list[Subnet] = []
    for _ in range(space.layers):
        found = [(*subnet, (h, f)) for subnet in found for h in space.heads for f in space.ffn]
        subnets += found
    return subnets


def test_only_the_weights_of_the_subnet_get_a_gradient() -> None:
    module = supernet("conformer").module
    data = dataclasses.replace(batch(), micro_batch=1)
    plan = module.prepare(data, StepContext(3, 5))
    assert isinstance(plan.plan, DistilPlan)
    assert plan.plan.subnet == ((1, 16),)
    loss, metrics = module(data, plan, plan.counts_K, StepContext(3, 5))
    loss.backward()
    assert float(metrics["metric/loss_smallest"][1]) == float(plan.plan.count)
    assert float(metrics["metric/loss_largest"][1]) == 0.0
    first, _, last = module.model.encoder.get_submodule("blocks")
    inner, qkv = (first.get_parameter(f"{name}.weight").grad for name in ("ffn_first.1", "attention.qkv"))
    assert inner is not None
    assert qkv is not None
    for grad in (inner, *qkv.chunk(3)):  # 16 inner channels; one head of 16 channels of queries, keys and values
        assert float(grad[:16].abs().max()) > 0
        assert float(grad[16:].abs().max()) == 0
    # zeros, not None: another rank may run that block in the same update
    assert all(weight.grad is not None and not weight.grad.any() for weight in last.parameters())


def test_a_supernet_trains_resumes_and_is_cut(tmp_path: Path) -> None:
    elastic = {"blocks": [1, 2], "heads": [1, 2], "ffn": [16, 64]}
    config = training_config(
        steps=4, runs=str(tmp_path), objective={"name": "distil", "layers": [[1], [2]], "elastic": elastic}
    )
    run(tmp_path / "whole", config)
    run(tmp_path / "parts", config, stop_after=2)
    run(tmp_path / "parts", config)
    one, two = (load_checkpoint(find_checkpoint(str(tmp_path / name))) for name in ("whole", "parts"))
    pairs = zip(one.module.state_dict().values(), two.module.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    (tmp_path / "widths.json").write_text("[[1, 64]]")
    line = ["compress", str(tmp_path / "whole"), str(tmp_path / "cut"), "--widths", str(tmp_path / "widths.json")]
    assert main(line) == 0
    cut = load_checkpoint(find_checkpoint(str(tmp_path / "cut")))
    assert cut.config.encoder.widths == ((1, 64),)  # type: ignore[attr-defined]
    assert json.loads((tmp_path / "cut" / "compressed.json").read_text())["from"]["step"] == 4
    expected = set_to(one.module.eval(), ((1, 64),)).layers[-1][0]
    found = cut.module.model.eval()(batch().wave_BT, batch().lengths_B).layers[-1][0]
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"shards": "none", "micro_batches": 2}}, "data.micro_batches=2: .*needs 3 or more"),
        ({"engine": {"name": "deepspeed", "zero_stage": 3}}, "engine.zero_stage=3: .*take 0 or 1"),
        ({"engine": {"name": "federated"}}, "engine.name=.*federated.*objective.elastic needs"),
        (
            {"engine": {"name": "deepspeed", "zero_stage": 2}},
            "engine.zero_stage=2: .*elastic.blocks differ; take 0 or 1",
        ),
        ({"tune": {"name": "lora"}}, "tune.name=.*lora.*a supernet"),
        ({"objective": {"name": "distil", "sparsity": 0.5, "elastic": ELASTIC}}, "leave out one"),
        ({"heads": {"text": {"name": "ctc", "layers": [1]}}}, "distil has its last layer alone"),
        ({"objective": {"name": "distil", "elastic": {"ffn": [16, 32]}}}, r"elastic.ffn=\[16, 32\]: .*ffn_dim=64"),
        ({"objective": {"name": "distil", "elastic": {"blocks": [0, 3]}}}, r"elastic.blocks=\[0, 3\]"),
        ({"encoder": small("encoders", "transformer", layers=3, half_rate_blocks=1)}, "half_rate_blocks=1 need all"),
        ({"encoder": ENCODERS["post-norm"] | {"relative_bias": True, "relative_buckets": 16}}, "shared by all heads"),
        ({"encoder": ENCODERS["post-norm"] | {"widths": [[1, 8]] * 3}}, r"encoder.widths=.* must be empty"),
    ],
)
def test_a_supernet_that_cannot_be_trained_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_model(load(Config, values_of("post-norm") | changes))
