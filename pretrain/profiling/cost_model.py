"""Forecasts memory, communication and time of a run on a cluster from forward passes on this machine's CPU.

Measured on the actual architecture: parameters, operations and saved activations of a forward pass at two lengths.
Operations and activations are polynomials a·t + b·t² in the length t of a segment (everything but attention is linear).
Assumed: the GPU's peak and links (hardware.py), the share of the peak that is reached (MFU), and that gradients are
reduced during the backward pass. The assumptions are printed with the result.

The measurement fits on a login node: weights are memory pages that are never written, and saved activations are counted
and dropped at once.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from data_pipeline.core.schema import ConfigError, hint
from data_pipeline.core.types import SAMPLE_RATE, Batch
from data_pipeline.sampling.plan import accumulation
from pretrain.config import Config
from pretrain.interfaces.frames import StepContext
from pretrain.profiling import hardware
from pretrain.profiling.flops import Counter
from pretrain.profiling.hardware import GPUS
from pretrain.train_module import TrainModule, build_model

GIB = 1 << 30
BACKWARD = 2.0
"""Operations of the backward pass per one of the forward pass."""
LARGEST_BUCKET = 50_000_000
"""Elements of DeepSpeed's gradient bucket, as in engines/deepspeed.py."""
LIVE = 1_000_000_000
"""Weights that ZeRO-3 keeps gathered between their uses: DeepSpeed's stage3_max_live_parameters."""
KINDS = [name for name in GPUS if name.isalnum()]
"""GPU types that a cluster can have."""


@dataclass(frozen=True)
class Cluster:
    """nodes x gpus x kind, e.g. 8x8xH100."""

    nodes: int
    gpus: int
    kind: str

    @property
    def size(self) -> int:
        """Total number of GPUs."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Cost:
    """A quantity of one segment of t seconds: linear * t + quadratic * t²."""

    linear: float
    quadratic: float

    def of(self, seconds: float) -> float:
        """Returns the cost of a segment of `seconds`."""
        return self.linear * seconds + self.quadratic * seconds**2


@dataclass(frozen=True)
class Measured:
    """One model: parameters, forward operations per segment, bytes kept for the backward pass per segment and once."""

    parameters: int
    trained: int
    flops: Cost
    activations: Cost
    differentiated: Cost
    """The part of `flops` that a backward pass follows: all but a teacher's."""
    kept_once: float = 0.0
    """Bytes independent of the number of segments, such as weights cast to 16 bits."""


@dataclass(frozen=True)
class StepForecast:
    """One optimizer step on n GPUs. Bytes and seconds are per GPU and step."""

    gpus: int
    seconds_each: float
    """Audio per step of the busiest GPU."""
    compute: float
    communication: float
    exposed: float
    """Communication not hidden behind the backward pass."""
    sent: float

    @property
    def step(self) -> float:
        """Seconds per optimizer step."""
        return self.compute + self.exposed


def parse_cluster(text: str) -> Cluster:
    """Parses NODESxGPUSxKIND. Raises ConfigError naming the form and the known GPUs."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\w+)", text)
    kind = found[3].upper() if found else ""
    if not found or kind not in KINDS or not int(found[1]) * int(found[2]):
        near, known = hint(kind, KINDS), ", ".join(KINDS)
        raise ConfigError(f"cluster={text}: write NODESxGPUSxKIND, as in 8x8xH100{near}; kinds: {known}")
    return Cluster(int(found[1]), int(found[2]), kind)


def measure(config: Config, lengths: tuple[float, float] = (2.0, 4.0)) -> Measured:
    """Runs the model's forward pass on this machine's CPU at two lengths in seconds, in the config's precision."""
    module = build_without_memory(config)
    if module.model.encoder.activation_checkpointing == "selective":
        module.model.encoder.activation_checkpointing = (
            "none"  # the hooks do not see its tensors, so this is an upper bound
        )
    shorter, longer = (_forward(module, config, seconds) for seconds in lengths)
    once = max(0.0, 2 * shorter[1] - _forward(module, config, lengths[0], segments=2)[1])
    parameters = list(module.parameters())
    return Measured(
        parameters=sum(parameter.numel() for parameter in parameters),
        trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        flops=_fit(lengths, (shorter[0], longer[0])),
        activations=_fit(lengths, (shorter[1] - once, longer[1] - once)),
        differentiated=_fit(lengths, (shorter[2], longer[2])),
        kept_once=once,
    )


