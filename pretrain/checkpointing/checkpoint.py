"""The checkpoint format: two safetensors files and one JSON, the same for every engine, ZeRO stage and rank count.

    checkpoints/step_00000100/model.safetensors      weights and buffers of the TrainModule, fp32
                              optimizer.safetensors  exp_avg/NAME, exp_avg_sq/NAME
                              state.json             step, reader cursor, health's memory, loss scale, config, sha256
    checkpoints/latest                               the name of the newest whole one

Nothing in it is executed on loading (no pickle).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.core.atomic_files import remove, sha256_of, sync, write_atomically, write_json
from data_pipeline.core.schema import ConfigError, dump
from data_pipeline.core.types import Cursor
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.checkpointing.tensor_files import save_tensors
from pretrain.config import Config
from pretrain.engines.base import Engine

FORMAT = 1
MAY_CHANGE = (
    "name",
    "runs",
    "device",
    "engine.",
    "train.",
    "health.",
    "data.workers",
    "data.prefetch",
    "data.verify",
    "data.on_bad",
)
"""Config fields that a resumed run may change without becoming another run."""


@dataclasses.dataclass(frozen=True, slots=True)
class TrainState:
    """Everything the loop must remember besides tensors."""

    step: int = 0
    cursor: Cursor | None = None
    health: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the health watch remembers, as plain JSON."""


class Saver:
    """Saves checkpoints; a context manager, so that a write that has begun is finished whatever ends the loop.

    Copying the tensors together is a collective; writing them is rank 0's, in a thread where `train.save_behind`.
    """

    def __init__(self, run: RunFolder, engine: Engine, config: Config) -> None:
        self._run, self._engine, self._config = run, engine, config
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._pool.shutdown(wait=True)
        if kind is None:
            self.wait()

    def save(self, state: TrainState) -> Path:
        """Saves this moment. Raises what the write before this one raised: OSError when the disk is full,
        StaleIncarnationError when a newer start of the run exists. The checkpoints already there stay whole.
        """
        folder = self._run.checkpoints / f"step_{state.step:08d}"
        if self._engine.world.rank != 0:
            for _ in self._engine.tensors():
                pass
            return folder
        self.wait()
        self._run.require_current()
        files, scale = _gather(self._engine), self._engine.scale.state()
        self._pending = self._pool.submit(_write, self._run, folder, files, state, self._config, scale)
        if not self._config.train.save_behind:
            self.wait()
        return folder

    def wait(self) -> None:
        """Returns once the last save is whole on the disk; raises what it raised."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()


def _gather(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """Copies of all tensors by file: the next step must not change what is being written."""
    files: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for name, tensor in engine.tensors():
        kind, _, rest = name.partition("/")
        if kind == "model":
            files["model"][rest] = tensor
        else:
            files["optimizer"][name] = tensor
    return files


def _write(
    run: RunFolder,
    folder: Path,
    files: Mapping[str, dict[str, Tensor]],
    state: TrainState,
    config: Config,
    scale: Mapping[str, Any],
) -> None:
    """Writes beside, then moves into place, then points `latest` there, then removes what is old.

    Whenever it is cut off, `latest` names a whole checkpoint: one that is written again (after a roll-back, with
    another cursor) has a stand-in meanwhile.
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
        values |= {"config": dump(config), "sha256": digests, "loss_scale": dict(scale)}
        write_json(temporary / "state.json", values)
        run.require_current()
        if folder.exists():
            stand_in = run.checkpoints / f".stand_in_{folder.name}"
            remove(stand_in)
            shutil.copytree(temporary, stand_in, copy_function=_link)
            _point_latest(run, stand_in)
            remove(folder)
        temporary.rename(folder)
    except BaseException:
        remove(temporary)
        raise
    _point_latest(run, folder)
    for stand_in in run.checkpoints.glob(".stand_in_*"):
        remove(stand_in)
    keep_every = config.train.keep_every
    for old in sorted(run.checkpoints.glob("step_*"))[: -config.train.keep_last]:
        if not keep_every or int(old.name.removeprefix("step_")) % keep_every:
            remove(old)


