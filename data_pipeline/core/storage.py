"""A folder, local or behind an fsspec URL: whole files in, whole files out, and one atomic claim."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import psutil

from data_pipeline.core.atomic_files import sync, write_synced
from data_pipeline.core.schema import ConfigError


def is_url(path: str) -> bool:
    """True for `s3://…` and the like; `file://` and plain paths are local."""
    return "://" in path and not path.startswith("file://")


class FileStore:
    """Files below one root. Names are relative and use forward slashes."""

    def __init__(self, root: str) -> None:
        self.local = not is_url(root)
        self.root = root if not self.local else str(Path(root.removeprefix("file://")).expanduser().absolute())
        try:
            self.fs, base = fsspec.core.url_to_fs(self.root)
        except ImportError as error:
            raise ConfigError(
                f"{root}: this kind of address needs a package that is not installed ({error}); "
                "for S3 that is `pip install 'auricle[s3]'`"
            ) from None
        self.base = base.rstrip("/") or "/"

    def path(self, name: str = "") -> str:
        """Where `name` lies, for the file system."""
        return f"{self.base}/{name}" if name else self.base

    def exists(self, name: str = "") -> bool:
        """Whether there is such a file (or folder)."""
        return bool(self.fs.exists(self.path(name)))

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        return int(self.fs.size(self.path(name)))

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises FileNotFoundError."""
        return bytes(self.fs.cat_file(self.path(name)))

    def names(self, folder: str = "", suffix: str = "", prefix: str = "") -> list[str]:
        """Sorted names of what is directly in `folder` and ends (and begins) so; [] where there is no such folder."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self.path(folder), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (path.rstrip("/").rsplit("/", 1)[-1] for path in found)
        return sorted(name for name in names if name and name.endswith(suffix) and name.startswith(prefix))

    def free_bytes(self) -> int:
        """Free space on the disk of a local root, which need not be there yet."""
        folder = Path(self.base)
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def put(self, source: Path, name: str) -> None:
        """Moves a finished local file to `name`, whole or not at all; replaces what is there."""
        if not self.local:
            self.fs.put_file(str(source), self.path(name))
            source.unlink()
            return
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)
        sync(target.parent)

    def create(self, name: str, content: bytes) -> bool:
        """Writes a file that must not be there yet, whole or not at all; False where somebody was faster."""
        if not self.local:
            return self._create_remote(name, content)
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        with self.scratch() as folder:
            write_synced(folder / "claim", content)
            try:
                os.link(folder / "claim", target)
            except FileExistsError:
                return False
        sync(target.parent)
        return True

    def replace(self, name: str, content: bytes) -> None:
        """Writes a file, whole or not at all; replaces what is there."""
        with self.scratch() as folder:
            write_synced(folder / "file", content)
            self.put(folder / "file", name)

    def remove(self, name: str) -> None:
        """Removes a file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    @contextlib.contextmanager
    def scratch(self, prefix: str = "") -> Iterator[Path]:
        """A fresh local folder, removed afterwards; below `.tmp` of a local root so that renames stay atomic.

        Its name holds host and process id, by which `sweep` knows what a killed process left.
        """
        parent = Path(self.path(".tmp")) if self.local else None
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.uname().nodename}+{os.getpid()}+", dir=parent))
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def sweep(self) -> int:
        """Removes scratch folders of dead processes of this host; how many there were."""
        parent = Path(self.path(".tmp"))
        if not self.local or not parent.is_dir():
            return 0
        dead = [left for left in parent.iterdir() if _is_dead(left.name)]
        for left in dead:
            shutil.rmtree(left, ignore_errors=True)
        with contextlib.suppress(OSError):
            parent.rmdir()
        return len(dead)

    def _create_remote(self, name: str, content: bytes) -> bool:
        try:
            self.fs.pipe_file(self.path(name), content, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if "PreconditionFailed" in str(error) or "pre-conditions" in str(error):
                return False
            raise
        return True


def _is_dead(name: str) -> bool:
    _, mark, rest = name.rpartition(f"{os.uname().nodename}+")
    pid = rest.partition("+")[0]
    return bool(mark) and pid.isdigit() and not psutil.pid_exists(int(pid))