def build_without_memory(config: Config) -> TrainModule:
    """Returns the config's module with zero weights that occupy no memory until they are written to."""
    with torch.device("meta"):
        module = build_model(config)

    def pages(tensor: Tensor) -> Tensor:
        # numpy takes zeroed pages from the operating system, which exist only once they are written
        raw = np.zeros(tensor.numel() * tensor.element_size(), dtype=np.uint8)
        return torch.from_numpy(raw).view(tensor.dtype).view(tensor.shape)

    module._apply(pages)  # type: ignore[no-untyped-call]
    return module


def _fit(lengths: tuple[float, float], values: tuple[float, float]) -> Cost:
    """Returns the polynomial through both points and the origin."""
    (s, t), (u, v) = lengths, values
    quadratic = max(0.0, (v / t - u / s) / (t - s))
    return Cost(v / t - quadratic * t, quadratic)


def _forward(module: TrainModule, config: Config, seconds: float, segments: int = 1) -> tuple[float, float, float]:
    """Returns the operations of a forward pass over segments of noise, and the bytes saved for the backward pass."""
    samples = int(seconds * SAMPLE_RATE)
    keys = tuple(f"noise {number}" for number in range(segments))
    targets = {}
    if labels := config.objective.frame_labels:
        targets[labels.name] = torch.zeros(segments, round(seconds * labels.rate_hz), dtype=torch.int64)
    batch = Batch(0.1 * torch.randn(segments, samples), torch.full((segments,), samples), keys, 0, targets)
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    saved: dict[int, tuple[StorageWeakRef, int]] = {}

    def pack(tensor: Tensor) -> None:
        """Counts a storage once and keeps nothing: no backward pass follows."""
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # the weak reference keeps the address from being used again
            saved[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]

    def unpack(nothing: None) -> Tensor:
        raise RuntimeError("the cost model runs no backward pass")

    context, cached = StepContext(0, 0), torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # it would keep a 16-bit copy of every weight
    try:
        with Counter() as counted, torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            plan = module.prepare(batch, context)
            module(batch, plan, plan.counts_K, context)
    finally:
        torch.set_autocast_cache_enabled(cached)
    n_bytes = float(sum(n_bytes for _, n_bytes in saved.values()))
    total = float(counted.get_total_flops())
    return total, n_bytes, total - counted.without_gradient


def state_bytes(measured: Measured, stage: int, ranks: int) -> float:
    """Returns the bytes of weights, gradients and Adam's moments on one GPU, in fp32: 4 + 4 + 8 per parameter.

    From stage 1 on DeepSpeed updates a partitioned copy of the weights (4 bytes each) and sums gradients in a bucket
    that exists during the backward pass; ZeRO-3 gathers weights and keeps up to LIVE of them between the passes.
    tests/distributed/test_memory.py compares this with actual engines.

    Args:
        measured: the model.
        stage: ZeRO stage, 0 to 3.
        ranks: number of GPUs.
    """
    weights, gradients, moments = 4.0 * measured.parameters, 4.0 * measured.trained, 8.0 * measured.trained
    copy = 4.0 * measured.trained / ranks if stage >= 1 else 0.0
    gathered = 4.0 * min(measured.parameters, LIVE) if stage == 3 and ranks > 1 else 0.0
    return (
        weights / (ranks if stage == 3 else 1)
        + gathered
        + gradients / (ranks if stage >= 2 else 1)
        + (moments / ranks + copy + bucket_bytes(measured) if stage >= 1 else moments)
    )


def bucket_bytes(measured: Measured) -> float:
    """Returns the size of DeepSpeed's gradient bucket, which engines/deepspeed.py sets."""
    return 4.0 * min(measured.parameters, LARGEST_BUCKET)


def activation_bytes(measured: Measured, config: Config) -> float:
    """Returns the activation bytes of a micro-batch in the worst case, all segments of the longest length."""
    per_micro_batch = config.data.batch_seconds / config.data.micro_batches
    longest = min(config.data.max_seconds, per_micro_batch)
    return measured.kept_once + measured.activations.of(longest) * per_micro_batch / longest


