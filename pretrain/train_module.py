"""TrainModule: model, objective and heads as one module that an engine can step."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.core.rng import keyed_seed
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import Batch
from pretrain import registry
from pretrain.config import Config
from pretrain.interfaces.configs import BalanceConfig
from pretrain.interfaces.frames import EncoderOutput, StepContext
from pretrain.interfaces.models import SpeechModel
from pretrain.interfaces.objectives import Head, HeadPlan, LossOutput, MicroBatchPlan, Objective, Sum
from pretrain.nn.balance import FACTOR, TASK_GRADIENTS, Balance, gradient_shares
from pretrain.nn.fake_int8 import add_fake_int8, round_to_int8
from pretrain.nn.gradient_taps import GradientTaps, NoTaps
from pretrain.nn.inner_rates import InnerRates, chosen_weights
from pretrain.nn.numerics import masked_deviation
from pretrain.nn.tuning import apply_tuning

if TYPE_CHECKING:
    from data_pipeline.loader.held_out import HeldOut
    from data_pipeline.loader.reader import PlanReader


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """plan: the objective's.  heads: of each head.  counts_K: targets of each task, float64, on the host."""

    plan: MicroBatchPlan
    heads: Mapping[str, HeadPlan]
    counts_K: Tensor


class Passes(NamedTuple):
    """What heads read of one micro-batch.  objective: its loss.  encoded: the output of its own pass.

    whole: the output without a mask; None where no head asks for it.
    """

    objective: LossOutput
    encoded: EncoderOutput
    whole: EncoderOutput | None

    def read_by(self, head: Head) -> EncoderOutput:
        """Returns the output that a head reads."""
        return self.whole if self.whole is not None and head.input == "whole" else self.encoded


