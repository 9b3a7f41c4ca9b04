"""What a run would cost on a cluster: memory, communication and time, from a few seconds' forward pass on this CPU.

Measured here, on the real model: parameters, multiplications and saved activations of a forward pass at two lengths.
Both are polynomials a·t + b·t² in the length t of a segment (everything but attention is linear). Assumed: the GPU's
peak and links from its data sheet, the share of the peak that is reached (MFU), and that gradients are reduced behind
the backward pass. The assumptions are printed with the result.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.core.schema import ConfigError, suggest
from data_pipeline.core.types import SAMPLE_RATE, Batch
from pretrain.config import Config
from pretrain.interfaces.frames import StepContext
from pretrain.train_module import TrainModule, build_model

GIB = 1 << 30
BACKWARD = 2.0
"""Operations of the backward pass per one of the forward pass."""
LARGEST_BUCKET = 50_000_000
"""Numbers; as engines/deepspeed.py sets it."""
LIVE = 1_000_000_000
"""Weights that ZeRO-3 leaves whole between their uses: DeepSpeed's stage3_max_live_parameters."""


@dataclass(frozen=True)
class Gpu:
    """From data sheets: dense TFLOP/s, GiB, and GB/s a GPU sends inside its node and between nodes."""

    half: float
    """In 16 bits, fp16 as well as bf16."""
    tf32: float
    fp32: float
    memory: float
    inside: float
    between: float


GPUS = {
    "V100": Gpu(125, 15.7, 15.7, 32, 150, 12.5),
    "A100": Gpu(312, 156, 19.5, 80, 300, 25),
    "L40S": Gpu(362, 183, 91.6, 48, 32, 12.5),
    "H100": Gpu(989, 494, 67, 80, 450, 50),
    "H200": Gpu(989, 494, 67, 141, 450, 50),
    "B200": Gpu(2250, 1125, 75, 180, 900, 50),
    "MI300X": Gpu(1307, 654, 163, 192, 448, 50),
}


