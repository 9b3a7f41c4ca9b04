"""The folder that describes a run by itself, and the rule that only its newest incarnation may write there."""

from __future__ import annotations

import os
from pathlib import Path


class StaleIncarnationError(RuntimeError):
    """A newer start of the same run exists; this one must not write any more."""


class RunFolder:
    """RUNS/NAME. Each start of a run takes the next incarnation number.

    A node that was cut off keeps computing and may come back after its job was started elsewhere: its incarnation is
    then older than the newest one, and every write is refused. Rank 0 claims the number and tells it to the others.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tb"
        self.stop_request = self.path / "STOP"
        self.unhealthy = self.path / "UNHEALTHY"
        self._incarnations = self.path / "incarnations"
        self.incarnation = 0

    def claim(self) -> int:
        """Becomes the newest incarnation. Exclusive creation makes two simultaneous starts take two numbers."""
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
        """Raises StaleIncarnationError when a newer start of this run exists."""
        newest = self._newest()
        if newest != self.incarnation:
            raise StaleIncarnationError(
                f"{self.path}: this process is start number {self.incarnation} of the run and number {newest} exists; "
                "it stops here and writes nothing more"
            )

    def superseded(self) -> bool:
        """Whether a newer start of this run is known to exist; no for one that never claimed a number."""
        try:
            return self.incarnation > 0 and self._newest() != self.incarnation
        except OSError:
            return False

    def _newest(self) -> int:
        return max((int(entry.name) for entry in self._incarnations.iterdir()), default=0)
