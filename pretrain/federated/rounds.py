"""The reader of a federated server: it has no audio, only numbers of rounds."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.core.types import Cursor, Step
from pretrain.federated.transport import Devices


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
