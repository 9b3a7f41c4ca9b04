"""Start-up check of the 16-bit operations of a model: compares each with fp32 on the device that will run it.

A wrong kernel raises no error, and the model would train on noise. Outputs and gradients of every distinct convolution,
linear layer and attention of the model are compared with fp32 on a few frames of noise, which takes milliseconds. A
wrong convolution is computed another way from then on; any other wrong operation ends the start with a ConfigError.
Results are kept for the process, and in a file in the user's cache folder for later processes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.json_object import read_object
from data_pipeline.core.schema import ConfigError
from pretrain.models.frontends.waveform_conv import NormedConv
from pretrain.nn.attention import SelfAttention
from pretrain.nn.attention_patterns import attend
from pretrain.nn.convolution import REDUCED, ConvShape, Route, TimeConv, default_route, override_route, time_conv
from pretrain.nn.positions import ConvPositions
from pretrain.profiling import processor

TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.01}
"""Largest allowed ‖16-bit − fp32‖ / ‖fp32‖; rounding of the results alone gives about 0.003 and 0.0004."""
MOST_OUTPUTS = 1024
"""Most columns of a matrix product that are checked; the same kernel computes the rest."""
FRAMES = 16
"""Output frames of a checked convolution and rows of a checked product."""


@dataclass(frozen=True)
class TimeConvolution:
    """A convolution over time, computed by `time_conv`."""

    shape: ConvShape

    def __str__(self) -> str:
        s = self.shape
        return (
            f"convolution of {s.in_dim} to {s.dim} channels, kernel {s.kernel}, stride {s.stride}, padding {s.padding},"
            f" groups {s.groups}"
        )

    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Returns the sizes of the operands."""
        s = self.shape
        frames = max(1, s.kernel + (FRAMES - 1) * s.stride - 2 * s.padding)
        return (1, frames, s.in_dim), (s.dim, s.in_dim // s.groups, s.kernel)

    def compute(self, x_BFD: Tensor, weight_EDK: Tensor) -> Tensor:
        """Runs the operation in the current precision."""
        s = self.shape
        return time_conv(x_BFD, weight_EDK, None, stride=s.stride, padding=s.padding, groups=s.groups)


@dataclass(frozen=True)
class Product:
    """A matrix product of frames with the weights of a linear layer."""

    in_dim: int
    dim: int

    def __str__(self) -> str:
        return f"linear layer of {self.in_dim} to {self.dim} channels"

    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Returns the sizes of the operands."""
        return (1, FRAMES, self.in_dim), (min(self.dim, MOST_OUTPUTS), self.in_dim)

    def compute(self, x_BFD: Tensor, weight_ED: Tensor) -> Tensor:
        """Runs the operation in the current precision."""
        return F.linear(x_BFD, weight_ED)


@dataclass(frozen=True)
class BatchedProduct:
    """A matrix product with separate weights for each row, as in the group-normed stem."""

    in_dim: int
    dim: int

    def __str__(self) -> str:
        return f"batched product of {self.in_dim} to {self.dim} channels"

    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Returns the sizes of the operands."""
        dim = min(self.dim, MOST_OUTPUTS)
        return (2, FRAMES, self.in_dim), (2, self.in_dim, dim), (2, 1, dim)

    def compute(self, x_BFK: Tensor, weight_BKD: Tensor, offset_B1D: Tensor) -> Tensor:
        """Runs the operation in the current precision."""
        return torch.baddbmm(offset_B1D, x_BFK, weight_BKD)


@dataclass(frozen=True)
class AttentionProduct:
    """Softmax attention without a mask."""

    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"attention of {self.heads} heads × {self.head_dim} channels"

    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Returns the sizes of the operands."""
        return ((1, self.heads, FRAMES, self.head_dim),) * 3

    def compute(self, q_BHFC: Tensor, k_BHFC: Tensor, v_BHFC: Tensor) -> Tensor:
        """Runs the operation in the current precision."""
        if torch.is_autocast_enabled(q_BHFC.device.type):
            dtype = torch.get_autocast_dtype(q_BHFC.device.type)
            q_BHFC, k_BHFC, v_BHFC = q_BHFC.to(dtype), k_BHFC.to(dtype), v_BHFC.to(dtype)
        return attend(0.25 * q_BHFC, k_BHFC, v_BHFC, None)  # small logits: a peaked softmax amplifies rounding


Operation = TimeConvolution | Product | BatchedProduct | AttentionProduct


@dataclass(frozen=True)
class CheckResult:
    """Result of checking one operation. error: relative to fp32, with its route.  direct: the same as given."""

    operation: Operation
    route: Route
    error: float
    direct: float
    right: bool


def operations(module: nn.Module) -> list[Operation]:
    """Returns the distinct operations of a model that run in 16 bits under autocast."""
    found: dict[Operation, None] = {}
    for part in module.modules():
        if isinstance(part, TimeConv | ConvPositions):
            found[TimeConvolution(part.shape)] = None
        elif isinstance(part, nn.Linear):
            found[Product(part.in_features, part.out_features)] = None
        elif isinstance(part, NormedConv):
            found[BatchedProduct(part.kernel, part.weight.shape[0])] = None
        elif isinstance(part, SelfAttention):
            found[AttentionProduct(part.heads, part.head_dim)] = None
    return list(found)


def check_operations(
    module: nn.Module, device: str, dtype: torch.dtype | None, say: Callable[[str], None] = print
) -> list[CheckResult]:
    """Checks the operations of `module` in `dtype` on `device` and reroutes wrong convolutions for the process.

    Args:
        module: the model; its weights are not read.
        device: a torch device, such as "cpu" or "cuda:0".
        dtype: autocast's type; None (fp32) checks nothing.
        say: receives a line for each convolution that is wrong as given and is computed another way.

    Returns:
        One result per distinct operation.

    Raises:
        ConfigError: an operation is wrong by every route; the message names it, its error and the remedy.
    """
    if dtype is None:
        return []
    results = check_each(operations(module), device, dtype)
    for result in results:
        where = f"{result.operation} in {_name(dtype)} on {device}"
        if not result.right:
            raise ConfigError(
                f"engine.precision={_precision(dtype)}: {where} differs from fp32 by {result.error:.2g} of its size "
                f"(allowed: {TOLERANCE[dtype]:g}), so that the model would train on noise; set engine.precision=fp32"
                f"{', or ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16 in the environment' if device == 'cpu' else ''}"
            )
        if result.direct > TOLERANCE[dtype]:
            say(f"{where} is wrong here (error {result.direct:.2g}); computed by route {result.route} instead")
    return results


def check_each(
    found: Iterable[Operation], device: str, dtype: torch.dtype, known: Path | None = None
) -> list[CheckResult]:
    """Returns the result of each operation, measured or from the cache, and applies the routes of convolutions.

    Args:
        found: the operations.
        device: a torch device.
        dtype: the 16-bit type.
        known: the cache file; default: `cache_file()`. Wrong operations are measured again each time.
    """
    known = cache_file() if known is None else known
    prefix = f"{device_fingerprint(device)}/{_name(dtype)}/"
    saved = dict(_read(known)) if known else {}
    results, fresh = [], {}
    for operation in found:
        key = f"{prefix}{operation}"
        result = _PROCESS.get(key) or _parsed(operation, saved.get(key))
        if result is None:
            result = check_operation(operation, device, dtype)
        if result.right and key not in saved:
            fresh[key] = [result.route, result.error, result.direct]
        if result.right:
            _PROCESS[key] = result
        if isinstance(operation, TimeConvolution):
            override_route(torch.device(device).type, dtype, operation.shape, result.route)
        results.append(result)
    if known and fresh:
        _write(known, {**saved, **fresh})
    return results


_PROCESS: dict[str, CheckResult] = {}


def check_operation(operation: Operation, device: str, dtype: torch.dtype) -> CheckResult:
    """Compares an operation with fp32; tries the routes of a convolution in order until one is right."""
    if not isinstance(operation, TimeConvolution):
        error = relative_error(operation, device, dtype)
        return CheckResult(operation, "direct", error, error, error <= TOLERANCE[dtype])
    kind, shape = torch.device(device).type, operation.shape
    errors: dict[Route, float] = {}
    first = default_route(kind, dtype, shape)
    odd: list[Route] = ["odd_kernel"] if shape.kernel % 2 == 0 else []
    routes: list[Route] = [first, "direct", *odd, "fp32"]
    try:
        for route in routes:
            override_route(kind, dtype, shape, route)
            errors[route] = relative_error(operation, device, dtype)
            if errors[route] <= TOLERANCE[dtype]:
                break
        direct = errors.get("direct")
        if direct is None:
            override_route(kind, dtype, shape, "direct")
            direct = relative_error(operation, device, dtype)
    finally:
        override_route(kind, dtype, shape, None)
    return CheckResult(operation, route, errors[route], direct, errors[route] <= TOLERANCE[dtype])


def relative_error(operation: Operation, device: str, dtype: torch.dtype) -> float:
    """Returns the largest ‖16-bit − fp32‖ / ‖fp32‖ over the output and the gradients of all operands; inf for NaN."""
    kind = torch.device(device).type
    operands = [noise(size).to(dtype).float().to(device) for size in operation.sizes()]
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        exact = _results(operation, operands)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    with torch.autocast(kind, dtype=dtype):
        found = _results(operation, operands)
    gaps = [
        float((mine.float() - theirs).norm() / theirs.norm().clamp(min=1e-30))
        for mine, theirs in zip(found, exact, strict=True)
    ]
    return max((gap if gap == gap else float("inf") for gap in gaps), default=0.0)


def _results(operation: Operation, operands: Sequence[Tensor]) -> list[Tensor]:
    """Returns the output, and the gradients of a fixed weighted sum of it."""
    leaves = [operand.clone().requires_grad_() for operand in operands]
    out: Tensor = operation.compute(*leaves)
    weights = noise(tuple(out.shape), start=977).to(out.device, out.dtype)
    gradients = torch.autograd.grad(out, leaves, weights)
    return [out.detach(), *gradients]


PERIOD = 65_537


@functools.cache
def _pool() -> Tensor:
    return torch.randn(PERIOD, generator=torch.Generator().manual_seed(0))


def noise(size: tuple[int, ...], start: int = 0) -> Tensor:
    """Returns normal noise with a prime period, which is cheaper to repeat than to draw."""
    n = 1
    for extent in size:
        n *= extent
    repeats = -(-(n + start) // PERIOD)
    return _pool().repeat(repeats)[start : start + n].view(size)


def device_fingerprint(device: str) -> str:
    """Returns a hash of torch's version, its kernels and the processor, for which results are valid."""
    if device.startswith("cuda"):
        part = f"{torch.cuda.get_device_name(device)} {torch.version.cuda} {torch.backends.cudnn.version()}"  # type: ignore[no-untyped-call]
    else:
        limits = " ".join(f"{name}={os.environ.get(name, '')}" for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"))
        part = f"{processor.model_name()} {' '.join(sorted(processor.instruction_sets()))} {limits}"
    return hashlib.sha256(f"{torch.__version__} {part}".encode()).hexdigest()[:16]


def cache_file() -> Path | None:
    """Returns the cache file of results, in a folder that only the user can write; None if that is not possible."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path(os.environ.get("HOME", "")) / ".cache")
    folder = Path(base) / "auricle"
    if not folder.is_absolute():
        return None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.lstat()
    except OSError:
        return None
    owned = not folder.is_symlink() and state.st_uid == os.getuid() and not state.st_mode & 0o022
    return folder / "operations.json" if owned else None


def _read(file: Path) -> dict[str, object]:
    """Returns the results of earlier processes; {} if the file is missing or damaged."""
    try:
        return read_object(file)
    except (OSError, ValueError):
        return {}


def _parsed(operation: Operation, value: object) -> CheckResult | None:
    match value:
        case ["direct" | "odd_kernel" | "fp32" as route, float(error), float(direct)]:
            return CheckResult(operation, route, error, direct, True)
    return None


def _write(file: Path, values: dict[str, object]) -> None:
    """Replaces the file atomically; errors are ignored, since the next process can measure again."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=file.parent, prefix=".operations", delete=False
        ) as temporary:
            json.dump(values, temporary)
        Path(temporary.name).replace(file)
    except OSError:
        return


SAMPLE: tuple[Operation, ...] = (
    TimeConvolution(ConvShape(1, 512, 10, 5)),
    TimeConvolution(ConvShape(512, 512, 3, 2)),
    TimeConvolution(ConvShape(512, 512, 2, 2)),
    TimeConvolution(ConvShape(32, 32, 128, stride=1, padding=64, groups=4)),
    TimeConvolution(ConvShape(96, 96, 32, stride=1, padding=16, groups=16)),
    TimeConvolution(ConvShape(24, 24, 8, stride=1, padding=4, groups=4)),
    TimeConvolution(ConvShape(256, 256, 31, stride=1, padding=0, groups=256)),
    TimeConvolution(ConvShape(80, 256, 3, 2, 1)),
    Product(256, 1024),
    BatchedProduct(10, 512),
    AttentionProduct(8, 64),
)
"""Operations of the shipped recipes, including small ones, that `auricle doctor` checks."""


def survey(device: str, dtype: torch.dtype) -> tuple[int, list[CheckResult]]:
    """Returns the number of operations in SAMPLE that are right as given, and the results of those that are not."""
    results = check_each(SAMPLE, device, dtype)
    odd = [result for result in results if not result.right or result.direct > TOLERANCE[dtype]]
    return len(results) - len(odd), odd


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _precision(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype] if dtype in REDUCED else _name(dtype)
