"""The engine of meta-learning: a micro-batch is an episode; an update moves the weights that adaptation starts from.

The inner loop adapts weights to the support of an episode; the queries judge the adapted weights. What an update is:

    maml      the gradient of the queries' loss by the start, through the inner steps (arXiv 1703.03400)
    fomaml    the same with gradients of inner steps as constants (ibid., §5.2)
    anil      maml that adapts weights of the inner task's head alone (arXiv 1909.09157)
    reptile   start − adapted (arXiv 1803.02999), subtracted times optimizer.lr
    foblo     the same for steps of the outer task on the queries that follow those of the inner task on the support:
              first-order bi-level optimisation (SpidR-Adapt, arXiv 2512.21204)
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from data_pipeline.core.rng import keyed_seed
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import PART, SUPPORT, Batch
from pretrain.config import Config
from pretrain.engines.distributed import DistributedContext
from pretrain.engines.inner_loop import Weights, descend, step_shares
from pretrain.engines.plain_torch import TorchEngine
from pretrain.interfaces.engine_configs import MetaConfig
from pretrain.interfaces.frames import StepContext
from pretrain.interfaces.objectives import Head, Objective, Sum
from pretrain.nn.inner_rates import InnerRates, chosen_weights
from pretrain.train_module import Passes, TrainModule, TrainPlan


@dataclass(frozen=True)
class _Pass:
    """One pass over a part of an episode: its draws and their key."""

    plan: TrainPlan
    ctx: StepContext


@dataclass(frozen=True)
class _EpisodePlan:
    """support, queries: parts of an episode.  inner: passes of the inner steps.  outer: of foblo's outer steps.

    judged: the pass that judges adapted weights.  counts: targets of each task in it, and 1 for the episode, (K + 1,).
    """

    support: Batch
    queries: Batch
    inner: Sequence[_Pass]
    outer: Sequence[_Pass]
    judged: _Pass
    counts: Tensor


class MetaEngine(TorchEngine):
    """Runs updates over episodes.

    Args:
        module: model, objective and heads, with the rates of the inner loop.
        config: the run's config.
        world: this rank and the number of ranks.

    Raises:
        ConfigError: a part of the module needs data of all ranks, which an episode must not depend on.
    """

    def __init__(self, module: TrainModule, config: Config, world: DistributedContext) -> None:
        super().__init__(module, config.engine, config.optimizer, world)
        assert module.inner_rates is not None
        self.meta: MetaConfig = config.engine.meta
        self.rates: InnerRates = module.inner_rates
        self.inner_task, self.outer_task = (
            module.tasks.index(name) for name in (self.meta.inner, self.meta.outer_task)
        )
        self.head_alone = all(name.startswith("heads.") for name in self.rates.names)
        self.zeros = set(chosen_weights(self.rates.names, self.meta.reset, "engine.meta.reset"))
        for name, part in (("objective", module.objective), *module.heads.items()):
            if isinstance(part, Objective | Head) and part.gathers:
                raise ConfigError(
                    f"engine.name=meta: {name} ({type(part).__name__}) updates its state from frames or vectors of all "
                    "ranks, which an episode must not depend on; choose another objective or head"
                )

    def _prepare(self, batches: Sequence[Batch], ctx: StepContext) -> tuple[Sequence[object], Tensor]:
        """Divides episodes into support and queries, draws masks and counts the queries' targets and the episodes."""
        self.on_phase("targets")
        plans = [self._planned(batch, ctx) for batch in batches]
        self.on_phase("sum of counts")
        return plans, self.world.sum_on_host(torch.stack([plan.counts for plan in plans]).sum(0))

    def _planned(self, batch: Batch, ctx: StepContext) -> _EpisodePlan:
        parts = batch.label_values(PART)
        given = [row for row, part in enumerate(parts) if part == SUPPORT]
        asked = [row for row in range(len(parts)) if row not in set(given)]
        if batch.is_empty:
            given, asked = [0], [0]
        elif not given or not asked:
            raise ConfigError("engine.name=meta: a micro-batch is no episode; set data.episodes.label")
        support, queries = batch.take(given), batch.take(asked)

        def passes(part: Batch, name: str, count: int) -> list[_Pass]:
            """Plans passes with other masks each; where the encoder runs once, they share the first one's."""
            keys = [keyed_seed(ctx.seed, number, name) for number in range(1 if self.head_alone else count)]
            found = [_Pass(self.module.prepare(part, key), key) for key in (StepContext(k, ctx.step) for k in keys)]
            return found * (count if self.head_alone else 1)

        judged = _Pass(self.module.prepare(queries, ctx), ctx)
        real = float(not batch.is_empty)
        return _EpisodePlan(
            support=support,
            queries=queries,
            inner=passes(support, "inner", self.meta.inner_steps),
            outer=passes(queries, "outer", self.meta.outer_steps) if self.meta.method == "foblo" else [],
            judged=judged,
            counts=torch.cat([judged.plan.counts_K * real, torch.tensor([real], dtype=torch.float64)]),
        )

    def _forward_backward(
        self, batch: Batch, plan: object, counts_K: Tensor, ctx: StepContext
    ) -> tuple[Tensor, Mapping[str, Sum]]:
        assert isinstance(plan, _EpisodePlan)
        if batch.is_empty:
            return torch.zeros((), device=self.world.device), {}
        # fused attention has no second derivative
        twice = self.meta.second_order and not self.head_alone
        with sdpa_kernel(SDPBackend.MATH) if twice else contextlib.nullcontext():
            episode = _Episode(self, plan, counts_K[:-1])
            if self.meta.follows_steps:
                return self._follow(episode, float(counts_K[-1]))
            return self._judge(episode, ctx)

    def _judge(self, episode: _Episode, ctx: StepContext) -> tuple[Tensor, Mapping[str, Sum]]:
        """Adds the gradient of the queries' loss by the start of the inner loop."""
        path = descend(
            episode.start(), episode.support_loss, self.rates.rate, self.meta.inner_steps, self.meta.second_order
        )
        loss, metrics = torch.zeros((), device=self.world.device), dict[str, Sum]()
        for share, weights in zip(
            step_shares(self.meta.multi_step, ctx.step, self.meta.inner_steps), path.weights[1:], strict=True
        ):
            if share:
                value, metrics = episode.query_loss(weights)
                loss = loss + share * value
        self.on_phase("backward pass")
        (loss * self.scale.value).backward()  # type: ignore[no-untyped-call]
        return loss, metrics | episode.figures(path.weights[0], path.weights[-1], path.losses[0], metrics)

    def _follow(self, episode: _Episode, episodes: float) -> tuple[Tensor, Mapping[str, Sum]]:
        """Adds the difference of weights before and after steps, divided by the number of episodes of the update."""
        start = episode.start()
        path = descend(start, episode.support_loss, self.rates.rate, self.meta.inner_steps, differentiable=False)
        before, after = path.weights[0], path.weights[-1]
        if self.meta.method == "foblo":
            before = after
            outer = descend(before, episode.outer_loss, self._rate, self.meta.outer_steps, differentiable=False)
            after = outer.weights[-1]
        named = dict(self.module.named_parameters())
        for name, weight in after.items():
            if start[name] is named[name] and named[name].requires_grad:  # the rest restarts in each episode
                change = (before[name] - weight).detach() / episodes
                grad = named[name].grad
                named[name].grad = change if grad is None else grad + change
        with torch.no_grad():
            loss, metrics = episode.query_loss(after)
        return loss, metrics | episode.figures(path.weights[0], after, path.losses[0], metrics)

    def _rate(self, name: str, step: int) -> Tensor:
        """Returns the rate of foblo's outer steps, whose number may be another than that of inner steps."""
        return self.rates.rate(name, 0)

    def _apply(self, lr: float, skip_above: float) -> float:
        return self._add_update(lr, skip_above) if self.meta.follows_steps else super()._apply(lr, skip_above)


