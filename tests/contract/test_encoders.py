"""Contract of every encoder, alone and behind every front end: packing, checkpointing, stochastic depth."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline.core.schema import ConfigError, load
from data_pipeline.core.types import Batch
from pretrain.config import Config
from pretrain.interfaces.frames import EncoderOutput, StepContext
from pretrain.interfaces.models import SpeechModel
from pretrain.profiling.flops import forward_flops
from pretrain.train_module import build_model
from tests.support.contract_cases import ENCODERS, FRONTENDS, OBJECTIVES, batch, small
from tests.support.parity_table import Parity, difference

CTX = StepContext(seed=3, step=5)
SECONDS = (0.61, 1.0, 0.26)
FRONT_ENDS = FRONTENDS | {"multiscale": {"name": "multiscale", "wave_channels": 16}}
QUIET = {"dropout": 0.0, "attention_dropout": 0.0, "layer_drop": 0.0}
LOUD = {"dropout": 0.2, "attention_dropout": 0.2, "activation_dropout": 0.2, "stochastic_depth": 0.2, "layer_drop": 0.1}
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "local_global": {"attention": "local_global", "window": 6, "registers": 2, "full_every": 2},
    "chunked": {"attention": "chunked", "chunk_frames": [4], "left_chunks": 1},
    "half rate": {"half_rate_blocks": 1},
    "half rate, local_global": {"half_rate_blocks": 1, "attention": "local_global", "window": 4, "registers": 2},
    "half rate, chunked": {"half_rate_blocks": 1, "attention": "chunked", "chunk_frames": [4]},
    "stochastic depth": {"stochastic_depth": 0.3},
    "widths": {"layers": 3, "widths": [[1, 48], [2, 64], [3, 16]]},
}
OWN_OPTIONS = {
    "transformer": {
        "pre-norm, rope": {"norm": "pre", "positions": "rope"},
        "conv_stack": {"positions": "conv_stack", "conv_positions_kernel": 5, "conv_positions_depth": 2},
        "relative bias": {"relative_bias": True, "relative_buckets": 16, "relative_max_distance": 20},
        "relative bias, chunked": {
            "relative_bias": True,
            "relative_buckets": 16,
            "relative_max_distance": 20,
            "attention": "chunked",
            "chunk_frames": [4],
            "left_chunks": 1,
        },
    },
    "conformer": {
        "causal": {"causal": True, "kernel": 5},
        "short kernel": {"kernel": 9},
        "chunk convolution": {"chunk_convolution": True, "kernel": 9, "attention": "chunked", "chunk_frames": [4]},
        "chunk convolution, half rate": {
            "chunk_convolution": True,
            "kernel": 9,
            "attention": "chunked",
            "chunk_frames": [6],
            "half_rate_blocks": 1,
            "layers": 3,
        },
    },
}
CASES = [(name, case) for name in ENCODERS for case in [*OPTIONS, *OWN_OPTIONS.get(name, {})]]


def values(encoder: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns a tiny config with these encoder fields."""
    return {
        "data": {"shards": "none"},
        "objective": small("objectives", "best_rq"),
        "frontend": FRONT_ENDS["log_mel"],
        "encoder": small("encoders", encoder) | fields,
    }


def speech_model(encoder: str, case: str, frontend: str = "log_mel", packed: bool = False, **more: Any) -> SpeechModel:
    """Builds a tiny model of the case with the same weights each time."""
    options = {**OPTIONS, **OWN_OPTIONS.get(encoder, {})}[case]
    chosen = values(encoder, {"layers": 3} | QUIET | options | more)
    chosen |= {"frontend": FRONT_ENDS[frontend] | {"dropout": 0.0}, "engine": {"packed": packed}}
    return build_model(load(Config, chosen)).model


