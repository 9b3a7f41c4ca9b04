"""A device of a federated run: it computes on its own audio and answers the server's requests.

An answer depends on the request and on the device's audio alone, so a device that was killed and started again gives
the same answer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.core.rng import keyed_seed
from data_pipeline.core.schema import load
from data_pipeline.core.types import Batch, Cursor, Step, StepReader
from pretrain.config import Config
from pretrain.engines.base import add_sums, fitting
from pretrain.engines.distributed import DistributedContext
from pretrain.engines.plain_torch import TorchEngine
from pretrain.federated.base_weights import HeldBase
from pretrain.federated.config import DeviceConfig
from pretrain.federated.messages import MODEL, Answer, RoundRequest, read_request
from pretrain.federated.secure import packed
from pretrain.interfaces.frames import StepContext
from pretrain.train_module import TrainPlan, build_model, open_run_reader


class DeviceAudio:
    """Gives the micro-batches of any step of a device's own plan.

    Args:
        reader: of the device's shards.
        cursor_of: returns the position of a step, counted over epochs.
        first_micro_batch: added to the numbers of micro-batches, which key dropout.
    """

    def __init__(self, reader: StepReader, cursor_of: Callable[[int], Cursor], first_micro_batch: int = 0) -> None:
        self._reader, self._cursor_of, self._first = reader, cursor_of, first_micro_batch
        self._steps: Iterator[Step] = iter(())
        self._next = -1

    def step(self, number: int) -> list[Batch]:
        """Returns the micro-batches of a step."""
        if number != self._next:
            self._steps = self._reader.steps(self._cursor_of(number))
        self._next = number + 1
        batches = next(self._steps).batches
        return [replace(batch, micro_batch=batch.micro_batch + self._first) for batch in batches]

    def close(self) -> None:
        """Stops the reader."""
        self._reader.close()


class DeviceEngine(TorchEngine):
    """Computes a device's part of a round with the passes of the plain torch engine."""

    def answer(self, message: bytes, device: str, audio: DeviceAudio) -> bytes:
        """Answers one request of the server.

        Args:
            message: an encoded `RoundRequest`.
            device: this device's name.
            audio: its audio.

        Returns:
            An encoded `Answer`, or the vector of `pretrain.federated.secure.packed` where the request has `clip`.

        Raises:
            RefusedError: it is not a request.
            KeyError, ValueError: its weights are not those of this model.
        """
        request = read_request(message)
        self.module.train()
        if not self._load(request):
            return request.lacks(device).encoded()
        makers = {"counts": self._counts, "gradient": self._gradient, "delta": self._delta}
        make = makers[request.kind]
        found = make(request, device, audio)
        return packed(found, request.clip) if request.clip else found.encoded()

    @functools.cached_property
    def _base(self) -> HeldBase:
        return HeldBase()

    @torch.no_grad()
    def _load(self, request: RoundRequest) -> bool:
        """Copies the server's weights and buffers into the model; a request for counts has none.

        Returns:
            Whether all are there; those that do not learn may be held from an earlier request.
        """
        if not request.tensors:
            return True
        state = self.module.state_dict(keep_vars=True)
        learned = {name for name, _ in self._trained()}
        tensors = self._base.complete(request.tensors, request.base, state.keys(), learned)
        if tensors is None:
            return False
        for name, tensor in state.items():
            tensor.data.copy_(fitting(tensors, MODEL + name, tensor.shape))
        self.module.forget()  # what a fit remembers of earlier weights
        return True

    def _plans(
        self, request: RoundRequest, audio: DeviceAudio, number: int
    ) -> tuple[list[Batch], list[TrainPlan], Tensor]:
        batches = [batch.to(self.world.device) for batch in audio.step(number)]
        plans = [self.module.prepare(batch, _context(request, number)) for batch in batches]
        return batches, plans, torch.stack([plan.counts_K for plan in plans]).sum(0)

    def _counts(self, request: RoundRequest, device: str, audio: DeviceAudio) -> Answer:
        counts_K = self._plans(request, audio, request.step)[2]
        return request.answer(device, counts_K)

    def _gradient(self, request: RoundRequest, device: str, audio: DeviceAudio) -> Answer:
        """Sums the gradients of this device's micro-batches of the round (FedSGD, arXiv 1602.05629, §2)."""
        assert request.counts_K is not None
        batches, plans, counts_K = self._plans(request, audio, request.step)
        loss, totals = self._accumulate(batches, plans, request.counts_K, _context(request, request.step))
        update = {name: _gradient_of(parameter) for name, parameter in self._trained()}
        self.optimizer.zero_grad()
        return request.answer(device, counts_K, loss=float(loss), update=update, totals=totals)

    def _delta(self, request: RoundRequest, device: str, audio: DeviceAudio) -> Answer:
        """Takes local steps of gradient descent and returns the change of the weights.

        FedAvg (arXiv 1602.05629, algorithm 1), with FedProx's proximal term (arXiv 1812.06127, eq. 2) where
        `proximal` is above 0.
        """
        before = {name: parameter.detach().clone() for name, parameter in self._trained()}
        counts_K = torch.zeros(len(self.module.tasks), dtype=torch.float64)
        totals: dict[str, list[Tensor]] = {}
        loss = 0.0
        for number in range(request.step * request.local_steps, (request.step + 1) * request.local_steps):
            batches, plans, local_K = self._plans(request, audio, number)
            local, found = self._accumulate(batches, plans, local_K, _context(request, number))
            loss, counts_K = loss + float(local) / request.local_steps, counts_K + local_K
            add_sums(totals, found)
            self._descend(request, before)
        update = {name: parameter.detach() - before[name] for name, parameter in self._trained()}
        return request.answer(device, counts_K, loss=loss, update=update, totals=totals)

    @torch.no_grad()
    def _descend(self, request: RoundRequest, before: dict[str, Tensor]) -> None:
        """Takes one step of gradient descent; clips the gradient as the run does."""
        pairs = [(name, parameter, _gradient_of(parameter)) for name, parameter in self._trained()]
        gradients = [gradient for _, _, gradient in pairs]
        limit = self.optimizer_config.clip_norm
        norm = float(torch.nn.utils.get_total_norm(gradients))
        scale = min(1.0, limit / (norm + 1e-6)) if limit and math.isfinite(norm) else 1.0
        for name, parameter, gradient in pairs:
            drift = request.proximal * (parameter - before[name])
            parameter.sub_(request.device_lr * (scale * gradient + drift))
        self.optimizer.zero_grad()

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.module.named_parameters() if parameter.requires_grad]


