"""Storage: read and write errors differ in type, transient errors are retried, and file names are validated."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from yarl import URL

from data_pipeline.core.retries import StorageReadError, StorageWriteError, is_transient, retry
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import FileStore, is_plain_name
from tests.support.clock import skip_pauses


def http(status: int) -> aiohttp.ClientResponseError:
    about = aiohttp.RequestInfo(URL("http://x/y.tar"), "GET", None, URL("http://x/y.tar"))  # type: ignore[arg-type]
    return aiohttp.ClientResponseError(about, (), status=status)


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (ConnectionResetError(errno.ECONNRESET, "reset"), True),
        (TimeoutError("slow"), True),
        (OSError(errno.EIO, "I/O error"), True),
        (OSError("wrapped by fsspec"), True),
        (aiohttp.ServerDisconnectedError(), True),
        (aiohttp.ClientPayloadError("short body"), True),
        (http(500), True),
        (http(503), True),
        (http(429), True),
        (http(403), False),
        (http(404), False),
        (FileNotFoundError("gone"), False),
        (PermissionError(errno.EACCES, "denied"), False),
        (OSError(errno.ENOSPC, "full"), False),
        (ValueError("not storage"), False),
    ],
)
def test_transient_errors_are_recognised(error: Exception, transient: bool) -> None:
    assert is_transient(error) == transient


def failing(times: int, error: Exception) -> Callable[[], str]:
    left = [times]

    def action() -> str:
        if left[0]:
            left[0] -= 1
            raise error
        return "content"

    return action


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_pauses(monkeypatch)


def test_transient_errors_are_retried_until_the_time_limit() -> None:
    assert retry(failing(5, ConnectionResetError(errno.ECONNRESET, "reset")), "s3://b/x.tar", 60) == "content"
    with pytest.raises(StorageReadError, match=r"s3://b/x\.tar: cannot be read for 60 s") as refused:
        retry(failing(10**6, TimeoutError("slow")), "s3://b/x.tar", 60)
    assert not isinstance(refused.value, ConfigError)
    with pytest.raises(StorageReadError, match="Permission denied"):
        retry(failing(1, PermissionError(errno.EACCES, "Permission denied")), "s3://b/x.tar", 60)
    with pytest.raises(FileNotFoundError):
        retry(failing(1, FileNotFoundError("x")), "s3://b/x.tar", 60)


def test_read_and_write_errors_have_different_types(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path / "set"))
    store.replace("a", b"1")
    (tmp_path / "set" / "folder").mkdir()
    with pytest.raises(StorageReadError, match="set/folder"):
        store.read("folder")
    with pytest.raises(FileNotFoundError):
        store.read("missing")
    with pytest.raises(StorageWriteError, match="set/folder"):
        store.replace("folder", b"1")
    with pytest.raises(StorageWriteError, match="a/b"):
        store.create("a/b", b"1")
    assert not store.exists("a/b")


def test_errors_can_be_pickled_between_processes() -> None:
    for error in (StorageReadError("s3://b/x", "gone"), StorageWriteError("/out", "full")):
        other = pickle.loads(pickle.dumps(error))
        assert (type(other), str(other), other.path) == (type(error), str(error), error.path)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../x", "a\\b", "a\0b", "a\nb", "x" * 256, None, 7])
def test_unsafe_names_are_rejected(name: object) -> None:
    assert not is_plain_name(name)
    assert is_plain_name("unit-07.train_a")
