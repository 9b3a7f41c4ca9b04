"""The engine of a federated run: an update is a round, in which devices compute on audio that never leaves them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from data_pipeline.core.rng import keyed_seed
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import Batch, Cursor, Step
from pretrain.config import Config
from pretrain.engines.base import add_sums
from pretrain.engines.distributed import DistributedContext
from pretrain.engines.plain_torch import TorchEngine
from pretrain.federated.base_weights import BaseDigest, SentBase, split
from pretrain.federated.messages import Answer, Kind, RefusedError, RoundRequest, Schema
from pretrain.federated.privacy import Privacy, Spent, ledger
from pretrain.federated.private_objectives import require_private
from pretrain.federated.transport import Devices, Reply
from pretrain.interfaces.engine_configs import FederatedConfig
from pretrain.interfaces.frames import StepContext
from pretrain.train_module import TrainModule, TrainPlan

ABSENT = "no answer"
"""Why a device is left out that did not answer in time."""
POLL_SECONDS = 0.2


class TooFewDevicesError(RuntimeError):
    """Fewer devices than `engine.federated.min_devices` are connected, or answered."""


class FederatedEngine(TorchEngine):
    """Asks devices for sums of gradients, or for changes of weights, and updates with them.

    The sums are added in the order of the devices' names, so that the same answers give the same bits.

    Args:
        module: model and objective; the server computes nothing on audio but the loss of `data.valid`.
        config: the run's config.
        world: one rank.
        devices: connects to the devices.
        run: identifies the run and its start; answers to another one are refused.
        secret: keys noise and samples of a run with `noise`.
        note: receives round, device and reason for each answer that is left out.
    """

    def __init__(
        self,
        module: TrainModule,
        config: Config,
        world: DistributedContext,
        devices: Devices,
        *,
        run: str,
        secret: str = "",
        note: Callable[[int, str, str], None] = lambda step, device, reason: None,
    ) -> None:
        super().__init__(module, config.engine, config.optimizer, world)
        self.settings: FederatedConfig = config.engine.federated
        self._devices, self._run, self._note = devices, run, note
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        shapes = {name: parameter.shape for name, parameter in self._trained.items()}
        self._schema = Schema(shapes, len(module.tasks), self.settings.max_norm)
        self._seen: set[str] = set()
        self._sent, self._digest = SentBase(), BaseDigest()
        self._privacy = Privacy(self.settings, secret) if self.settings.noise else None
        self._spent: Spent = ()
        self._rounds = config.train.steps
        if self._privacy is not None:
            self._privacy.epsilon(self._privacy.with_rounds((), 1))  # refuses at once where there is no accountant

    def memory(self) -> dict[str, Any]:
        """Returns the ledger of privacy: noise multiplier, sampling rate and number of rounds."""
        return {"privacy": [list(row) for row in self._spent]} if self._spent else {}

    def remember(self, memory: Mapping[str, Any]) -> None:
        self._spent = ledger(memory.get("privacy", []))

    def load_tensors(self, tensors: Mapping[str, Tensor], step: int) -> None:
        super().load_tensors(tensors, step)
        self._digest.forget()

    @property
    def kind(self) -> Kind:
        """The kind of answer that devices are asked for."""
        return "gradient" if self.settings.rule == "gradient" else "delta"

    def _prepare(self, batches: Sequence[Batch], ctx: StepContext) -> tuple[list[TrainPlan], Tensor]:
        """Checks that nothing but sums is needed of the devices; targets are counted there."""
        require_private(self.module)
        if self._privacy is not None:
            self._require_budget(self._privacy, self._rounds - ctx.step)
        return [], torch.zeros(len(self.module.tasks), dtype=torch.float64)

    def _accumulate(
        self, batches: Sequence[Batch], plans: Sequence[object], counts_K: Tensor, ctx: StepContext
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Runs one round; leaves the gradient, or the negative change of the weights, in the parameters."""
        start, exchange = time.monotonic(), Exchanged()
        devices, loss, totals = self._exchange(ctx, exchange)
        self.module.forget()
        figures: dict[str, float] = {
            "asked": exchange.asked,
            "devices": devices,
            "left_out": exchange.left_out,
            "attempts": exchange.attempts,
            "bytes_sent": exchange.sent,
            "bytes_received": exchange.received,
            "round_seconds": time.monotonic() - start,
        }
        if self._privacy is not None:
            self._spent = self._privacy.with_rounds(self._spent, 1)
            figures["epsilon"] = self._privacy.epsilon(self._spent)
        one = torch.ones((), dtype=torch.float64)
        totals |= {f"federated/{name}": [torch.tensor([float(v)]).double(), one] for name, v in figures.items()}
        return loss, totals

    def _exchange(self, ctx: StepContext, exchange: Exchanged) -> tuple[int, Tensor, dict[str, list[Tensor]]]:
        """Leaves the update in the gradients; returns the number of devices, the loss, and sums of metrics."""
        answers = self._round(ctx, exchange)
        return len(answers), *self._combine(answers, ctx)

    def _require_budget(self, privacy: Privacy, rounds: int) -> None:
        """Refuses rounds beyond the budget before the first of them."""
        allowed = privacy.affordable(self._spent, rounds)
        if allowed < rounds:
            done = self._rounds - rounds
            raise ConfigError(
                f"engine.federated.epsilon={self.settings.epsilon:g}: {rounds} further rounds would spend ε = "
                f"{privacy.epsilon(privacy.with_rounds(self._spent, rounds)):.2f} at δ = {self.settings.delta:g}, of "
                f"which {privacy.epsilon(self._spent):.2f} are spent; set train.steps={done + allowed}, or raise "
                "engine.federated.noise or engine.federated.devices"
            )

    def _round(self, ctx: StepContext, exchange: Exchanged) -> list[Answer]:
        """Asks until enough devices answered.

        With several tasks the targets of each are counted first, since the loss of each is divided by its own count;
        a device that counted and then does not answer starts the round again without it.
        """
        several = self._counted_first
        counts_K = torch.ones(len(self.module.tasks), dtype=torch.float64)
        answers: list[Answer] = []
        drawn: list[str] = []
        for attempt in range(self.settings.attempts):
            exchange.attempts += 1
            drawn = self._draw(ctx, attempt) if not (several and answers) else sorted(a.device for a in answers)
            asked = drawn
            if several:
                counted = self._ask("counts", ctx, attempt, asked, exchange)
                asked = [answer.device for answer in counted]
                if len(asked) < self.settings.min_devices:
                    continue
                counts_K = torch.stack([answer.counts_K for answer in counted]).sum(0)
            answers = self._ask(self.kind, ctx, attempt, asked, exchange, counts_K)
            enough = len(answers) >= self.settings.min_devices
            if enough and (not several or len(answers) == len(asked)):
                return answers
            answers = answers if enough else []
        raise self._too_few(ctx, drawn)

    def _too_few(self, ctx: StepContext, drawn: Sequence[str]) -> TooFewDevicesError:
        return TooFewDevicesError(
            f"engine.federated.min_devices={self.settings.min_devices}: fewer devices answered round {ctx.step} in "
            f"{self.settings.attempts} attempts of {self.settings.answer_seconds:g} s; asked last: {_listed(drawn)}; "
            "start more devices (auricle device), raise engine.federated.answer_seconds, or lower min_devices"
        )

    def _draw(self, ctx: StepContext, attempt: int) -> list[str]:
        """Returns the devices of a round, sorted: a draw keyed by (seed, round, attempt) among the connected ones."""
        present = self._wait_for_devices()
        if self._privacy is not None:
            return self._privacy.sample(present, ctx.step, attempt)
        order = sorted(present, key=lambda name: (keyed_seed(ctx.seed, ctx.step, attempt, name, "device"), name))
        return sorted(order[: self.settings.per_round])

    def _wait_for_devices(self) -> list[str]:
        self.on_phase("devices")
        deadline = time.monotonic() + self.settings.wait_seconds
        while True:
            present = list(self._devices.present())
            self._seen.update(present)
            if len(present) >= self.settings.min_devices:
                return present
            if time.monotonic() > deadline:
                gone = sorted(self._seen - set(present))
                raise TooFewDevicesError(
                    f"engine.federated.min_devices={self.settings.min_devices}: {len(present)} are connected after "
                    f"{self.settings.wait_seconds:g} s ({_listed(present)}); missing since they were last seen: "
                    f"{_listed(gone)}; start devices (auricle device), or lower min_devices"
                )
            time.sleep(POLL_SECONDS)

    def _request(
        self, kind: Kind, ctx: StepContext, attempt: int, counts_K: Tensor | None, clip: float = 0.0
    ) -> tuple[RoundRequest, dict[str, Tensor]]:
        """Returns a request with all weights, and those that learn."""
        settings = self.settings
        learned, rest = split({} if kind == "counts" else self.module.state_dict(), self._trained)
        request = RoundRequest(
            run=self._run,
            kind=kind,
            step=ctx.step,
            attempt=attempt,
            seed=ctx.seed,
            tensors={**learned, **rest},
            base=self._digest.of(rest) if rest else "",
            counts_K=counts_K if kind == "gradient" else None,
            local_steps=settings.local_steps,
            device_lr=settings.device_lr,
            proximal=settings.proximal if settings.rule == "fedprox" else 0.0,
            clip=clip,
        )
        return request, learned

    def _ask(
        self,
        kind: Kind,
        ctx: StepContext,
        attempt: int,
        names: Sequence[str],
        exchange: Exchanged,
        counts_K: Tensor | None = None,
    ) -> list[Answer]:
        """Sends a request to devices and returns the answers that fit, in the order of their names."""
        self.on_phase("devices")
        request, learned = self._request(kind, ctx, attempt, counts_K)
        exchange.asked += len(names)
        found: dict[str, Answer] = {}
        refused: dict[str, str] = {}
        for reply in self._replies(names, request, learned, exchange):
            try:
                answer = self._read(reply.device, reply.message, reply.error, names, request)
            except RefusedError as error:
                refused.setdefault(reply.device, str(error))
                continue
            if reply.device in found:
                self._note(ctx.step, reply.device, "answered twice; its first answer counts")
                continue
            found[reply.device] = answer
        self._refuse_other_metrics(found, refused)
        for name in sorted({*names, *refused} - set(found)):
            exchange.left_out += 1
            self._note(ctx.step, name, refused.get(name, ABSENT))
        return [found[name] for name in sorted(found)]

    def _replies(
        self, names: Sequence[str], request: RoundRequest, learned: Mapping[str, Tensor], exchange: Exchanged
    ) -> Iterator[Reply]:
        """Sends a request and yields replies; weights that do not learn go only to devices that lack them."""
        whole = request.kind == "counts" or not self._sent.held(request.base, names)
        message = (request if whole else replace(request, tensors=learned)).encoded()
        exchange.sent += len(message) * len(names)
        lacking: set[str] = set()
        for reply in self._devices.ask(names, message, self.settings.answer_seconds):
            exchange.received += len(reply.message)
            if not whole and reply.device in names and self._schema.lacks_base(reply.message, reply.device, request):
                lacking.add(reply.device)
                continue
            yield reply
        if request.kind != "counts":
            self._sent.note(names)
        if lacking:
            message = request.encoded()
            exchange.sent += len(message) * len(lacking)
            for reply in self._devices.ask(sorted(lacking), message, self.settings.answer_seconds):
                exchange.received += len(reply.message)
                yield reply

    def _read(self, device: str, message: bytes, error: str, names: Sequence[str], request: RoundRequest) -> Answer:
        if device not in names:
            raise RefusedError("was not asked")
        if error:
            raise RefusedError(f"it failed: {error[:200]}")
        return self._schema.read(message, device, request)

    def _refuse_other_metrics(self, found: dict[str, Answer], refused: dict[str, str]) -> None:
        """Moves answers to `refused` whose metrics differ in name or size from those of most devices."""
        layouts = {
            name: tuple((metric, parts[0].numel()) for metric, parts in sorted(answer.totals.items()))
            for name, answer in found.items()
        }
        usual = max(sorted(set(layouts.values())), key=list(layouts.values()).count, default=())
        for name in [name for name, layout in layouts.items() if layout != usual]:
            refused[name] = "its metrics are not those of most devices"
            del found[name]

    @property
    def _counted_first(self) -> bool:
        """Whether devices divide the loss of each of several tasks by its own count over all devices."""
        return self.kind == "gradient" and len(self.module.tasks) > 1

    def _combine(self, answers: Sequence[Answer], ctx: StepContext) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Adds answers up, and leaves the gradient or the negative mean change in the parameters."""
        targets = [float(answer.counts_K.sum()) for answer in answers]
        total = max(sum(targets), 1.0)
        if self._privacy is not None:
            self._sum_private(self._privacy, answers, ctx)
        elif self.kind == "delta":
            self._sum([answer.update for answer in answers], [-count / total for count in targets])
        else:
            self._sum(
                [answer.update for answer in answers], [1.0] * len(answers), 1.0 if self._counted_first else total
            )
        totals: dict[str, list[Tensor]] = {}
        for answer in answers:
            add_sums(totals, answer.totals)
        if self.kind == "delta":
            loss = sum(count * answer.loss for count, answer in zip(targets, answers, strict=True)) / total
        else:
            loss = sum(answer.loss for answer in answers) / (1.0 if self._counted_first else total)
        return torch.tensor(loss, dtype=torch.float64), totals

    @torch.no_grad()
    def _sum(self, updates: Sequence[Mapping[str, Tensor]], shares: Sequence[float], divisor: float = 1.0) -> None:
        """Leaves Σ share · update / divisor in the gradients, added in the order given."""
        for name, parameter in self._trained.items():
            summed = torch.zeros_like(parameter)
            for update, share in zip(updates, shares, strict=True):
                part = update[name].to(parameter.device)
                summed += part if share == 1.0 else share * part
            parameter.grad = summed / divisor

    def _sum_private(self, privacy: Privacy, answers: Sequence[Answer], ctx: StepContext) -> None:
        """Leaves the noisy sum of clipped updates of equal weights, divided by the expected number of devices.

        An update is a device's gradient per target of its own, or the negative change of its weights; its number of
        targets would leak through weights.
        """
        sign = -1.0 if self.kind == "delta" else 1.0
        own = self.kind == "gradient" and not self._counted_first
        scales = [1.0 / max(float(answer.counts_K.sum()), 1.0) if own else 1.0 for answer in answers]
        clipped = [privacy.clipped(answer.update, scale) for answer, scale in zip(answers, scales, strict=True)]
        noise = {name: privacy.noise(name, parameter.shape, ctx.step) for name, parameter in self._trained.items()}
        self._sum([*clipped, noise], [sign] * len(clipped) + [1.0], privacy.settings.per_round)

    def _apply(self, lr: float, skip_above: float) -> float:
        """Updates by AdamW from gradients, and under FedAdam from changes (arXiv 2003.00295, algorithm 2).

        FedAvg and FedProx add the mean change of the weights times `lr`, the server's rate; 1 is FedAvg as published.
        """
        if self.settings.rule in ("gradient", "fedadam"):
            return super()._apply(lr, skip_above)
        return self._add_update(lr, skip_above)


class Exchanged:
    """Counts of a round: devices asked, answers left out, attempts, bytes."""

    def __init__(self) -> None:
        self.asked = self.left_out = self.attempts = self.sent = self.received = 0


class RoundReader:
    """A StepReader whose steps are rounds: without micro-batches, since the audio is on the devices.

    Args:
        devices: disconnected at the end.
    """

    plan_hash = "rounds"

    def __init__(self, devices: Devices) -> None:
        self._devices = devices

    def steps(self, cursor: Cursor | None = None) -> Iterator[Step]:
        """Yields rounds without end, from `cursor` on."""
        number = cursor.step if cursor else 0
        while True:
            number += 1
            yield Step((), samples=1, padded_samples=1, after=Cursor(self.plan_hash, 0, number))

    def close(self) -> None:
        """Disconnects the devices."""
        self._devices.close()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(sorted(names)[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "none"
