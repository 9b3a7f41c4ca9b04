"""The checkpoint format: two safetensors files and one JSON, the same for every engine, ZeRO stage and rank count.

    checkpoints/step_00000100/model.safetensors      weights and buffers of the TrainModule, fp32
                              optimizer.safetensors  exp_avg/NAME, exp_avg_sq/NAME
                              state.json             step, reader cursor, health state, loss scale, config, sha256
                                                     of these files and of the tokens, what the engine remembers
    checkpoints/latest                               the name of the newest complete checkpoint

Nothing in it is executed on loading (no pickle).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from data_pipeline.core.atomic_files import remove, sha256_of, sync, write_json
from data_pipeline.core.schema import dump
from data_pipeline.core.types import Cursor
from data_pipeline.text.tokenizer import load_tokenizer
from pretrain.checkpointing.locate import POINTER, latest_checkpoint, latest_name, point_latest, remedy, saved_steps
from pretrain.checkpointing.resume import prolongation, prolongation_notice, require_same_config
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.checkpointing.stored import FORMAT, Tensors, damage, read_state
from pretrain.checkpointing.tensor_files import save_tensors
from pretrain.config import Config
from pretrain.engines.base import Engine
from pretrain.lr_schedule import Prolongation


@dataclasses.dataclass(frozen=True, slots=True)
class TrainState:
    """State of the training loop besides tensors."""

    step: int = 0
    cursor: Cursor | None = None
    health: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """State of the health monitor, as plain JSON."""
    prolonged: Prolongation | None = None
    """Step and learning rate at which a resume with another train.steps continued."""
    note: str = ""
    """Message about the resume for the log; not saved."""


@dataclasses.dataclass
class _Pending:
    """A save in progress."""

    folder: Path
    write: Callable[[], None]
    future: Future[None]
    tries: int = 1


TRIES = 2
"""Attempts to save a checkpoint before training ends; a failed save is repeated at once."""


class Saver:
    """Saves checkpoints. A context manager, so that a write in progress is finished however the training loop ends.

    Gathering the tensors is a collective operation; rank 0 writes them, in a background thread with
    `train.save_behind`. A checkpoint is reported once it is complete on disk. The next `poll` detects a failed save and
    repeats it.

    Args:
        run: the run folder, of which this process is the newest start.
        engine: the engine whose tensors are saved.
        config: the run's config, saved with each checkpoint.
        say: receives a line per saved checkpoint and per failed save.
    """

    def __init__(
        self, run: RunFolder, engine: Engine, config: Config, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self._run, self._engine, self._config, self._say = run, engine, config, say
        self._tokens = {name: load_tokenizer(root).sha256 for name, root in config.data.tokens.items()}
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: _Pending | None = None

    def __enter__(self) -> Saver:
        if self._engine.world.rank == 0:
            remove_leftovers(self._run)
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.wait()
        else:
            with contextlib.suppress(OSError, RuntimeError):  # the exception that ended the loop takes precedence
                self.wait()
        self._pool.shutdown(wait=True)

    def save(self, state: TrainState) -> None:
        """Saves a checkpoint; a collective operation.

        Args:
            state: state of the training loop after `state.step` updates.

        Raises:
            OSError: a save failed twice (a full disk). Existing checkpoints stay intact.
            StaleIncarnationError: a newer start of the run exists.
        """
        folder = self._run.checkpoints / f"step_{state.step:08d}"
        if self._engine.world.rank != 0:
            for _ in self._engine.tensors():
                pass
            return
        self.wait()
        self._run.require_current()
        files, extra = _gather(self._engine), {"loss_scale": self._engine.scale.state()}
        extra |= {"tokens": self._tokens, "engine": self._engine.memory()}
        save = functools.partial(write_checkpoint, self._run, folder, files, state, self._config, extra)
        self._pending = _Pending(folder, save, self._pool.submit(save))
        if not self._config.train.save_behind:
            self.wait()

    def poll(self) -> None:
        """Reports a save that has finished since the last call. Raises as `save` does."""
        if self._pending is not None and self._pending.future.done():
            self._finish(self._pending)

    def wait(self) -> None:
        """Waits until the last save is complete on disk. Raises as `save` does."""
        while self._pending is not None:
            self._finish(self._pending)

    def _finish(self, pending: _Pending) -> None:
        """Waits for a save and reports it; repeats a failed one if attempts are left."""
        self._pending = None
        try:
            pending.future.result()
        except OSError as error:
            if pending.tries == TRIES:
                raise OSError(f"{pending.folder} cannot be saved, {TRIES} tries failed: {error}") from error
            self._say(f"warning: {pending.folder} cannot be saved ({error}); trying again")
            self._pending = _Pending(
                pending.folder, pending.write, self._pool.submit(pending.write), tries=pending.tries + 1
            )
        else:
            self._say(f"checkpoint {pending.folder}")


def remove_leftovers(run: RunFolder) -> None:
    """Removes partially written files of earlier starts from checkpoints/; `run` must be the newest start.

    A stand-in that `latest` names is a complete checkpoint and is kept.
    """
    for path in run.checkpoints.glob(".step_*.*"):
        number = path.name.rpartition(".")[2]
        if number.isdigit() and int(number) < run.incarnation:
            remove(path)
    for path in run.checkpoints.glob(f".{POINTER}.*"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(ValueError):  # `load_latest` reports a damaged pointer; until then every stand-in stays
        named = latest_name(run.checkpoints)
        for path in run.checkpoints.glob(".stand_in_*"):
            if path.name != named:
                remove(path)


def _gather(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """Returns copies of all tensors by file, so that the next step cannot change them while they are written."""
    files: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for name, tensor in engine.tensors():
        kind, _, rest = name.partition("/")
        if kind == "model":
            files["model"][rest] = tensor
        else:
            files["optimizer"][name] = tensor
    return files


def write_checkpoint(
    run: RunFolder,
    folder: Path,
    files: Mapping[str, dict[str, Tensor]],
    state: TrainState,
    config: Config,
    extra: Mapping[str, Mapping[str, Any]],
) -> None:
    """Writes a checkpoint: a temporary folder, moved into place; points `latest` to it, then removes old checkpoints.

    Whenever the process is killed, `latest` names a complete checkpoint: one that is rewritten (after a
    rollback, with another cursor) has a stand-in until the new one is in place.

    Args:
        run: the run folder, of which this process is the newest start.
        folder: the checkpoint, RUN/checkpoints/step_N.
        files: tensors by name of each file, "model" and "optimizer".
        state: state of the training loop.
        config: the run's config.
        extra: further fields of state.json: the loss scale, checksums of tokens, and what the engine remembers.

    Raises:
        OSError: it cannot be written; existing checkpoints stay intact.
        StaleIncarnationError: a newer start of the run exists.
    """
    run.require_current()
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    temporary = run.checkpoints / f".{folder.name}.{run.incarnation}"
    remove(temporary)
    temporary.mkdir()
    try:
        digests = {}
        for kind, tensors in files.items():
            path = temporary / f"{kind}.safetensors"
            save_tensors(tensors, path)
            sync(path)
            digests[path.name] = sha256_of(path)
        cursor = dataclasses.asdict(state.cursor) if state.cursor else None
        values = {"format": FORMAT, "step": state.step, "cursor": cursor, "health": state.health}
        values |= {"config": dump(config), "sha256": digests, **extra}
        values["prolonged"] = dataclasses.asdict(state.prolonged) if state.prolonged else None
        write_json(temporary / "state.json", values)
        run.require_current()
        if folder.exists():
            stand_in = run.checkpoints / f".stand_in_{folder.name}"
            remove(stand_in)
            shutil.copytree(temporary, stand_in, copy_function=_link)
            point_latest(run.checkpoints, stand_in.name)
            remove(folder)
        temporary.rename(folder)
    except BaseException:
        remove(temporary)
        raise
    point_latest(run.checkpoints, folder.name)
    for stand_in in run.checkpoints.glob(".stand_in_*"):
        remove(stand_in)
    keep_every = config.train.keep_every
    for old in sorted(run.checkpoints.glob("step_*"))[: -config.train.keep_last]:
        if not keep_every or int(old.name.removeprefix("step_")) % keep_every:
            remove(old)


def _link(source: str, target: str) -> None:
    """Makes a hard link, or a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def load_latest(run: RunFolder, engine: Engine, config: Config) -> TrainState:
    """Loads the newest checkpoint of a run into `engine`; a collective operation.

    The newest is the one that rank 0 sees: a shared file system may show it to other nodes later.

    Args:
        run: the run folder.
        engine: receives weights, buffers, moments and loss scale.
        config: the config of the resumed run.

    Returns:
        State of the training loop; that of a new run if there is no checkpoint yet.

    Raises:
        ConfigError: `config` changes a field that a resumed run must keep (see pretrain.checkpointing.resume).
        ValueError: the checkpoint is damaged; the message has the remedy.
    """
    newest = latest_checkpoint(run.checkpoints)  # on every rank, so that all end for the same reason
    name = engine.world.from_first(newest.name if newest else "")
    return _load(run.checkpoints / name, engine, config) if name else TrainState()