def gradients(model: SpeechModel) -> dict[str, Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def weighted_sum(encoded: EncoderOutput, row: int = 0) -> Tensor:
    """Returns a randomly weighted sum of the outputs of all layers for one utterance."""
    n = int(encoded.lengths_B[row])
    total = encoded.layers[0].new_zeros(())
    for number, layer in enumerate(encoded.layers):
        generator = torch.Generator().manual_seed(number)
        total = total + (layer[row, :n] * torch.randn(n, layer.shape[2], generator=generator)).sum() / 100
    return total


@pytest.mark.parametrize(
    ("encoder", "case", "frontend"),
    [(*pair, "log_mel") for pair in CASES]
    + [(name, case, f) for name in ENCODERS for f in FRONT_ENDS for case in ("full", "half rate") if f != "log_mel"],
)
def test_packed_and_padded_batches_equal_each_utterance_alone(
    encoder: str, case: str, frontend: str, parity: Parity
) -> None:
    plain, packed = speech_model(encoder, case, frontend), speech_model(encoder, case, frontend, packed=True)
    data = batch(SECONDS, width=1.3)
    together = packed(data.wave_BT, data.lengths_B)
    with torch.no_grad():
        padded = plain(data.wave_BT, data.lengths_B)
    for row, seconds in enumerate(SECONDS):
        one = batch((seconds,), first_seed=row)
        alone = plain(one.wave_BT, one.lengths_B)
        n = int(alone.lengths_B[0])
        assert n == int(together.lengths_B[row])
        for found, other, expected in zip(together.layers, padded.layers, alone.layers, strict=True):
            parity("packed = each utterance alone: all layers", 1e-5, float((found[row, :n] - expected[0]).abs().max()))
            assert not found[row, n:].any()
            if "padding" not in plain.encoder.couples:
                error = float((other[row, :n] - expected[0]).abs().max())
                parity("padded = each utterance alone: all layers", 1e-5, error)
        weighted_sum(alone).backward()
    expected_sums = gradients(plain)
    torch.stack([weighted_sum(together, row) for row in range(len(SECONDS))]).sum().backward()
    found_sums = gradients(packed)
    assert expected_sums.keys() == found_sums.keys()
    for name, expected in expected_sums.items():
        parity("packed = each utterance alone: gradients", 1e-5, difference(found_sums[name], expected))


@pytest.mark.parametrize("frontend_encoder", [("log_mel", "conformer"), ("waveform_conv", "transformer")])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_packing_changes_neither_loss_nor_gradients(
    objective: str, frontend_encoder: tuple[str, str], parity: Parity
) -> None:
    """Objectives are not aware of packing, and teachers are packed as well."""
    frontend, encoder = frontend_encoder
    found = []
    for packed in (False, True):
        chosen = values(encoder, {}) | {"frontend": FRONT_ENDS[frontend], "objective": small("objectives", objective)}
        module = build_model(load(Config, chosen | {"engine": {"packed": packed}})).eval()
        plan = module.prepare(batch(SECONDS), CTX)
        loss, _ = module(batch(SECONDS), plan, plan.counts_K, CTX)
        loss.backward()
        sums = {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}
        found.append(sums | {"loss": loss.detach()})
    padded, tight = found
    assert padded.keys() == tight.keys()
    for name, expected in padded.items():
        parity("packed = padded: loss and gradients of every objective", 1e-5, difference(tight[name], expected))


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize(("case", "packed"), [("full", False), ("half rate, local_global", True), ("chunked", False)])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_activation_checkpointing_changes_no_gradient(
    encoder: str, case: str, packed: bool, mode: str, parity: Parity
) -> None:
    """Every kind of dropout is enabled."""
    found: list[dict[str, Tensor]] = []
    for chosen in ("none", mode):
        model = speech_model(encoder, case, packed=packed, **LOUD).train()
        model.encoder.activation_checkpointing = chosen  # type: ignore[assignment]
        torch.manual_seed(17)
        data = batch(SECONDS)
        frames = model.frontend.project(model.frontend.extract(data.wave_BT, data.lengths_B))
        weighted_sum(model.encoder(frames, CTX)).backward()
        found.append(gradients(model))
    plain, recomputed = found
    for name, expected in plain.items():
        error = float((recomputed[name] - expected).abs().max())
        parity("checkpointed = plain, dropout on: gradients of encoders", 1e-6, error)


def alive_after(run: Callable[[], Any]) -> int:
    """Returns the bytes of all tensors that `run` creates and that its result keeps for the backward pass."""
    made: dict[int, tuple[StorageWeakRef, int]] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(value, Tensor):
                    storage = value.untyped_storage()
                    made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            return out

    with Watch():
        kept = run()
    size = sum(n_bytes for reference, n_bytes in made.values() if not reference.expired())
    del kept
    return size


@pytest.mark.parametrize("encoder", ENCODERS)
def test_activation_checkpointing_saves_memory(encoder: str) -> None:
    data, sizes = batch((4.0,)), {}
    for mode in ("none", "selective", "full"):
        model = speech_model(encoder, "full", **LOUD | {"layer_drop": 0.0}).train()
        model.encoder.activation_checkpointing = mode  # type: ignore[assignment]
        frames = model.frontend.project(model.frontend.extract(data.wave_BT, data.lengths_B))
        sizes[mode] = alive_after(functools.partial(model.encoder, frames, CTX))
    assert sizes["selective"] < 0.6 * sizes["none"]
    assert sizes["full"] < 0.2 * sizes["none"]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_stochastic_depth_drops_branches_per_utterance(encoder: str) -> None:
    model = speech_model(encoder, "stochastic depth", stochastic_depth=0.9).train()
    packed = speech_model(encoder, "stochastic depth", stochastic_depth=0.9, packed=True).train()
    data = batch((0.8,) * 6)
    outputs = []
    for module in (model, model, packed):
        torch.manual_seed(17)
        outputs.append(module.encoder(module.frontend.project(module.frontend.extract(*data_of(data))), CTX))
    assert torch.equal(outputs[0].layers[-1], outputs[1].layers[-1])
    valid_BF = outputs[0].final.valid_BF()
    torch.testing.assert_close(outputs[2].layers[-1][valid_BF], outputs[0].layers[-1][valid_BF], rtol=0, atol=2e-5)
    kept = model.encoder.kept_branches(CTX, 4000, torch.zeros(1))  # type: ignore[operator]
    rates = 1 - (kept > 0).float().mean((1, 2))
    torch.testing.assert_close(rates, torch.tensor([0.3, 0.6, 0.9]), rtol=0, atol=0.03)
    torch.testing.assert_close(kept.mean((1, 2)), torch.ones(3), rtol=0, atol=0.1)
    assert model.eval().encoder.kept_branches(CTX, 3, torch.zeros(1)) is None  # type: ignore[operator]


def data_of(data: Batch) -> tuple[Tensor, Tensor]:
    return data.wave_BT, data.lengths_B


def test_the_middle_blocks_of_a_u_shape_run_at_half_the_frame_rate() -> None:
    model = speech_model("transformer", "half rate", layers=5, half_rate_blocks=3, norm="pre", positions="rope")
    seen: list[int] = []
    for block in model.encoder.blocks:  # type: ignore[union-attr]
        block.register_forward_hook(lambda block, inputs, output: seen.append(inputs[0].shape[1]))
    data = batch((1.0,))
    encoded = model(*data_of(data))
    n = int(encoded.lengths_B[0])
    assert seen == [n, (n + 1) // 2, (n + 1) // 2, (n + 1) // 2, n]
    assert [layer.shape[1] for layer in encoded.layers] == [n] * 6
    assert torch.equal(encoded.layers[2][:, 0], encoded.layers[2][:, 1])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_widths_size_each_block_and_equal_heads_and_ffn_dim_where_all_are_the_same(encoder: str) -> None:
    """A head keeps its channels; the counted operations follow the widths."""
    plain, same = speech_model(encoder, "full"), speech_model(encoder, "widths", widths=[[2, 64]] * 3)
    assert {n: w.shape for n, w in plain.state_dict().items()} == {n: w.shape for n, w in same.state_dict().items()}
    narrow = speech_model(encoder, "widths")
    qkv = [w.shape for n, w in narrow.state_dict().items() if n.endswith("attention.qkv.weight")]
    assert qkv == [(3 * heads * 16, 32) for heads in (1, 2, 3)]
    smaller = speech_model(encoder, "widths", widths=[[1, 16]] * 3)
    assert forward_flops(smaller, 16_000) < forward_flops(narrow, 16_000) < forward_flops(plain, 16_000)


@pytest.mark.parametrize(
    ("encoder", "fields", "words"),
    [
        ("transformer", {"heads": 5}, r"encoder.heads=5: must divide encoder.dim=32; take 2 or 4"),
        ("conformer", {"heads": 3}, r"encoder.heads=3: must divide encoder.dim=32; take 2 or 4"),
        ("transformer", {"conv_positions_groups": 12}, r"encoder.conv_positions_groups=12: must divide .*=32; take 4"),
        ("transformer", {"heads": 32, "positions": "rope"}, r"encoder.heads=32: leaves 1 channels per head"),
        ("transformer", {"relative_bias": True, "attention": "local_global"}, r"encoder.relative_bias=true: needs"),
        ("transformer", {"widths": [[1, 8]]}, r"encoder.widths=\[\[1, 8\]\]: has 1 pairs, and encoder.layers=2 blocks"),
        (
            "conformer",
            {"widths": [[1, 8], [0, 8]]},
            r"encoder.widths=.*: each block needs 1 head and 1 channel or more",
        ),
        ("conformer", {"widths": [[1, 8, 3], [2, 8]]}, r"encoder.widths.0"),
        ("transformer", {"relative_bias": True, "widths": [[1, 8], [2, 8]]}, r"needs encoder.heads=2 in each pair"),
        ("conformer", {"kernel": 8}, r"encoder.kernel=8: must be odd; take 9"),
        ("conformer", {"layers": 4, "half_rate_blocks": 3}, r"encoder.half_rate_blocks=3: must leave a block"),
        ("conformer", {"attention": "chunked", "half_rate_blocks": 1, "layers": 3, "chunk_frames": [5]}, "even"),
    ],
)
def test_inconsistent_fields_are_refused_when_the_config_is_loaded(
    encoder: str, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load(Config, values(encoder, fields))


def test_packing_with_a_group_norm_is_refused() -> None:
    bad = values("transformer", {}) | {"frontend": {"name": "waveform_conv"}, "engine": {"packed": True}}
    with pytest.raises(ConfigError, match=r"engine.packed=true: needs .* set frontend.norm=layer"):
        load(Config, bad)


@pytest.mark.parametrize("chosen", [{"packed": True}, {"activation_checkpointing": "selective"}])
def test_engine_settings_incompatible_with_compile_are_refused(chosen: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"engine\.\w+=.*: cannot run with engine.compile=true"):
        load(Config, values("transformer", {}) | {"engine": chosen | {"compile": True}})


@pytest.mark.parametrize(("given", "meant"), [(True, "full"), (False, "none"), ("selective", "selective")])
def test_former_boolean_values_of_activation_checkpointing_still_load(given: object, meant: str) -> None:
    config = load(Config, values("transformer", {}) | {"engine": {"activation_checkpointing": given}})
    assert config.engine.activation_checkpointing == meant
    assert build_model(config).model.encoder.activation_checkpointing == meant