class TrainModule(nn.Module):
    """Computes this micro-batch's share of the loss of the whole global step.

    Args:
        model: front end and encoder.
        objective: the self-supervised loss.
        heads: supervised tasks on the encoder's output, by name.
        autocast: dtype of the forward pass's matrix products; None: fp32. Weights are fp32 in both cases.
        balance: weights of the tasks' losses; None: all 1.
    """

    def __init__(
        self,
        model: SpeechModel,
        objective: Objective,
        heads: Mapping[str, Head] | None = None,
        autocast: torch.dtype | None = None,
        balance: BalanceConfig | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        # by name, so that the order in a YAML file moves no draw of dropout
        self.heads = nn.ModuleDict(dict(sorted((heads or {}).items())))
        self.autocast = autocast
        self.tasks: tuple[str, ...] = ("objective", *self.heads)
        balance = balance or BalanceConfig()
        self.balance = Balance(balance, [False, *(head.signed for head in self._heads().values())])
        self.inner_rates: InnerRates | None = None
        """Learning rates of the inner loop of meta-learning; None in other runs."""
        self._int8_from: int | None = None
        self._taps = GradientTaps(model.encoder, self.tasks) if balance.measures and self.heads else None

    @functools.cached_property
    def least_samples(self) -> int:
        """The shortest utterance, in samples, that can have a target: follows from front end, masks and targets."""
        return self.objective.least_samples(self.model.frontend)

    @functools.cached_property
    def varies_depth(self) -> bool:
        """Whether micro-batches of an update run different numbers of blocks (a supernet)."""
        space = self.objective.space()
        return space is not None and len(space.blocks) > 1

    @torch.no_grad()
    def prepare(self, batch: Batch, ctx: StepContext) -> TrainPlan:
        """Draws masks and counts targets; runs no layer.

        Args:
            batch: one micro-batch; padded here, as in `forward`, where all its utterances are too short to encode.
            ctx: seed and step.
        """
        batch = padded_to(batch, self.least_samples)
        plan = self.objective.prepare(self.model, batch, ctx)
        heads = {
            name: head.restrict(head.prepare(self.model, batch, ctx), self.model, batch, plan.masked_BF)
            for name, head in self._heads().items()
        }
        counts = [plan.count, *(head.count for head in heads.values())]
        return TrainPlan(plan, heads, torch.stack([count.detach().cpu().double() for count in counts]))

    def encode(self, batch: Batch, plan: TrainPlan, ctx: StepContext) -> Passes:
        """Makes the encoder passes of a micro-batch; arguments are those of `forward`."""
        batch = padded_to(batch, self.least_samples)
        with self._precision(batch.wave_BT.device):
            objective: LossOutput
            with (self._taps or NoTaps()).objective():
                objective, encoded = self.objective(self.model, batch, plan.plan, ctx)
            return Passes(objective, encoded, self._whole(batch, plan, ctx))

    def forward(
        self, batch: Batch, plan: TrainPlan, global_counts_K: Tensor, ctx: StepContext, passes: Passes | None = None
    ) -> tuple[Tensor, dict[str, Sum]]:
        """Computes this micro-batch's share of the loss of the whole update.

        Args:
            batch: the micro-batch that `plan` was prepared for.
            plan: the result of `prepare`.
            global_counts_K: targets of each task over all micro-batches and ranks, in the order of `tasks`.
            ctx: seed and step.
            passes: the result of `encode`; None: it is called here.

        Returns:
            Σ over tasks of weight · total / global count (0 for a task without targets), and metrics as sums and
            counts. Added up over micro-batches and ranks, the former is the loss of the update.
        """
        batch = padded_to(batch, self.least_samples)
        taps = self._taps or NoTaps()
        objective, encoded, whole = passes or self.encode(batch, plan, ctx)
        with self._precision(batch.wave_BT.device):
            outputs = {"objective": (1.0, objective)}
            for name, head in self._heads().items():
                if whole is not None and head.input == "whole":
                    read = taps.head(name, whole)
                else:
                    read = taps.head(name, encoded, shared=True)
                output: LossOutput = head(read, batch, plan.heads[name], ctx)
                named = {head_metric(name, key): sums for key, sums in output.metrics.items()}
                outputs[name] = (head.weight_at(ctx.step), output._replace(metrics=named))
        loss = torch.zeros((), device=batch.wave_BT.device)
        metrics: dict[str, Sum] = {}
        numbered = zip(itertools.count(), global_counts_K.tolist(), outputs.items(), strict=False)
        for number, global_count, (name, (weight, output)) in numbered:
            # a task without targets has weight 0, so that every rank has a gradient for every weight
            factor = self.balance.of(number) * (weight / global_count if global_count else 0.0)
            loss = loss + output.total.float() * factor
            metrics[f"loss/{name}"] = (output.total.detach(), output.count.detach())
            metrics |= {key: (total.detach(), count.detach()) for key, (total, count) in output.metrics.items()}
        if self.varies_depth:  # of a block that this micro-batch leaves out, another rank may run: gradients of 0
            loss = loss + 0.0 * sum(weight.sum() for weight in self.parameters() if weight.requires_grad)
        one = torch.ones((), device=loss.device)
        watched = self.model.frontend.watched() | stage_deviations(encoded)
        metrics |= {name: (value.detach().float(), one) for name, value in watched.items()}
        if self.balance.adaptive:
            metrics |= {f"{FACTOR}{name}": (self.balance.factors_K[k], one) for k, name in enumerate(self.tasks)}
        squares_K = taps.squares(loss)
        if squares_K is not None:  # filled by the backward pass that follows
            metrics[TASK_GRADIENTS] = (squares_K, one)
        return loss, metrics

    def anticipate_int8(self, share: float, steps: int) -> None:
        """Lets the linear layers of the model round to 8 bits in the last `share` of `steps` updates."""
        if share:
            add_fake_int8(self.model)
            self._int8_from = steps - max(1, round(share * steps))

    def begin(self, ctx: StepContext) -> None:
        """Runs before the first pass of an update. Rounding follows from its number alone, so resumes are exact."""
        if self._int8_from is not None:
            round_to_int8(self.model, ctx.step >= self._int8_from)

    def forget(self) -> None:
        """Discards what forward passes collected; runs before the first one of each attempt at an update."""
        self.objective.forget()
        for head in self._heads().values():
            head.forget()

    def after_step(self, ctx: StepContext, sums: Mapping[str, tuple[np.ndarray, float]] | None = None) -> None:
        """Runs once after each optimizer step that was not skipped.

        Args:
            ctx: seed and step of the update.
            sums: its metrics, (sum, count), added up over micro-batches and ranks; the same on every rank.
                None: the balance stays as it is.
        """
        self.objective.after_step(self.model, ctx)
        for head in self._heads().values():
            head.after_step(ctx)
        if sums is None:
            return
        losses = [sums[f"loss/{name}"] for name in self.tasks]
        squares_K, _ = sums.get(TASK_GRADIENTS, (np.zeros(len(self.tasks)), 0.0))
        make = functools.partial(torch.tensor, dtype=torch.float64)
        self.balance.update(
            make([total[0] for total, _ in losses]), make([count for _, count in losses]), make(squares_K)
        )

    def gradient_shares(self, sums: Mapping[str, tuple[np.ndarray, float]]) -> dict[str, float]:
        """Returns each task's share of the gradient at the encoder's output, from metrics as in `after_step`.

        Returns:
            Shares by task; empty where they are not measured, or no task has a gradient.
        """
        if TASK_GRADIENTS not in sums:
            return {}
        shares_K = gradient_shares(sums[TASK_GRADIENTS][0])
        return dict(zip(self.tasks, shares_K.tolist(), strict=True)) if shares_K.any() else {}

    def infeasible_metrics(self) -> dict[str, str]:
        """Returns, by head, the metric of `forward` that counts labelled rows that the head cannot use."""
        named = {name: head.monitoring().infeasible for name, head in self._heads().items()}
        return {name: head_metric(name, key) for name, key in named.items() if key is not None}

    def _whole(self, batch: Batch, plan: TrainPlan, ctx: StepContext) -> EncoderOutput | None:
        """Returns the encoder's output without a mask where a head asks for it, (B, F, D) per layer.

        Rows that no such head has a target in are not computed: they are zeros of length 0. One row always is, so that
        every rank uses the same weights.
        """
        rows = [plan.heads[name].rows_B for name, head in self._heads().items() if head.input == "whole"]
        if not rows:
            return None
        wanted_B = torch.stack([rows_B.to(batch.lengths_B.device) for rows_B in rows]).any(0)
        wanted_B[0] |= ~wanted_B.any()
        wanted_N = wanted_B.nonzero()[:, 0]
        lengths_N = batch.lengths_B[wanted_N]
        frames = self.model.project(self.model.extract(batch.wave_BT[wanted_N], lengths_N))
        encoded: EncoderOutput = self.model.encoder(frames, ctx)
        return encoded if bool(wanted_B.all()) else spread_rows(encoded, wanted_N, len(wanted_B))

    def _heads(self) -> dict[str, Head]:
        return {name: head for name, head in self.heads.items() if isinstance(head, Head)}

    def _precision(self, device: torch.device) -> contextlib.AbstractContextManager[object]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)


