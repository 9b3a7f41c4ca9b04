"""Requests of the server and answers of devices: safetensors with a few text fields, checked before they are used.

Nothing in a message is executed. An answer is compared with the request and with the server's own tensors; one that
does not fit is refused with a reason and changes nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

Kind = Literal["counts", "gradient", "delta", "lacks"]
"""Kind of request and answer: targets of each task, sums of gradients, or changes of the weights by local steps.

A device that lacks the weights that do not learn answers `lacks`; they are then sent to it.
"""
UPDATE, SUM, COUNT, MODEL = "update/", "sum/", "count/", "model/"
"""Beginnings of the names of tensors."""
MAX_LACKS_BYTES = 2_000
"""Largest message that is read as one without the base."""
MAX_METRICS, MAX_METRIC_VALUES = 1_000, 70_000
"""Limits of an answer's metrics; histograms of codes have at most 65,535 values."""


class RefusedError(ValueError):
    """A message that does not fit; the text is the reason."""


@dataclass(frozen=True, kw_only=True)
class RoundRequest:
    """A request of the server to every device that takes part in a round."""

    run: str
    """Identifies the run and its start."""
    kind: Kind
    step: int
    """Number of the round, from 0: it keys the draws and chooses the audio."""
    attempt: int
    seed: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Weights and buffers as `model/NAME`; empty where only counts are asked for.

    Without those that do not learn where `base` was sent before.
    """
    base: str = ""
    """Digest of the weights and buffers that do not learn."""
    counts_K: Tensor | None = None
    """gradient: targets of each task over all devices, by which the loss is divided."""
    local_steps: int = 1
    device_lr: float = 0.0
    proximal: float = 0.0
    """delta: FedProx's μ."""
    clip: float = 0.0
    """Above 0: norm to which the device clips its update, which it sends as a vector for secure aggregation."""

    def answer(
        self,
        device: str,
        counts_K: Tensor,
        *,
        loss: float = 0.0,
        update: Mapping[str, Tensor] | None = None,
        totals: Mapping[str, list[Tensor]] | None = None,
    ) -> Answer:
        """Returns a device's answer to this request.

        Args:
            device: its name.
            counts_K: targets of each task.
            loss: sum of the losses over the targets.
            update: gradient or change of each trained parameter, fp32.
            totals: sum and count of each metric.
        """
        return Answer(
            run=self.run,
            kind=self.kind,
            step=self.step,
            attempt=self.attempt,
            device=device,
            counts_K=counts_K,
            loss=loss,
            update=update or {},
            totals=totals or {},
        )

    def lacks(self, device: str) -> Answer:
        """Returns the answer of a device that has no weights with the digest `base`."""
        return replace(self.answer(device, torch.zeros(0, dtype=torch.float64)), kind="lacks")

    def encoded(self) -> bytes:
        """Returns the message."""
        tensors = dict(self.tensors)
        if self.counts_K is not None:
            tensors["counts_K"] = self.counts_K
        fields = {
            "run": self.run, "kind": self.kind, "step": self.step, "attempt": self.attempt, "seed": self.seed,
            "base": self.base, "local_steps": self.local_steps, "device_lr": self.device_lr, "proximal": self.proximal,
            "clip": self.clip,
        }  # fmt: skip
        return encode(tensors, fields)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Answer of a device. Losses and metrics are sums and counts."""

    run: str
    kind: Kind
    step: int
    attempt: int
    device: str
    counts_K: Tensor
    """Targets of each task, float64."""
    loss: float = 0.0
    update: Mapping[str, Tensor] = field(default_factory=dict)
    """Gradient or change of each trained parameter, fp32."""
    totals: Mapping[str, list[Tensor]] = field(default_factory=dict)
    """Metric -> its sum and count, float64."""

    def encoded(self) -> bytes:
        """Returns the message."""
        tensors = {UPDATE + name: tensor for name, tensor in self.update.items()}
        for name, (total, count) in self.totals.items():
            # copies: metrics may share a count, which safetensors refuses
            tensors[SUM + name] = total.double().reshape(-1).clone()
            tensors[COUNT + name] = count.double().reshape(()).clone()
        tensors |= {"counts_K": self.counts_K.double(), "loss": torch.tensor(self.loss, dtype=torch.float64)}
        fields = {
            "run": self.run, "kind": self.kind, "step": self.step, "attempt": self.attempt, "device": self.device,
        }  # fmt: skip
        return encode(tensors, fields)


def encode(tensors: Mapping[str, Tensor], fields: Mapping[str, object]) -> bytes:
    """Returns tensors and text fields as safetensors."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(plain, {name: str(value) for name, value in fields.items()})