def _context(request: RoundRequest, number: int) -> StepContext:
    """Returns the keys of the draws: those of the round, and others in each further local step."""
    local = number - request.step * request.local_steps if request.kind == "delta" else 0
    return StepContext(keyed_seed(request.seed, local, "local step") if local else request.seed, request.step)


def _gradient_of(parameter: torch.nn.Parameter) -> Tensor:
    """Returns a parameter's gradient; zeros where layer drop left it out."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()


def device_config(values: Mapping[str, Any], own: DeviceConfig) -> Config:
    """Returns the config with which a device computes: the run's, with its own audio and its share of an update.

    Args:
        values: the run's config, as the server sent it.
        own: the device's.

    Raises:
        ConfigError: it is not a config of this version.
    """
    config = load(Config, values)
    devices = config.engine.federated.per_round
    data = replace(
        config.data,
        shards=(own.shards,),
        valid=(),
        valid_targets={},
        targets=own.targets,
        reader="plan",
        workers=own.workers,
        batch_seconds=config.data.batch_seconds / devices,
        micro_batches=max(1, config.data.micro_batches // devices),
    )
    return replace(config, data=data, device=own.device)


def device_engine(values: Mapping[str, Any], device: str) -> DeviceEngine:
    """Returns the engine of a run's devices, which several devices of one process can share.

    Args:
        values: the run's config.
        device: auto, cpu or cuda.

    Raises:
        ConfigError: it is not a config of this version.
    """
    config = load(Config, values)
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    world = DistributedContext(device="cuda:0" if on_gpu else "cpu")
    return DeviceEngine(build_model(config), config.engine, config.optimizer, world)


class Device:
    """A device of one run: model, audio and name.

    Args:
        values: the run's config, as the server sent it.
        own: the device's.
        engine: of another device of the run in this process; none: its own.

    Raises:
        ConfigError: config and audio do not fit.
        ValueError: shards are damaged.
    """

    def __init__(self, values: Mapping[str, Any], own: DeviceConfig, engine: DeviceEngine | None = None) -> None:
        config = device_config(values, own)
        self.name = own.name or Path(own.shards).name
        reader = open_run_reader(config)
        layouts = functools.lru_cache(maxsize=None)(lambda epoch: reader.plan.layout(epoch).steps)

        def cursor(number: int) -> Cursor:
            epoch = 0
            while number >= layouts(epoch):
                number, epoch = number - layouts(epoch), epoch + 1
            return Cursor(reader.plan_hash, epoch, number)

        first = (keyed_seed(self.name, "device") % 2**20) * config.data.micro_batches
        self.audio = DeviceAudio(reader, cursor, first)
        self.engine = engine or device_engine(values, own.device)

    def answer(self, message: bytes) -> bytes:
        """Answers a request, see `DeviceEngine.answer`."""
        return self.engine.answer(message, self.name, self.audio)

    def close(self) -> None:
        """Stops the reader."""
        self.audio.close()