class _Episode:
    """Losses of one episode as functions of the adapted weights.

    Args:
        engine: has module and settings.
        plan: the episode's.
        counts_K: targets of each task in the queries of all episodes of the update.
    """

    def __init__(self, engine: MetaEngine, plan: _EpisodePlan, counts_K: Tensor) -> None:
        self._engine, self._module, self._plan = engine, engine.module, plan
        self._counts_K = _only(engine.outer_task, counts_K)
        self._given: Passes | None = None
        self._asked: Passes | None = None
        if engine.head_alone:
            self._given = self._module.encode(plan.support, plan.inner[0].plan, plan.inner[0].ctx)
            self._asked = self._module.encode(plan.queries, plan.judged.plan, plan.judged.ctx)

    def start(self) -> Weights:
        """Returns the weights before the first step: the module's, zeros, or what heads make of the support."""
        engine, named = self._engine, dict(self._module.named_parameters())
        weights: Weights = {
            name: torch.zeros_like(named[name]) if name in engine.zeros else named[name] for name in engine.rates.names
        }
        first = self._plan.inner[0]
        for name in {engine.meta.inner, engine.meta.outer_task} - {"objective"}:
            head = self._module.heads[name]
            assert isinstance(head, Head)
            if head.starts_from_support:
                passes = self._given or self._module.encode(self._plan.support, first.plan, first.ctx)
                own = head.first_weights(passes.read_by(head), self._plan.support)
                found = {f"heads.{name}.{key}": value for key, value in own.items()}
                weights |= {key: value for key, value in found.items() if key in weights}
        return weights

    def support_loss(self, weights: Weights, step: int) -> Tensor:
        """Returns the inner task's mean loss on the support."""
        return self._mean(weights, self._plan.support, self._plan.inner[step], self._engine.inner_task, self._given)[0]

    def outer_loss(self, weights: Weights, step: int) -> Tensor:
        """Returns the outer task's mean loss on the queries."""
        return self._mean(weights, self._plan.queries, self._plan.outer[step], self._engine.outer_task, None)[0]

    def query_loss(self, weights: Weights) -> tuple[Tensor, dict[str, Sum]]:
        """Returns this episode's share of the outer task's loss on the queries of all episodes, and its metrics."""
        return self._run(weights, self._plan.queries, self._plan.judged, self._counts_K, self._asked)

    @torch.no_grad()
    def figures(self, first: Weights, last: Weights, support_loss: Tensor, judged: Mapping[str, Sum]) -> dict[str, Sum]:
        """Returns the losses before and after adaptation, and the mean rate of the inner loop."""
        meta, plan, one = self._engine.meta, self._plan, torch.ones((), device=support_loss.device)
        after, _ = self._mean(last, plan.support, plan.inner[0], self._engine.inner_task, self._given)
        _, unadapted = self.query_loss(first)
        outer = f"loss/{meta.outer_task}"
        rates = torch.cat(list(self._engine.rates().values()))
        return {
            "meta/support_loss_before": (support_loss, one),
            "meta/support_loss_after": (after, one),
            "meta/query_loss_before": unadapted[outer],
            "meta/query_loss_after": judged[outer],
            "meta/inner_rate": (rates.sum(), one * len(rates)),
        }

    def _mean(
        self, weights: Weights, batch: Batch, one: _Pass, task: int, passes: Passes | None
    ) -> tuple[Tensor, dict[str, Sum]]:
        return self._run(weights, batch, one, _only(task, one.plan.counts_K), passes)

    def _run(
        self, weights: Weights, batch: Batch, one: _Pass, counts_K: Tensor, passes: Passes | None
    ) -> tuple[Tensor, dict[str, Sum]]:
        self._engine.on_phase("forward pass")
        found: tuple[Tensor, dict[str, Sum]] = functional_call(
            self._module, weights, (batch, one.plan, counts_K, one.ctx), {"passes": passes}
        )
        return found


def _only(task: int, counts_K: Tensor) -> Tensor:
    """Returns the targets of one task; those of others are 0, so that their losses do not count."""
    chosen_K = torch.zeros_like(counts_K)
    chosen_K[task] = counts_K[task]
    return chosen_K