def decode(message: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and text fields of a message.

    Raises:
        RefusedError: it is not safetensors.
    """
    try:
        tensors = load(message)
        length = int.from_bytes(message[:8], "little")
        fields = json.loads(message[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise RefusedError(f"not a message in safetensors ({str(error)[:80]})") from error
    return tensors, fields


def read_request(message: bytes) -> RoundRequest:
    """Decodes a request.

    Raises:
        RefusedError: it is not one.
    """
    tensors, fields = decode(message)
    try:
        kind = fields["kind"]
        if kind not in ("counts", "gradient", "delta"):
            raise RefusedError(f"asks for {kind[:40]!r}, which is not known")
        return RoundRequest(
            run=fields["run"],
            kind=kind,  # type: ignore[arg-type]
            step=int(fields["step"]),
            attempt=int(fields["attempt"]),
            seed=int(fields["seed"]),
            counts_K=tensors.pop("counts_K", None),
            tensors=tensors,
            base=fields["base"],
            local_steps=int(fields["local_steps"]),
            device_lr=float(fields["device_lr"]),
            proximal=float(fields["proximal"]),
            clip=float(fields["clip"]),
        )
    except (KeyError, ValueError) as error:
        raise RefusedError(f"not a request ({error})") from error


@dataclass(frozen=True)
class Schema:
    """Names, shapes and limits by which answers are checked."""

    shapes: Mapping[str, torch.Size]
    """Of the trained parameters."""
    tasks: int
    max_norm: float
    """Largest norm of a device's update: of the gradient per target, or of the change of the weights."""

    @property
    def max_bytes(self) -> int:
        """Largest message that is read."""
        values = sum(shape.numel() for shape in self.shapes.values())
        return 2 * 4 * values + 2**23

    def lacks_base(self, message: bytes, sender: str, request: RoundRequest) -> bool:
        """Returns whether a message says that a device lacks the weights that do not learn."""
        if len(message) > MAX_LACKS_BYTES:
            return False
        try:
            return decode(message)[1] == decode(request.lacks(sender).encoded())[1]
        except RefusedError:
            return False

    def read(self, message: bytes, sender: str, request: RoundRequest) -> Answer:
        """Decodes and checks an answer.

        Args:
            message: the received bytes.
            sender: the device that the transport received it from.
            request: what was asked.

        Returns:
            The answer; every value in it is finite.

        Raises:
            RefusedError: it does not fit; the text is the reason.
        """
        if len(message) > self.max_bytes:
            raise RefusedError(f"{len(message)} bytes, and at most {self.max_bytes} were expected")
        tensors, fields = decode(message)
        for name, wanted in (("run", request.run), ("kind", request.kind), ("device", sender)):
            if fields.get(name) != wanted:
                raise RefusedError(f"{name} is {str(fields.get(name))[:40]!r}, and {wanted!r} was asked for")
        for name, number in (("step", request.step), ("attempt", request.attempt)):
            if fields.get(name) != str(number):
                raise RefusedError(f"late: it answers {name} {str(fields.get(name))[:20]}, and this is {name} {number}")
        counts_K, loss = self._counts(tensors), self._scalar(tensors, "loss")
        update = self._update(tensors, request.kind)
        totals = _totals(tensors)
        if unknown := sorted(tensors):
            raise RefusedError(f"has a tensor {unknown[0][:60]!r} that is not part of an answer")
        self._limit(update, counts_K, request)
        return request.answer(sender, counts_K, loss=loss, update=update, totals=totals)

    def _counts(self, tensors: dict[str, Tensor]) -> Tensor:
        counts_K = _take(tensors, "counts_K", torch.Size([self.tasks]), torch.float64)
        if bool((counts_K < 0).any()):
            raise RefusedError(f"negative counts of targets: {counts_K.tolist()}")
        return counts_K

    def _scalar(self, tensors: dict[str, Tensor], name: str) -> float:
        return float(_take(tensors, name, torch.Size([]), torch.float64))

    def _update(self, tensors: dict[str, Tensor], kind: Kind) -> dict[str, Tensor]:
        shapes = {} if kind == "counts" else self.shapes
        return {name: _take(tensors, UPDATE + name, shape, torch.float32) for name, shape in shapes.items()}

    def _limit(self, update: Mapping[str, Tensor], counts_K: Tensor, request: RoundRequest) -> None:
        norm = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in update.values()))
        if request.kind == "gradient" and request.counts_K is not None:
            norm *= float(request.counts_K.sum()) / max(1.0, float(counts_K.sum()))
        if not norm <= self.max_norm:
            raise RefusedError(f"its update has norm {norm:.3g}, and engine.federated.max_norm={self.max_norm:g}")


def _totals(tensors: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    names = sorted(name.removeprefix(SUM) for name in tensors if name.startswith(SUM))
    if len(names) > MAX_METRICS:
        raise RefusedError(f"{len(names)} metrics, and at most {MAX_METRICS} are read")
    totals = {}
    for name in names:
        total = _finite(tensors.pop(SUM + name), SUM + name)
        if total.dim() != 1 or total.dtype != torch.float64 or total.numel() > MAX_METRIC_VALUES:
            raise RefusedError(f"{SUM}{name[:60]} has shape {list(total.shape)} and type {total.dtype}")
        totals[name] = [total, _take(tensors, COUNT + name, torch.Size([]), torch.float64)]
    return totals


def _take(tensors: dict[str, Tensor], name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Removes a tensor from a message and returns it, after checks of shape, type and values."""
    tensor = tensors.pop(name, None)
    if tensor is None:
        raise RefusedError(f"lacks {name}")
    if tensor.shape != shape or tensor.dtype != dtype:
        raise RefusedError(
            f"{name} has shape {list(tensor.shape)} and type {tensor.dtype}, and {list(shape)} and {dtype} were asked "
            "for"
        )
    return _finite(tensor, name)


def _finite(tensor: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise RefusedError(f"{name} has values that are not finite")
    return tensor