class NothingToGoBackToError(ValueError):
    """No checkpoint is old enough to roll back to."""


def roll_back(run: RunFolder, engine: Engine, config: Config, before: int) -> TrainState:
    """Loads the newest checkpoint of at most `before` steps into `engine`; a collective operation.

    Newer checkpoints are renamed to `unhealthy_step_N`.

    Args:
        run: the run folder, of which this process is the newest start.
        engine: receives weights, buffers, moments and loss scale.
        config: the run's config.
        before: most steps of the checkpoint.

    Returns:
        State of the training loop at that checkpoint.

    Raises:
        NothingToGoBackToError: no checkpoint is old enough.
        StaleIncarnationError: a newer start of the run exists.
    """
    found = saved_steps(run.checkpoints)
    healthy = max((step for step in found if step <= before), default=None)
    if healthy is None:
        kept = ", ".join(map(str, sorted(found))) or "none"
        raise NothingToGoBackToError(
            f"there is no checkpoint of step {before} or earlier to go back to (there are: {kept}; "
            f"train.checkpoint_every={config.train.checkpoint_every}, train.keep_last={config.train.keep_last})"
        )
    engine.world.agree(str(healthy), "the checkpoint to go back to")
    state = _load(found[healthy], engine, config)
    if engine.world.rank == 0:
        run.require_current()
        point_latest(run.checkpoints, found[healthy].name)  # first, so that it never names a renamed checkpoint
        for step in sorted(step for step in found if step > healthy):
            aside = run.checkpoints / f"unhealthy_step_{step:08d}"
            remove(aside)
            found[step].rename(aside)
    return state


def _load(folder: Path, engine: Engine, config: Config) -> TrainState:
    values = read_state(folder)
    require_same_config(values["config"], config, folder)
    found = prolongation(values["config"], config, values["step"], values.get("prolonged"))
    note = prolongation_notice(values["config"], config, values["step"], found)
    cursor = Cursor(**values["cursor"]) if values["cursor"] else None
    try:
        engine.load_tensors(Tensors(folder), values["step"])
    except (KeyError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: damaged or of another model ({error}); {remedy(folder.parent)}") from error
    if wrong := damage(folder):  # on every rank, so that all end for the same reason
        raise ValueError(f"{folder}: damaged ({wrong}); {remedy(folder.parent)}")
    engine.module.forget()
    engine.scale.load(values.get("loss_scale", {}))
    engine.remember(values.get("engine") or {})
    return TrainState(values["step"], cursor, values.get("health", {}), found, note)
