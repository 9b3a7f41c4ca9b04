"""A device besides the CPU, without hardware: `python -m tests.support.second_device CASES.json OUT.json`.

Tensors of the device hold a CPU tensor and pass through `_dispatch`, which refuses operations that mix devices, as a
GPU does, and counts the operations that make the host wait for the device. Each case is three optimizer steps of one
model with a save and a resume; run in a process of its own, since a process can register one such backend.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from data_pipeline.core.schema import dump, load
from data_pipeline.core.types import Cursor
from pretrain.checkpointing import checkpoint
from pretrain.checkpointing.checkpoint import Saver, TrainState
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.config import Config
from pretrain.engines.distributed import DistributedContext
from pretrain.engines.plain_torch import TorchEngine
from pretrain.interfaces.frames import StepContext
from pretrain.train_module import build_model
from tests.support.contract_cases import labelled
from tests.support.synthetic_reader import synthetic_batch

NAME = "second"
DEVICE = f"{NAME}:0"
ROOT = Path(__file__).resolve().parents[2]
aten = torch.ops.aten

VALUES = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
"""Operations that return a value to Python: the host waits."""
SIZES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
"""Operations whose result's shape depends on values: the host waits."""
MASKED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
"""The same, if an index is a bool tensor."""
HOST_LENGTHS = {aten._ctc_loss.Tensor, aten._ctc_loss_backward.Tensor}
"""Operations that read lengths on the host, on every device."""


class MixedDevicesError(RuntimeError):
    """An operation has tensors of both devices."""


class Waits:
    """Counts by phase the operations that make the host wait, with the place in the product that calls them."""

    def __init__(self) -> None:
        self.phase = ""
        self.found: dict[str, Counter[str]] = {}

    def enter(self, phase: str) -> None:
        self.phase = phase

    def add(self, operation: str) -> None:
        self.found.setdefault(self.phase, Counter())[f"{place()}: {operation}"] += 1


WAITS = Waits()


class DeviceTensor(Tensor):
    """A tensor of the second device; `raw` is the CPU tensor with its values."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> DeviceTensor:
        """Wraps `raw`, with its shape, strides and type."""
        made: DeviceTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE
        )
        made.raw = raw
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        """Returns the values; the host waits."""
        WAITS.add("tolist")
        return self.raw.detach().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refused, as for every tensor outside the host's memory."""
        raise TypeError(f"numpy() of a tensor on {DEVICE} at {place()}: copy it to the CPU first")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """Sends operations that create tensors on the device, without having one as an argument, to `_dispatch`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def place() -> str:
    """Returns file and line of the innermost frame of the product; the backward pass has none of the forward's."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("pretrain", "data_pipeline"):
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "autograd"


def _on_device(device: object) -> bool:
    return device is not None and torch.device(device).type == NAME  # type: ignore[arg-type]


