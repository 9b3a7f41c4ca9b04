"""Signals that end a command in the foreground."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class SignalledError(KeyboardInterrupt):
    """Raised on SIGTERM or SIGHUP."""


@contextlib.contextmanager
def raised_signals() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP raise SignalledError in the block, so that it can clean up.

    SIGHUP stays ignored under nohup. Process 1 of a container would otherwise ignore both.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise SignalledError

    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
