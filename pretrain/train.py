"""The training loop: read a global step, run it, say what happened, save. Reads top to bottom as the algorithm."""

from __future__ import annotations

import contextlib
import enum
import time
from collections.abc import Callable

from data_pipeline.core.types import StepReader
from pretrain.checkpointing import checkpoint
from pretrain.checkpointing.checkpoint import TrainState
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.config import Config
from pretrain.engines.base import Engine
from pretrain.interfaces.frames import StepContext
from pretrain.lr_schedule import learning_rate
from pretrain.monitoring.health_monitor import UnhealthyError, Watch
from pretrain.monitoring.heartbeat import Heartbeat
from pretrain.monitoring.metrics_writer import Telemetry
from pretrain.monitoring.step_metrics import histograms, step_scalars


class Ending(enum.Enum):
    """Why training returned."""

    FINISHED = enum.auto()
    STOPPED = enum.auto()
    """Asked to stop; a checkpoint was written and the same command continues."""


def train(
    config: Config,
    engine: Engine,
    reader: StepReader,
    run: RunFolder,
    heart: Heartbeat,
    asked_to_stop: Callable[[], bool],
    say: Callable[[str], None] = print,
) -> Ending:
    """Trains until `config.train.steps`, from the newest checkpoint of `run` on.

    asked_to_stop: polled once a step on every rank; one rank's yes is enough, and all stop after the same step.
    Raises UnhealthyError when the run does not learn and StaleIncarnationError when another start took over.
    """
    world, settings = engine.world, config.train
    world.agree(reader.plan_hash, "the step plan (do all nodes see the same shards?)")
    state = checkpoint.load_latest(run, engine, config)
    watch = Watch(config, engine, run, state.health, say)
    telemetry = Telemetry(run, config, engine.module, state.step, world) if world.rank == 0 else None
    if telemetry:
        say(_greeting(config, state, world.size))
        if state.note:
            say(state.note)
        if config.schedule.warmup_steps > settings.steps:
            say(f"note: the warm-up ({config.schedule.warmup_steps} steps) is longer than the run ({settings.steps})")
        if getattr(config.objective, "relabel_step", 0) >= settings.steps:
            say(f"note: objective.relabel_step={config.objective.relabel_step} is never reached")

    engine.tell = heart.part
    clock, steps, stopping = time.monotonic(), reader.steps(state.cursor), False
    with checkpoint.Saver(run, engine, config) as saver, telemetry or contextlib.nullcontext():
        while state.step < settings.steps and not stopping:
            heart.beat(state.step, "reading")
            step = next(steps)
            heart.beat(state.step, "computing")
            waited = time.monotonic() - clock
            lr = learning_rate(config.optimizer, config.schedule, settings.steps, state.step, state.prolonged)
            if telemetry:
                telemetry.expect(state.step + 1)
            ctx = StepContext(config.seed, state.step)
            extras = watch.extras(ctx, waited)
            extras |= {"wait_seconds": waited, "skipped": float(step.skipped), "stop": float(asked_to_stop())}
            try:
                check = watch.may_begin if state.step == 0 else None
                result = engine.step(step.batches, ctx, lr, extras, watch.skip_above, check)
                back_to = watch.obey(result)
            except FloatingPointError as error:
                back_to = watch.diverged(error, ctx, step.batches)
            if back_to is not None:
                state = _roll_back(run, engine, config, saver, watch, TrainState(back_to, step.after))
                if telemetry:
                    telemetry.go_back(state.step)
                clock = time.monotonic()
                continue
            seconds, clock = time.monotonic() - clock, time.monotonic()
            watch.after(ctx, result, step, seconds)
            state = TrainState(state.step + 1, step.after, watch.memory(), state.prolonged)
            stopping = result.extras["stop"] > 0

            if telemetry and (state.step % settings.log_every == 0 or state.step == settings.steps):
                scalars = step_scalars(result, step, lr, seconds, world.size) | watch.report()
                telemetry.log(state.step, scalars, histograms(result.metrics))
                say(_line(state.step, settings.steps, scalars))
            if state.step % settings.checkpoint_every == 0 or state.step == settings.steps or stopping:
                heart.beat(state.step, "saving")
                folder = saver.save(state)
                if telemetry:
                    say(f"checkpoint {folder}")

    # rank 0 may still be writing, and a launcher ends all ranks soon after the first one has gone
    world.agree(str(state.step), "the step after which they left the loop")
    return Ending.STOPPED if stopping and state.step < settings.steps else Ending.FINISHED


def _roll_back(
    run: RunFolder, engine: Engine, config: Config, saver: checkpoint.Saver, watch: Watch, wanted: TrainState
) -> TrainState:
    """The newest state of at most `wanted.step` updates, but with the data after `wanted.cursor`, saved as such."""
    saver.wait()
    engine.world.agree(str(wanted.step), "the step to roll back to")
    try:
        healthy = checkpoint.roll_back(run, engine, config, wanted.step)
    except checkpoint.NothingToGoBackToError as error:
        raise UnhealthyError(f"{watch.why}; {error}") from None
    watch.go_back(healthy.step, healthy.health)
    state = TrainState(healthy.step, wanted.cursor, watch.memory(), healthy.prolonged)
    saver.save(state)
    return state


def _greeting(config: Config, state: TrainState, ranks: int) -> str:
    start = f"resuming after step {state.step}" if state.step else "starting"
    if state.step >= config.train.steps:
        start = f"nothing to do, {state.step} steps are done"
    per_rank = config.data.micro_batches // ranks
    return (
        f"{start}: {config.objective.name} on {ranks} rank{'s' * (ranks > 1)} × {per_rank} micro-batches, "
        f"{config.engine.name} engine, {config.train.steps} steps of {config.data.batch_seconds:g} s of audio"
    )


def _line(step: int, steps: int, scalars: dict[str, float]) -> str:
    return (
        f"step {step}/{steps}  loss {scalars['loss/total']:.4f}  grad {scalars['opt/grad_norm']:.3g}  "
        f"lr {scalars['opt/lr']:.2e}  {scalars['perf/audio_seconds_per_second']:.0f} audio-s/s  "
        f"waited {scalars['perf/data_wait_share']:.0%}"
    )
