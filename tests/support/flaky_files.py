"""Storage that fails: an fsspec protocol, and an HTTP server on loopback, that refuse or cut off named files."""

from __future__ import annotations

import contextlib
import errno
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem


class FlakyFileSystem(LocalFileSystem):  # type: ignore[misc]  # fsspec has no types
    """The local disk as `flaky://`, where reading some names fails with the error given for them."""

    protocol: ClassVar[tuple[str, ...]] = ("flaky",)
    failing: ClassVar[dict[str, BaseException]] = {}

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return LocalFileSystem._strip_protocol(str(path).removeprefix("flaky://"))

    def unstrip_protocol(self, name: str) -> str:
        """Returns the URL of a name."""
        return f"flaky://{self._strip_protocol(name)}"

    def get_file(self, path1: str, path2: Any, callback: Any = None, **kwargs: Any) -> None:
        """Copies a file, or fails."""
        error = self.failing.get(Path(path1).name)
        if error is not None:
            raise error
        super().get_file(self._strip_protocol(path1), path2, **kwargs)


@contextlib.contextmanager
def flaky(**failing: BaseException) -> Iterator[None]:
    """Makes reads of `flaky://` files with the given stems fail with the given errors."""
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    FlakyFileSystem.failing = {f"{stem}.wav": error for stem, error in failing.items()}
    try:
        yield
    finally:
        FlakyFileSystem.failing = {}


def denied() -> PermissionError:
    """Returns the error of an object store for an object without read permission."""
    return PermissionError(errno.EACCES, "Access Denied")


@contextlib.contextmanager
def web_server(folder: Path) -> Iterator[str]:
    """Serves a folder; files called `403.wav`, `500.wav` and `short.wav` fail when they are fetched. Yields the URL."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, directory=str(folder), **kwargs)

        def do_GET(self) -> None:
            name = Path(self.path).name
            content = (folder / name).read_bytes()
            if name in ("403.wav", "500.wav"):
                self.send_error(int(name[:3]))
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if name == "short.wav" else content)

        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