def _dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """Runs `func` on the CPU tensors; checks devices and counts waits."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    hosts = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
    moves = func in HOST_LENGTHS or func in (aten._to_copy.default, aten.copy_.default)
    mixed = [tuple(tensor.shape) for tensor in hosts if tensor.dim()] if ours and not moves else []
    if mixed:
        raise MixedDevicesError(f"{func.name()}: CPU tensors of shapes {mixed} beside those of {DEVICE} at {place()}")
    if ours:
        _count_waits(func, args)
    raw_args, raw_kwargs = tree_map(lambda leaf: leaf.raw if isinstance(leaf, DeviceTensor) else leaf, (args, kwargs))
    result_is_ours = bool(ours)
    if "device" in kwargs and kwargs["device"] is not None:
        result_is_ours = _on_device(kwargs["device"])
        if result_is_ours or ours:
            raw_kwargs = {**raw_kwargs, "device": "cpu"}
        if func is aten._to_copy.default and ours and not result_is_ours:
            WAITS.add("copy to the host")
    if func in VALUES or not result_is_ours:
        return func(*raw_args, **raw_kwargs)
    result = tree_map(
        lambda leaf: DeviceTensor(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, DeviceTensor) else leaf,
        func(*raw_args, **raw_kwargs),
    )
    if any(returned.alias_info for returned in func._schema.returns):
        return return_and_correct_aliasing(func, args, kwargs, result)
    return result


def _count_waits(func: Any, args: Any) -> None:
    if func in VALUES or func in SIZES:
        WAITS.add(func.name())
    elif func in MASKED and any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]):
        WAITS.add(f"{func.name()} with a mask")
    elif func is aten.copy_.default and isinstance(args[1], DeviceTensor) and not isinstance(args[0], DeviceTensor):
        WAITS.add("copy to the host")


def register() -> Library:
    """Registers the backend. Keep the result: its kernels are removed with it."""
    _setup_privateuseone_for_python_backend(NAME, _Backend())
    library = Library("aten", "IMPL")

    def empty_strided(size: Any, stride: Any, dtype: Any = None, **rest: Any) -> Tensor:
        return DeviceTensor(torch.empty_strided(size, stride, dtype=dtype))

    def empty(size: Any, dtype: Any = None, **rest: Any) -> Tensor:
        return DeviceTensor(torch.empty(size, dtype=dtype))

    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        """Copies between devices where torch itself does so, as `torch.tensor(values, device=…)`."""
        raw = source.raw if isinstance(source, DeviceTensor) else source
        (target.raw if isinstance(target, DeviceTensor) else target).copy_(raw)
        return target

    def lstm_cell(igates: Tensor, hgates: Tensor, cx: Tensor, *biases: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The cell of nn.LSTM, which torch computes in one kernel on every device but the CPU."""
        gates = igates + hgates + sum(bias for bias in biases if bias is not None)
        enter, keep, value, leave = gates.chunk(4, dim=1)
        cy = keep.sigmoid() * cx + enter.sigmoid() * value.tanh()
        return leave.sigmoid() * cy.tanh(), cy, gates

    library.impl("_thnn_fused_lstm_cell", lstm_cell, "AutogradPrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("empty.memory_format", empty, "PrivateUse1")
    return library


def without_dropout(values: Any) -> Any:
    """Returns a config's values with all dropout and layer drop at 0: their draws differ between kinds of devices."""
    if isinstance(values, list | tuple):
        return [without_dropout(value) for value in values]
    if not isinstance(values, dict):
        return values
    return {
        name: 0.0 if "dropout" in name or name == "layer_drop" else without_dropout(value)
        for name, value in values.items()
    }


def run(values: dict[str, Any], device: str) -> dict[str, Any]:
    """Trains two steps, saves, loads into a new engine, and trains a third.

    Returns:
        losses, norms, and waits: by phase of the step, the number of times that each place made the host wait.
    """
    config = load(Config, without_dropout(dump(load(Config, values))))
    WAITS.found = {}
    world = DistributedContext(device=device)
    losses, norms = [], []
    state = TrainState()
    with tempfile.TemporaryDirectory() as folder:
        for stop in (2, 3):
            engine = TorchEngine(build_model(config), config.engine, config.optimizer, world)
            engine.on_phase = WAITS.enter
            run_folder = RunFolder(folder)
            run_folder.claim()
            if stop == 3:
                WAITS.enter("resume")
                state = checkpoint.load_latest(run_folder, engine, config)
            for step in range(state.step, stop):
                batches = [labelled(synthetic_batch(step, j)) for j in range(2)]
                WAITS.enter("begin")
                result = engine.step(batches, StepContext(config.seed, step), 1e-3, None, math.inf)
                losses.append(result.loss), norms.append(result.grad_norm)
            WAITS.enter("checkpoint")
            with Saver(run_folder, engine, config) as saver:
                saver.save(TrainState(stop, Cursor("toy", 0, stop)))
    return {"losses": losses, "norms": norms, "waits": WAITS.found}


def main(cases_path: str, out_path: str) -> None:
    """Runs the cases, name -> config values, on both devices; writes name -> results or the error."""
    torch.set_num_threads(1)
    cases, out = json.loads(Path(cases_path).read_text()), {}
    library = register()
    for name, values in cases.items():
        try:
            expected = run(values, "cpu")
            with SecondDevice():
                found = run(values, DEVICE)
            out[name] = {"expected": expected, "found": found}
        except Exception:
            out[name] = {"error": traceback.format_exc(limit=-8)}
        Path(out_path).write_text(json.dumps(out))
    del library


if __name__ == "__main__":
    main(*sys.argv[1:])
