"""The run folder, in which only the newest start (incarnation) of a run may write."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from data_pipeline.core.json_object import read_object


class StaleIncarnationError(RuntimeError):
    """A newer start of the same run exists; this one must no longer write."""


class RunFolder:
    """The folder RUNS/NAME. Each start of a run takes the next incarnation number.

    A node that lost its network connection keeps computing and may reconnect after its job was started elsewhere: its
    incarnation is then older than the newest one, and every write is refused. Rank 0 claims the number and broadcasts
    it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tb"
        self.unhealthy = self.path / "UNHEALTHY"
        self._incarnations = self.path / "incarnations"
        self.incarnation = 0

    def claim(self) -> int:
        """Claims and returns the next incarnation number; exclusive creation gives simultaneous starts two numbers."""
        self._incarnations.mkdir(parents=True, exist_ok=True)
        number = self._newest() + 1
        while True:
            try:
                handle = os.open(self._incarnations / f"{number:06d}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                number += 1
                continue
            os.write(handle, f"{os.uname().nodename} {os.getpid()}\n".encode())
            os.close(handle)
            self.incarnation = number
            return number

    def require_current(self) -> None:
        """Raises StaleIncarnationError if a newer start of this run exists."""
        newest = self._newest()
        if newest != self.incarnation:
            raise StaleIncarnationError(
                f"{self.path}: this process is start number {self.incarnation} of the run and number {newest} exists; "
                "this one ends without writing anything"
            )

    def superseded(self) -> bool:
        """Returns whether a newer start of this run exists; False if this one never claimed a number."""
        try:
            return self.incarnation > 0 and self._newest() != self.incarnation
        except OSError:
            return False

    def _newest(self) -> int:
        return max((int(file.name) for file in start_files(self.path)), default=0)


def start_files(folder: Path) -> list[Path]:
    """Returns the files of the starts of a run folder, each named by its number.

    Other names, such as .nfs0000a1 or .DS_Store, which file systems and tools leave there, are ignored.

    Raises:
        OSError: the run has none yet, or they cannot be listed.
    """
    found = (folder / "incarnations").iterdir()
    return [file for file in found if file.name.isascii() and file.name.isdecimal()]


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json of a run folder as plain values.

    Raises:
        ValueError: The file is missing, or is not the config of a pretraining run.
    """
    file = folder / "config.json"
    try:
        values = read_object(file)
    except FileNotFoundError:
        raise ValueError(f"{folder}: not the folder of a pretraining run ({file.name} is missing)") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); {_RESTORE}") from None
    train = values.get("train")
    if not isinstance(train, dict) or type(train.get("steps")) is not int:  # all callers rely on it
        raise ValueError(f"{file}: train.steps must be an integer; {_RESTORE}")
    return values


_RESTORE = "the same `auricle pretrain` command with --prepare writes it again"