def forecast(measured: Measured, config: Config, cluster: Cluster, gpus: int, mfu: float) -> StepForecast:
    """Forecasts a step. The audio per step is that of the recipe, for any number of GPUs.

    Args:
        measured: the model.
        config: the config of the run.
        cluster: type of GPU, and GPUs per node.
        gpus: number of GPUs.
        mfu: share of the GPUs' peak that is reached, 0 to 1.
    """
    gpu, longest = GPUS[cluster.kind], config.data.max_seconds
    peak = hardware.peak_tflops(gpu, config.engine.precision, config.engine.tf32)
    recompute = 1.0 if config.engine.activation_checkpointing == "full" else 0.0
    # the busiest rank's audio: the last round of a step may be empty on other ranks; more ranks need more micro-batches
    micro_batches = max(config.data.micro_batches, gpus)
    seconds_each = config.data.batch_seconds * accumulation(micro_batches, gpus) / micro_batches
    backward = BACKWARD * measured.differentiated.of(longest)
    forward = measured.flops.of(longest) + recompute * measured.differentiated.of(longest)
    flops = seconds_each / longest * (forward + backward)
    compute = flops / (peak * 1e12 * mfu)
    # ring: reduce-scatter and all-gather of fp32 gradients; ZeRO-3 gathers the weights for each pass as well
    passes = 3.0 if config.engine.zero_stage == 3 else 2.0
    sent = passes * 4.0 * measured.trained * (gpus - 1) / gpus
    link = gpu.inside if gpus <= cluster.gpus else gpu.between
    communication = sent / (link * 1e9)
    hidden = compute * backward / (forward + backward)
    exposed = max(0.0, communication - hidden)
    return StepForecast(
        gpus, seconds_each=seconds_each, compute=compute, communication=communication, exposed=exposed, sent=sent
    )


def measured_rate(path: Path, config: Config) -> float:
    """Returns the seconds of audio per second that a recipe reached on one device.

    Args:
        path: JSON file that benchmarks/gpu.sh or benchmarks/train_step.py wrote.
        config: the recipe; its name and precision choose the row.

    Raises:
        ConfigError: the file has no such row.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = found.get("recipes", found)["rows"]
        rates = {(row["model"], row["precision"]): float(row["audio_s_per_s"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"measured={path}: not the output of benchmarks/gpu.sh ({error})") from error
    for model in (f"ours {config.name}, whole run", f"ours {config.name}"):
        if rate := rates.get((model, config.engine.precision)):
            return rate
    known = ", ".join(f"{model.removeprefix('ours ')} {precision}" for model, precision in rates if "ours" in model)
    raise ConfigError(f"measured={path}: no row for {config.name} in {config.engine.precision}; it has {known}")


def step_flops(measured: Measured, seconds: float) -> float:
    """Returns the operations of forward and backward pass over one segment of `seconds`, without recomputation."""
    return measured.flops.of(seconds) + BACKWARD * measured.differentiated.of(seconds)


def utilisation(measured: Measured, config: Config, cluster: Cluster, rate: float) -> float:
    """Returns the share of a GPU's peak at `rate` seconds of audio per second, as `forecast` counts operations.

    Args:
        measured: operations of the model.
        config: the run; its `data.max_seconds` is the length of a segment.
        cluster: kind of GPU.
        rate: seconds of audio per second of one GPU.

    Raises:
        ConfigError: more than the peak, so that the rate is that of another device.
    """
    longest = config.data.max_seconds
    peak = hardware.peak_tflops(GPUS[cluster.kind], config.engine.precision, config.engine.tf32) * 1e12
    share = rate * step_flops(measured, longest) / longest / peak
    if share > 1:
        raise ConfigError(f"measured: {rate:,.0f} s of audio per second is more than a {cluster.kind} can reach")
    return share


def counts(largest: int) -> list[int]:
    """Returns 1, 2, 4 … up to `largest`."""
    return [1 << power for power in range(largest.bit_length())]


def assumptions(config: Config, cluster: Cluster, mfu: tuple[float, float]) -> dict[str, Any]:
    """Returns the assumptions of a forecast, by topic."""
    gpu, offload = GPUS[cluster.kind], config.engine.offload
    moved = (
        f"engine.offload={offload} moves Adam's states off the GPU; neither their memory nor their transfer is counted"
    )
    return {
        "MFU": f"{' to '.join(dict.fromkeys(f'{share:.0%}' for share in mfu))} of the peak; by default what published "
        "speech pretraining reaches on an H100, 9 to 11 %; perf/mfu of a run is your own",
        "GPU": f"{gpu.half:g} TFLOP/s in 16 bits, {gpu.tf32:g} tf32, {gpu.memory:g} GiB, {gpu.inside:g} GB/s inside a "
        f"node, {gpu.between:g} GB/s between nodes",
        "precision": f"{config.engine.precision}; weights, gradients, Adam in fp32: 16 bytes a parameter, with ZeRO 20",
        "overlap": "gradients are reduced behind the backward pass; data never waits",
        **({"offload": moved} if offload != "none" else {}),
        "memory": "without the allocator's slack and work space; leave a fifth free",
    }