def _link(source: str, target: str) -> None:
    """Another name for the same file; a copy where the file system knows no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _point_latest(run: RunFolder, folder: Path) -> None:
    sync(run.checkpoints)
    write_atomically(run.checkpoints / "latest", folder.name + "\n")


def load_latest(run: RunFolder, engine: Engine, config: Config) -> TrainState:
    """Puts the newest checkpoint into `engine`; an empty state where there is none yet.

    Raises ConfigError when the checkpoint belongs to another config, ValueError when it is damaged.
    """
    latest = run.checkpoints / "latest"
    if not latest.exists():
        return TrainState()
    return _load(run, run.checkpoints / latest.read_text(encoding="utf-8").strip(), engine, config)


class NothingToGoBackToError(ValueError):
    """No checkpoint is old enough."""


def roll_back(run: RunFolder, engine: Engine, config: Config, before: int) -> TrainState:
    """Puts the newest checkpoint of at most `before` steps into `engine`; a collective.

    Newer ones are set aside as `unhealthy_step_N`. Raises NothingToGoBackToError where there is no such checkpoint
    (any more), StaleIncarnationError when a newer start of the run exists.
    """
    found = {int(path.name.removeprefix("step_")): path for path in run.checkpoints.glob("step_*")}
    healthy = max((step for step in found if step <= before), default=None)
    if healthy is None:
        kept = ", ".join(map(str, sorted(found))) or "none"
        raise NothingToGoBackToError(
            f"there is no checkpoint of step {before} or earlier to go back to (there are: {kept}; "
            f"train.checkpoint_every={config.train.checkpoint_every}, train.keep_last={config.train.keep_last})"
        )
    state = _load(run, found[healthy], engine, config)
    engine.world.agree(str(healthy), "the checkpoint to go back to")
    if engine.world.rank == 0:
        run.require_current()
        _point_latest(run, found[healthy])  # first, so that it never names what is set aside
        for step in sorted(step for step in found if step > healthy):
            aside = run.checkpoints / f"unhealthy_step_{step:08d}"
            remove(aside)
            found[step].rename(aside)
    return state


def _load(run: RunFolder, folder: Path, engine: Engine, config: Config) -> TrainState:
    values = read_state(folder)
    require_same_config(values["config"], config, folder)
    cursor = Cursor(**values["cursor"]) if values["cursor"] else None
    try:
        engine.load_tensors(Tensors(folder), values["step"])
    except (KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: damaged or of another model ({error}); {remedy(run)}") from error
    if wrong := damage(folder):  # on every rank, so that all end for the same reason
        raise ValueError(f"{folder}: damaged ({wrong}); {remedy(run)}")
    engine.scale.load(values.get("loss_scale", {}))
    return TrainState(values["step"], cursor, values.get("health", {}))


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint. Raises ValueError when it is not whole or of another format."""
    try:
        values: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}: not a whole auricle checkpoint ({error})") from error
    if values.get("format") != FORMAT:
        raise ValueError(f"{folder}: checkpoint format {values.get('format')!r}, this version reads {FORMAT}")
    return values


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, read whole and compared with its checksums; empty where nothing is."""
    try:
        digests = read_state(folder).get("sha256", {})
        for name in ("model.safetensors", "optimizer.safetensors"):
            with safe_open(folder / name, framework="pt"):
                pass
            if name in digests and digests[name] != sha256_of(folder / name):
                return f"{folder / name} is not as it was written"
    except (OSError, ValueError, SafetensorError) as error:
        return f"{folder} cannot be read ({error})"
    return ""


def require_same_config(saved: Mapping[str, Any], config: Config, folder: Path) -> None:
    """Raises ConfigError naming each field in which a resumed run would silently become another one."""
    before, now = dict(_leaves(saved)), dict(_leaves(dump(config)))
    changed = [
        f"{path}: {before.get(path, '(absent)')!r} in the checkpoint, {now.get(path, '(absent)')!r} now"
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path) and not path.startswith(MAY_CHANGE)
    ]
    if changed:
        raise ConfigError(
            f"{folder} belongs to another config. Start under another name=, or set these back: " + "; ".join(changed)
        )


class Tensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by the engine's names, each read when asked for."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        for kind in ("model", "optimizer"):
            path = folder / f"{kind}.safetensors"
            if not path.exists():
                raise KeyError(f"{path.name} is missing")
            self._files[kind] = safe_open(path, framework="pt")

    def __getitem__(self, name: str) -> Tensor:
        kind, _, rest = name.partition("/")
        file, key = (self._files["model"], rest) if kind == "model" else (self._files["optimizer"], name)
        tensor: Tensor = file.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        yield from (f"model/{key}" for key in self._files["model"].keys())  # noqa: SIM118
        yield from self._files["optimizer"].keys()

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def remedy(run: RunFolder) -> str:
    """What to do about a checkpoint that is no good."""
    others = sorted(path.name for path in run.checkpoints.glob("step_*"))
    return f"write another whole one's name into {run.checkpoints / 'latest'} (there are: {', '.join(others)})"