def head_metric(head: str, metric: str) -> str:
    """Returns the name under which a metric of a head is logged."""
    return f"metric/{head}/{metric}"


def padded_to(batch: Batch, samples: int) -> Batch:
    """Returns the batch padded with silence to at least `samples` samples."""
    missing = samples - batch.wave_BT.shape[1]
    if missing <= 0:
        return batch
    sources_BST = None if batch.sources_BST is None else F.pad(batch.sources_BST, (0, missing))
    return replace(batch, wave_BT=F.pad(batch.wave_BT, (0, missing)), sources_BST=sources_BST)


def spread_rows(encoded: EncoderOutput, numbers_N: Tensor, rows: int) -> EncoderOutput:
    """Returns the output of some rows of a batch as that of the batch; the other rows are zeros of length 0.

    Args:
        encoded: the encoder's output, (N, F, D) per layer.
        numbers_N: the rows' numbers in the batch.
        rows: of the batch.
    """

    def spread(x_N: Tensor) -> Tensor:
        return x_N.new_zeros(rows, *x_N.shape[1:]).index_copy(0, numbers_N, x_N)

    layers, ffn_layers = (tuple(map(spread, given)) for given in (encoded.layers, encoded.ffn_layers))
    return EncoderOutput(layers, spread(encoded.lengths_B), encoded.rate_hz, ffn_layers)


AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""engine.precision -> dtype of the forward pass's matrix products."""


