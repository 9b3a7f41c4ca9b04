"""Errors of storage, and retries of reads that a lost connection or an overloaded server interrupted."""

from __future__ import annotations

import contextlib
import errno
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

T = TypeVar("T")
PATIENCE: Final = 60.0
"""Seconds that reads of remote storage are retried by default."""
LONGEST_PAUSE: Final = 15.0
"""Seconds between two attempts, at most."""
TRANSIENT_ERRNO: Final = frozenset(
    {
        None, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EPIPE, errno.ECONNRESET,
        errno.ECONNREFUSED, errno.ECONNABORTED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN,
    }
)  # fmt: skip


class StorageError(OSError):
    """Raised if storage cannot read or write a file; not a fault of the config or of the data."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.reason)


class StorageReadError(StorageError):
    """Raised for a file that exists but cannot be read."""


class StorageWriteError(StorageError):
    """Raised for a file that cannot be written: full disk, missing permission, read-only or unreachable storage."""


@contextlib.contextmanager
def write_errors(path: str) -> Iterator[None]:
    """Converts an OSError in the block to StorageWriteError for `path`; StorageError is passed on."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageWriteError(path, f"cannot be written ({error_text(error)})") from error


def error_text(error: BaseException) -> str:
    """Describes an error in a short text: the system's message, or type and message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def is_transient(error: BaseException) -> bool:
    """Returns whether an access to remote storage may succeed later: lost connection, time-out, HTTP 408, 429, 5xx."""
    permanent = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
    if isinstance(error, permanent):
        return False
    aiohttp, botocore = sys.modules.get("aiohttp"), sys.modules.get("botocore.exceptions")
    if aiohttp is not None and isinstance(error, aiohttp.ClientError):
        is_status = isinstance(error, aiohttp.ClientResponseError)
        return not is_status or error.status >= 500 or error.status in (408, 429)
    if botocore is not None and isinstance(error, botocore.BotoCoreError):
        kinds = (botocore.HTTPClientError, botocore.ConnectionError, botocore.IncompleteReadError)
        return isinstance(error, kinds)
    return isinstance(error, OSError) and error.errno in TRANSIENT_ERRNO


class Backoff:
    """Exponential backoff between attempts at a read, with jitter, so that ranks do not retry simultaneously.

    Args:
        patience: seconds after the first failure in which the last attempt must begin.
    """

    def __init__(self, patience: float) -> None:
        self._patience, self._deadline, self._pause = patience, 0.0, 0.5

    def wait(self) -> bool:
        """Pauses before the next attempt; returns False at once if no time is left for another."""
        now = time.monotonic()
        self._deadline = self._deadline or now + self._patience
        if now + self._pause > self._deadline:
            return False
        time.sleep(self._pause * random.uniform(0.75, 1.25))
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        return True


def retry(action: Callable[[], T], path: str, patience: float = PATIENCE) -> T:
    """Calls `action`, and again with growing pauses after transient errors.

    Args:
        action: reads from storage; may be called several times.
        path: the file to read, for the error.
        patience: seconds after the first error in which the action must succeed.

    Raises:
        StorageReadError: the storage did not recover in time, or refuses access.
        FileNotFoundError: the file does not exist.
        StorageWriteError: the action could not write its result.
    """
    backoff = Backoff(patience)
    while True:
        try:
            return action()
        except (FileNotFoundError, StorageWriteError):
            raise
        except Exception as error:
            transient = is_transient(error)
            if not transient and not isinstance(error, OSError):
                raise
            if not transient or not backoff.wait():
                tried = f" for {patience:g} s" if transient else ""
                raise StorageReadError(path, f"cannot be read{tried} ({error_text(error)})") from error
