"""Finds the checkpoints of a run; all code reads and writes `checkpoints/latest` through this module."""

from __future__ import annotations

import re
from pathlib import Path

from data_pipeline.core.atomic_files import sync, write_atomically
from data_pipeline.core.json_object import DamagedFileError
from data_pipeline.core.schema import ConfigError, did_you_mean, suggest

POINTER = "latest"
"""File in a run's checkpoints folder with the name of the newest complete checkpoint."""
_NAME = re.compile(r"(?:\.stand_in_)?step_([0-9]{1,18})")
_LONGEST = 200
"""Most bytes of the file that are read."""


def latest_name(checkpoints: Path) -> str:
    """Returns the name in CHECKPOINTS/latest; "" if no checkpoint was saved yet.

    Args:
        checkpoints: The checkpoints folder of a run.

    Raises:
        DamagedFileError: The file does not contain the name of a checkpoint.
        OSError: The file cannot be read.
    """
    pointer = checkpoints / POINTER
    try:
        with pointer.open("rb") as file:
            content = file.read(_LONGEST).strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    name = content.decode("utf-8", errors="backslashreplace")
    if not _NAME.fullmatch(name):
        raise DamagedFileError(
            f"{pointer}: must hold the name of a checkpoint, such as step_00000100, not {name[:40]!r}; "
            f"{remedy(checkpoints)}"
        )
    return name


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """Returns the folder of the newest complete checkpoint; None if none was saved yet.

    Raises:
        DamagedFileError: CHECKPOINTS/latest does not name an existing checkpoint.
    """
    name = latest_name(checkpoints)
    if not name:
        return None
    if not (checkpoints / name).is_dir():
        raise DamagedFileError(f"{checkpoints / POINTER}: names {name}, which does not exist; {remedy(checkpoints)}")
    return checkpoints / name


def point_latest(checkpoints: Path, name: str) -> None:
    """Makes CHECKPOINTS/latest name a checkpoint, atomically, once that checkpoint is on disk."""
    sync(checkpoints)
    write_atomically(checkpoints / POINTER, name + "\n")


def steps_done(run: Path) -> int:
    """Returns the step of the newest checkpoint of a run folder; 0 without one.

    Raises:
        DamagedFileError: checkpoints/latest does not contain the name of a checkpoint.
    """
    found = _NAME.fullmatch(latest_name(run / "checkpoints"))
    return int(found[1]) if found else 0


def saved_steps(checkpoints: Path) -> dict[int, Path]:
    """Returns the existing checkpoints by step, in ascending order."""
    named = ((_NAME.fullmatch(path.name), path) for path in checkpoints.glob("step_*") if path.is_dir())
    return dict(sorted((int(match[1]), path) for match, path in named if match))


def remedy(checkpoints: Path) -> str:
    """Returns the remedy for a newest checkpoint that cannot be used, for an error message."""
    names = [path.name for path in saved_steps(checkpoints).values()]
    if not names:
        return f"no checkpoint is left in {checkpoints}: start the run under another name="
    return f"write the name of a complete checkpoint into {checkpoints / POINTER} (there are: {', '.join(names)})"


def find_checkpoint(given: str) -> Path:
    """Returns the checkpoint folder of a path given by the user.

    Args:
        given: a run folder, a checkpoints folder (both give the newest checkpoint), a checkpoint, or a Hugging Face
            folder.

    Raises:
        ConfigError: the path is none of these.
        DamagedFileError: `latest` of the run does not name a checkpoint that exists.
    """
    path = Path(given).expanduser()
    for folder in (path / "checkpoints", path):
        if found := latest_checkpoint(folder):
            return found
    if (path / "state.json").is_file() or (path / "config.json").is_file():
        return path
    raise ConfigError(
        f"checkpoint={given}: not a run folder with a checkpoint, a checkpoint (state.json) or a Hugging Face folder "
        f"(config.json){near(path)}"
    )


def near(path: Path) -> str:
    """Returns a hint: runs/NAME for the name of a run, or the sibling folder of the most similar name; or ""."""
    if (run := Path("runs", path.name)).is_dir() and not path.exists():
        return did_you_mean(str(run))
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir() and entry.name != path.name]
    except OSError:
        return ""
    name = suggest(path.name, names)
    return did_you_mean(str(path.parent / name) if name else "")