def stage_deviations(encoded: EncoderOutput) -> dict[str, Tensor]:
    """Returns the deviation over frames at the encoder's input, middle and output; near 0 means collapse."""
    layers, valid_BF = encoded.layers, encoded.final.valid_BF()
    stages = {"input": layers[0], "middle": layers[len(layers) // 2], "output": layers[-1]}
    return {f"health/std_{stage}": masked_deviation(x_BFD, valid_BF) for stage, x_BFD in stages.items()}


def build_speech_model(config: Config) -> SpeechModel:
    """Builds front end and encoder without an objective, with random weights from torch's generator.

    Args:
        config: the run's config, of which `frontend`, `encoder` and `engine` are used.

    Returns:
        A model from wave_BT (B, T) at 16 kHz in [-1, 1] and lengths_B (B,) in samples to the encoder's layers, each
        (B, F, D) at `rate_hz`; in training mode, on torch's default device.

    Raises:
        ValueError: fields of a plug-in's config contradict each other, or `tune` does not fit the encoder.
    """
    encoder = registry.build_encoder(config.encoder)
    encoder.activation_checkpointing = config.engine.activation_checkpointing
    frontend = registry.build_frontend(config.frontend, encoder.dim)
    encoder.packed = frontend.packed = config.engine.packed
    model = SpeechModel(frontend, encoder)
    with torch.random.fork_rng(devices=[]):  # added weights must not change the initial values of any weight
        torch.manual_seed(keyed_seed(config.seed, "tune"))
        apply_tuning(model, config.tune)
    return model


def least_samples(config: Config) -> int:
    """Returns the shortest segment, in samples, that front end, masks and targets can use; allocates no weights."""
    try:
        with torch.device("meta"):
            model = build_speech_model(config)
            objective = registry.build_objective(config.objective, model.shape)
    except ValueError as error:  # it follows from the config alone
        raise ConfigError(str(error)) from error
    return objective.least_samples(model.frontend)


def open_run_reader(config: Config, rank: int = 0, world: int = 1) -> PlanReader:
    """Opens the data of a run for one rank; segments too short for the model are left out of its plan.

    Args:
        config: the run's config.
        rank: this rank, from 0.
        world: number of ranks.

    Raises:
        ConfigError: too little usable audio, or more ranks than `data.micro_batches`.
        ValueError: shards are damaged.
    """
    from data_pipeline.loader.reader import open_reader  # here: a model alone needs no package that reads shards

    return open_reader(config.data, config.seed, rank, world, least_samples(config))


def read_run_held_out(config: Config, rank: int = 0, world: int = 1) -> HeldOut | None:
    """Reads one rank's share of the held-out audio `data.valid`; None where it is not set.

    Args:
        config: the run's config.
        rank: this rank, from 0.
        world: number of ranks.

    Raises:
        ConfigError: there is no usable held-out audio.
        ValueError: shards are damaged.
    """
    from data_pipeline.loader.held_out import read_held_out  # as above

    return read_held_out(config.data, rank, world, least_samples(config)) if config.data.valid else None


def build_model(config: Config) -> TrainModule:
    """Builds model, objective and heads of a run; their initial weights depend on `config.seed` alone.

    Args:
        config: the run's config.

    Returns:
        The module that engines train, in fp32 and training mode, on torch's default device.

    Raises:
        ValueError: the parts of the config do not fit together, such as frame rates that do not divide.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_seed(config.seed, "weights"))
        model = build_speech_model(config)
        objective = registry.build_objective(config.objective, model.shape)
        objective.attach(model)
        heads = {name: registry.build_head(head, model.shape) for name, head in sorted(config.heads.items())}
    module = TrainModule(model, objective, heads, AUTOCAST[config.engine.precision], config.balance)
    if config.engine.name == "meta":
        meta = config.engine.meta
        adapted = meta.adapt or ((f"heads.{meta.inner}",) if meta.method == "anil" else ())
        names = [name for name, weight in module.named_parameters() if weight.requires_grad]
        names = chosen_weights(names, adapted, "engine.meta.adapt") if adapted else names
        chosen_weights(names, meta.reset, "engine.meta.reset")
        module.inner_rates = InnerRates(names, meta.inner_steps, meta.inner_lr, meta.learn_lr)
    return module
