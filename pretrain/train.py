"""The training loop: read, prepare, update, observe, log, save."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Mapping

from data_pipeline.core.types import Step, StepReader
from data_pipeline.loader.held_out import HeldOut
from data_pipeline.sampling.plan import accumulation
from pretrain.checkpointing import checkpoint
from pretrain.checkpointing.checkpoint import TrainState
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.config import Config
from pretrain.engines.base import Engine, StepResult
from pretrain.engines.signals import RankSignals
from pretrain.interfaces.frames import StepContext
from pretrain.lr_schedule import learning_rate
from pretrain.monitoring.health_monitor import HealthMonitor, UnhealthyError
from pretrain.monitoring.heartbeat import Heartbeat
from pretrain.monitoring.metrics_writer import MetricsWriter
from pretrain.monitoring.step_metrics import held_out_scalars, histograms, step_scalars

HELD_OUT_SEED = 0
"""Keys the masks of held-out audio, always those of step 0: losses of several steps and runs can be compared."""


class Ending(enum.Enum):
    """Why training returned."""

    FINISHED = enum.auto()
    STOPPED = enum.auto()
    """Stopped on request; a checkpoint was written and the same command continues."""


def train(
    config: Config,
    engine: Engine,
    reader: StepReader,
    run: RunFolder,
    heartbeat: Heartbeat,
    stop_requested: Callable[[], bool],
    say: Callable[[str], None] = print,
    held_out: HeldOut | None = None,
) -> Ending:
    """Trains until `config.train.steps`, from the newest checkpoint of `run` on.

    Args:
        config: the run's config.
        engine: owns the module and performs the updates.
        reader: this rank's micro-batches of each global step.
        run: the run folder, for checkpoints and metrics.
        heartbeat: records this rank's current work, for messages about hanging ranks.
        stop_requested: polled once per update on every rank; if one returns True, all stop after the same update.
        say: prints a line on rank 0.
        held_out: this rank's share of the held-out audio, whose loss is measured; it changes nothing in training.

    Returns:
        Whether the run is finished or was stopped on request.

    Raises:
        UnhealthyError: a health check stopped the run.
        StaleIncarnationError: a newer start of the run exists.
    """
    world, settings = engine.world, config.train
    world.agree(reader.plan_hash, "the step plan (do all nodes see the same shards?)")
    state = checkpoint.load_latest(run, engine, config)
    monitor = HealthMonitor(config, engine, run, state.health, say)
    validation = _Validation(config, engine, heartbeat, held_out)
    engine.on_phase = heartbeat.part
    clock, steps, stopping = time.monotonic(), reader.steps(state.cursor), False
    with checkpoint.Saver(run, engine, config, say) as saver, _Log(config, engine, run, state, say) as log:
        while state.step < settings.steps and not stopping:
            # read: this rank's micro-batches of the next global step
            heartbeat.beat(state.step, "reading")
            step = next(steps)
            heartbeat.beat(state.step, "computing")
            waited = time.monotonic() - clock

            # prepare: the keys of all random draws, the learning rate, and this rank's signals
            ctx = StepContext(config.seed, state.step)
            lr = learning_rate(config.optimizer, config.schedule, settings.steps, state.step, state.prolonged)
            signals = monitor.begin(ctx, step, waited, stop_requested())
            log.expect(state.step + 1)

            # update: count targets, forward and backward, reduce, apply
            result = _update(engine, monitor, step, ctx, lr=lr, signals=signals)

            # roll back: an older state, but with the data after this step
            if isinstance(result, int):
                wanted = TrainState(result, step.after)
                state = _roll_back(run, engine, config, saver=saver, monitor=monitor, wanted=wanted)
                log.go_back(state.step)
                clock = time.monotonic()
                continue

            # observe: record the update's measurements, and check the run's health
            seconds, clock = time.monotonic() - clock, time.monotonic()
            monitor.record_update(ctx, result, step, seconds)
            state = TrainState(state.step + 1, step.after, monitor.memory(), state.prolonged)
            stopping = result.signals.stop_requested

            # validate: the loss of held-out audio, without any effect on training
            if measured := validation.measure(state.step, log.expect_held_out):
                clock = time.monotonic()

            # log: scalars and histograms, on rank 0
            if measured or _is_due(state.step, settings.log_every, settings.steps):
                log.write(state.step, result, step, lr=lr, seconds=seconds, monitor=monitor, measured=measured)

            # save: all ranks gather, rank 0 writes
            saver.poll()
            if stopping or _is_due(state.step, settings.checkpoint_every, settings.steps):
                heartbeat.beat(state.step, "saving")
                saver.save(state)

    # wait for rank 0, which may still be writing: a launcher ends all ranks soon after the first one exits
    world.agree(str(state.step), "the step after which they left the loop")
    return Ending.STOPPED if stopping and state.step < settings.steps else Ending.FINISHED


def _update(
    engine: Engine, monitor: HealthMonitor, step: Step, ctx: StepContext, lr: float, signals: RankSignals
) -> StepResult | int:
    """Performs one update; returns its result, or the step before which the run must roll back."""
    try:
        check = monitor.check_targets if ctx.step == 0 else None
        result = engine.step(step.batches, ctx, lr, signals=signals, skip_above=monitor.skip_above, check=check)
        back_to = monitor.apply_decision(result)
    except FloatingPointError as error:
        return monitor.handle_divergence(error, ctx, step.batches)
    return result if back_to is None else back_to


def _is_due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


class _Validation:
    """Measures the loss of held-out audio when it is due; never where there is none."""

    def __init__(self, config: Config, engine: Engine, heartbeat: Heartbeat, held_out: HeldOut | None) -> None:
        self._engine, self._heartbeat, self._held_out = engine, heartbeat, held_out
        self._steps = config.train.steps
        self._every = config.train.valid_every or max(1, self._steps // 10)

    def measure(self, step: int, announce: Callable[[], None]) -> dict[str, float]:
        """Returns the scalars after update number `step`; empty if none are due. A collective operation.

        `announce` is called before a measurement.
        """
        if self._held_out is None or not _is_due(step, self._every, self._steps):
            return {}
        self._heartbeat.beat(step, "validating")
        announce()
        ctx = StepContext(HELD_OUT_SEED, 0)
        found = self._engine.measure(self._held_out.batches, self._held_out.counted, ctx)
        return held_out_scalars(found, self._engine.module.objective.monitoring())


class _Log:
    """Prints and writes the progress of a run on rank 0; does nothing on other ranks."""

    def __init__(
        self, config: Config, engine: Engine, run: RunFolder, state: TrainState, say: Callable[[str], None]
    ) -> None:
        self._engine, self._say, self._steps = engine, say, config.train.steps
        self._writer: MetricsWriter | None = None
        if engine.world.rank == 0:
            self._writer = MetricsWriter(run, config, engine.module, resumed_at=state.step, world=engine.world, say=say)
            say(_greeting(config, state, engine.world.size))
            if state.note:
                say(state.note)

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer:
            self._writer.close()

    def expect(self, step: int) -> None:
        """Requests a snapshot of update number `step`, if one is due."""
        if self._writer:
            self._writer.expect(step)

    def expect_held_out(self) -> None:
        """Requests what heads show of held-out audio."""
        if self._writer:
            self._writer.expect_held_out()

    def go_back(self, step: int) -> None:
        """Removes rows after `step`, to which the run has rolled back."""
        if self._writer:
            self._writer.go_back(step)

    def write(
        self,
        number: int,
        result: StepResult,
        step: Step,
        lr: float,
        seconds: float,
        monitor: HealthMonitor,
        measured: Mapping[str, float],
    ) -> None:
        """Writes scalars and histograms of update `number`, and prints a line; `measured`: of held-out audio."""
        if self._writer:
            module = self._engine.module
            scalars = step_scalars(result, step, lr=lr, seconds=seconds, world=self._engine.world.size, module=module)
            scalars |= monitor.report() | dict(measured)
            self._writer.log(number, scalars, histograms(result.metrics, module.objective.monitoring()))
            self._say(_line(number, self._steps, scalars))


def _roll_back(
    run: RunFolder,
    engine: Engine,
    config: Config,
    saver: checkpoint.Saver,
    monitor: HealthMonitor,
    wanted: TrainState,
) -> TrainState:
    """Returns the newest state of at most `wanted.step` updates, but with the data after `wanted.cursor`, saved."""
    saver.wait()
    engine.world.agree(str(wanted.step), "the step to roll back to")
    try:
        healthy = checkpoint.roll_back(run, engine, config, wanted.step)
    except checkpoint.NothingToGoBackToError as error:
        raise UnhealthyError(f"{monitor.why}; {error}") from None
    monitor.go_back(healthy.step, healthy.health)
    state = TrainState(healthy.step, wanted.cursor, monitor.memory(), healthy.prolonged)
    saver.save(state)
    return state


def _greeting(config: Config, state: TrainState, ranks: int) -> str:
    start = f"resuming after step {state.step}" if state.step else "starting"
    if state.step >= config.train.steps:
        start = f"nothing to do, {state.step} steps are done"
    per_rank = accumulation(config.data.micro_batches, ranks)
    return (
        f"{start}: {config.objective.name} on {ranks} rank{'s' * (ranks > 1)} × {per_rank} micro-batches, "
        f"{config.engine.name} engine, {config.train.steps} steps of {config.data.batch_seconds:g} s of audio"
    )


def _line(step: int, steps: int, scalars: dict[str, float]) -> str:
    held_out = f"  held-out loss {scalars['valid/loss/total']:.4f}" if "valid/loss/total" in scalars else ""
    return (
        f"step {step}/{steps}  loss {scalars['loss/total']:.4f}  grad {scalars['opt/grad_norm']:.3g}  "
        f"lr {scalars['opt/lr']:.2e}  {scalars['perf/audio_seconds_per_second']:.0f} × real time  "
        f"waited {scalars['perf/data_wait_share']:.0%}{held_out}"
    )
