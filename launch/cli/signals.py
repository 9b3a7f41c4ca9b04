"""Signals that end a command in the foreground."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class SignalledError(KeyboardInterrupt):
    """Raised on SIGTERM or SIGHUP."""


RETRY_SECONDS = 0.02
"""Seconds after which an interrupt that came in a callback is raised again."""


@contextlib.contextmanager
def kept_interrupts() -> Iterator[None]:
    """Makes Ctrl-C wait in the block until no callback of soundfile runs.

    libsndfile reads files through functions in Python. An exception in one of them is printed with its traceback, reads
    as a damaged file, and is lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        if _in_callback(frame):
            again = threading.Timer(RETRY_SECONDS, os.kill, (os.getpid(), signal.SIGINT))
            again.daemon = True
            again.start()
        else:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is interrupt:
            signal.signal(signal.SIGINT, before)


def _in_callback(frame: FrameType | None) -> bool:
    while frame is not None:
        code = frame.f_code
        if code.co_name.startswith("vio_") and code.co_filename.endswith("soundfile.py"):
            return True
        frame = frame.f_back
    return False


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