@dataclass(frozen=True)
class Cluster:
    """nodes x gpus x kind, e.g. 8x8xH100."""

    nodes: int
    gpus: int
    kind: str

    @property
    def size(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Cost:
    """A quantity of one segment of t seconds: linear * t + quadratic * t²."""

    linear: float
    quadratic: float

    def of(self, seconds: float) -> float:
        """At `seconds`."""
        return self.linear * seconds + self.quadratic * seconds**2


@dataclass(frozen=True)
class Measured:
    """One model: parameters, forward operations per segment, bytes kept for the backward pass per segment and once."""

    parameters: int
    trained: int
    flops: Cost
    activations: Cost
    kept_once: float = 0.0
    """However many segments there are: weights cast to 16 bits, for one."""


@dataclass(frozen=True)
class Forecast:
    """One optimizer step on n GPUs. Bytes and seconds are per GPU and step."""

    gpus: int
    seconds_each: float
    """Audio per GPU and step."""
    compute: float
    communication: float
    exposed: float
    """Communication that the backward pass does not hide."""
    sent: float

    @property
    def step(self) -> float:
        """Seconds per optimizer step."""
        return self.compute + self.exposed


def parse_cluster(text: str) -> Cluster:
    """Raises ConfigError naming the form and the known GPUs."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\w+)", text)
    kind = found[3].upper() if found else ""
    if not found or kind not in GPUS or not int(found[1]) * int(found[2]):
        near = suggest(kind, GPUS)
        hint = f"did you mean {near}? " if near else ""
        raise ConfigError(f"cluster={text}: write NODESxGPUSxKIND, as in 8x8xH100; {hint}known: {', '.join(GPUS)}")
    return Cluster(int(found[1]), int(found[2]), kind)


def measure(config: Config, lengths: tuple[float, float] = (2.0, 4.0)) -> Measured:
    """Runs the model's forward pass on this machine's CPU at two lengths, in the config's precision."""
    module = build_model(config)
    if module.model.encoder.activation_checkpointing == "selective":
        module.model.encoder.activation_checkpointing = "none"  # the hooks do not see what it keeps: an upper bound
    shorter, longer = (_forward(module, config, seconds) for seconds in lengths)
    once = max(0.0, 2 * shorter[1] - _forward(module, config, lengths[0], segments=2)[1])
    parameters = list(module.parameters())
    return Measured(
        sum(parameter.numel() for parameter in parameters),
        sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        _fit(lengths, (shorter[0], longer[0])),
        _fit(lengths, (shorter[1] - once, longer[1] - once)),
        once,
    )


def _fit(lengths: tuple[float, float], values: tuple[float, float]) -> Cost:
    """The polynomial through both points and the origin."""
    (s, t), (u, v) = lengths, values
    quadratic = max(0.0, (v / t - u / s) / (t - s))
    return Cost(v / t - quadratic * t, quadratic)


def _forward(module: TrainModule, config: Config, seconds: float, segments: int = 1) -> tuple[float, float]:
    """Operations and saved bytes of a forward pass over segments of noise."""
    samples = int(seconds * SAMPLE_RATE)
    keys = tuple(f"noise {number}" for number in range(segments))
    targets = {}
    if name := getattr(config.objective, "labels", ""):
        targets[name] = torch.zeros(segments, round(seconds * config.objective.label_rate_hz), dtype=torch.int64)
    batch = Batch(0.1 * torch.randn(segments, samples), torch.full((segments,), samples), keys, 0, targets)
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    context = StepContext(0, 0)
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        plan = module.prepare(batch, context)
        loss, _ = module(batch, plan, plan.counts_K, context)
    del loss
    return float(counter.get_total_flops()), float(sum(kept.values()))


def state_bytes(measured: Measured, stage: int, ranks: int) -> float:
    """fp32 weights (4 bytes), gradients (4) and Adam's two moments (8) of one GPU under a ZeRO stage.

    From stage 1 on DeepSpeed updates a partitioned copy of the weights (4) and sums gradients in a bucket, which lives
    during the backward pass; ZeRO-3 gathers weights, and keeps up to LIVE of them between the
    passes. Compared with what real engines hold in tests/distributed/test_memory.py.
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
    """DeepSpeed's gradient bucket, whose size engines/deepspeed.py sets."""
    return 4.0 * min(measured.parameters, LARGEST_BUCKET)


def activation_bytes(measured: Measured, config: Config) -> float:
    """Of one micro-batch whose segments all have the longest length, the worst case."""
    per_micro_batch = config.data.batch_seconds / config.data.micro_batches
    longest = min(config.data.max_seconds, per_micro_batch)
    return measured.kept_once + measured.activations.of(longest) * per_micro_batch / longest


def forecast(measured: Measured, config: Config, cluster: Cluster, gpus: int, mfu: float) -> Forecast:
    """One step on `gpus` GPUs of the cluster's kind. The audio per step is the recipe's, whatever their number."""
    gpu, longest = GPUS[cluster.kind], config.data.max_seconds
    peak = gpu.half if config.engine.precision != "fp32" else gpu.tf32 if config.engine.tf32 else gpu.fp32
    recompute = 1.0 if config.engine.activation_checkpointing == "full" else 0.0
    segments = config.data.batch_seconds / longest
    flops = segments * measured.flops.of(longest) * (1.0 + BACKWARD + recompute)
    compute = flops / gpus / (peak * 1e12 * mfu)
    # ring: reduce-scatter and all-gather of fp32 gradients; ZeRO-3 gathers the weights for each pass as well
    passes = 3.0 if config.engine.zero_stage == 3 else 2.0
    sent = passes * 4.0 * measured.trained * (gpus - 1) / gpus
    link = gpu.inside if gpus <= cluster.gpus else gpu.between
    communication = sent / (link * 1e9)
    hidden = compute * BACKWARD / (1.0 + BACKWARD + recompute)
    exposed = max(0.0, communication - hidden)
    return Forecast(gpus, config.data.batch_seconds / gpus, compute, communication, exposed, sent)


def counts(largest: int) -> list[int]:
    """1, 2, 4 … up to `largest`."""
    return [1 << power for power in range(largest.bit_length())]


def assumptions(config: Config, cluster: Cluster, mfu: float) -> dict[str, Any]:
    """What the forecast takes for granted."""
    gpu, offload = GPUS[cluster.kind], config.engine.offload
    moved = f"engine.offload={offload} moves Adam's states off the GPU; neither the room nor the time of it is counted"
    return {
        "MFU": f"{mfu:.0%} of the peak; unless told 30 %, a guess at a well-fed transformer: published speech "
        "pretraining reaches 9 to 11 % on an H100 (mfu=0.1), and perf/mfu of a run is your own",
        "GPU": f"{gpu.half:g} TFLOP/s in 16 bits, {gpu.tf32:g} tf32, {gpu.memory:g} GiB, {gpu.inside:g} GB/s inside a "
        f"node, {gpu.between:g} GB/s between nodes",
        "precision": f"{config.engine.precision}; weights, gradients, Adam in fp32: 16 bytes a parameter, with ZeRO 20",
        "overlap": "gradients are reduced behind the backward pass; data never waits",
        **({"offload": moved} if offload != "none" else {}),
        "memory": "without the allocator's slack and work space; leave a fifth free",
    }
