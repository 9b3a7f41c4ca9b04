"""The interface between the server's engine and the devices, wherever they run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol


class Reply(NamedTuple):
    """A message that a device sent: the bytes of an `Answer`, or the error that it reports."""

    device: str
    """Name that the transport knows the sender by."""
    message: bytes
    error: str = ""


class Devices(Protocol):
    """Devices that can be asked; they come and go."""

    def present(self) -> Sequence[str]:
        """Returns the names of the devices that are connected now."""
        ...

    def ask(self, names: Sequence[str], request: bytes, seconds: float) -> Iterable[Reply]:
        """Sends a request to devices and returns what arrives within `seconds`, in any order.

        Replies may be missing, late (to an earlier request) or doubled; the caller checks them.
        """
        ...

    def sum(self, names: Sequence[str], request: bytes, seconds: float, least: int) -> tuple[list[str], bytes]:
        """Asks devices for vectors of which the server learns the mean alone (secure aggregation).

        Args:
            names: devices, at least two.
            request: a request with `clip` above 0.
            seconds: for each exchange of the protocol.
            least: number of devices without which nothing is learned.

        Returns:
            The devices in the mean, sorted, and the mean as float64 in bytes; no devices where too few answered.
        """
        ...

    def close(self) -> None:
        """Disconnects."""
        ...
