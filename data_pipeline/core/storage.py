"""Folders on local disks and behind fsspec URLs: reads, writes and exclusively creates whole files."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final, TypeVar, cast

import fsspec
import psutil

from data_pipeline.core.atomic_files import sync, write_synced
from data_pipeline.core.retries import PATIENCE, StorageReadError, StorageWriteError, error_text, retry, write_errors
from data_pipeline.core.schema import ConfigError

fsspec.register_implementation("tarmember", "data_pipeline.core.tar_members.TarMemberFileSystem")

T = TypeVar("T")
LEASE: Final = 3600.0
"""Seconds after which a scratch folder that no process renews is abandoned."""
RENEWAL: Final = 120.0
"""Seconds between renewals of a scratch folder in use."""
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
"""Random number of this start of the kernel."""
PID_NAMESPACE: Final = Path("/proc/self/ns/pid")
"""Its inode number identifies the container in which process numbers are valid."""


Stamp = tuple[int, str]
"""Size in bytes, and modification time or version, of a file."""


def stamp_of(info: Mapping[str, Any]) -> Stamp:
    """Returns the stamp of a file from fsspec's information on it."""
    stamp = next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if info.get(key)), "")
    return int(info.get("size") or 0), str(stamp).strip('"')


def is_url(path: str) -> bool:
    """Returns True for `s3://…` and the like; `file://` and plain paths are local."""
    return "://" in path and not path.startswith("file://")


def is_plain_name(name: object) -> bool:
    """Returns whether `name` is a plain file name: no path separators, not hidden, no control characters."""
    if not isinstance(name, str) or not name or name.startswith(".") or len(name.encode(errors="replace")) > 255:
        return False
    return name.isprintable() and not set("/\\") & set(name)


def private_folder() -> Path:
    """Returns a folder below the temporary one that only this user can access; creates it if it is missing.

    Raises:
        StorageWriteError: a file, a link or another user's folder is in its place.
    """
    folder = Path(tempfile.gettempdir()) / f"auricle-{os.getuid()}"
    with write_errors(str(folder)):
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(handle)
            if status.st_uid != os.getuid():
                raise StorageWriteError(
                    str(folder), f"belongs to user {status.st_uid}; set data.cache to a folder of your own, or TMPDIR"
                )
            if status.st_mode & 0o077:
                os.fchmod(handle, 0o700)
        finally:
            os.close(handle)
    return folder


class FileStore:
    """Files below one root, local or remote. Names are relative and use forward slashes.

    Reads raise FileNotFoundError or StorageReadError, writes raise StorageWriteError. Reads of remote storage are
    retried after transient errors.

    Args:
        root: folder or fsspec URL.
        patience: seconds for which reads of remote storage are retried.

    Raises:
        ValueError: the URL needs a package that is not installed.
    """

    def __init__(self, root: str, patience: float = PATIENCE) -> None:
        self.local, self.patience = not is_url(root), patience
        self.root = root if not self.local else str(Path(root.removeprefix("file://")).expanduser().absolute())
        try:
            self.fs, base = fsspec.core.url_to_fs(self.root)
        except ImportError as error:
            raise ConfigError(
                f"{root}: this kind of address needs a package that is not installed ({error}); "
                "for S3 that is `pip install s3fs`"
            ) from None
        self.base = base.rstrip("/") or "/"

    def path(self, name: str = "") -> str:
        """Returns the path of `name` for the file system."""
        return f"{self.base}/{name}" if name else self.base

    def exists(self, name: str = "") -> bool:
        """Returns whether the file or folder exists."""
        try:
            self._reading(name, lambda: self.fs.info(self.path(name)))  # fs.exists hides a failed connection
        except FileNotFoundError:
            return False
        except StorageReadError as error:
            if isinstance(error.__cause__, NotADirectoryError):
                return False
            raise
        return True

    def size(self, name: str) -> int:
        """Returns the size of a file in bytes."""
        return self._reading(name, lambda: int(self.fs.size(self.path(name))))

    def read(self, name: str) -> bytes:
        """Returns the content of a file."""
        return self._reading(name, lambda: bytes(self.fs.cat_file(self.path(name))))

    def open(self, name: str) -> IO[bytes]:
        """Opens a file to read parts of it."""
        return cast("IO[bytes]", self._reading(name, lambda: self.fs.open(self.path(name), "rb")))

    def lines(self, name: str) -> Iterator[bytes]:
        """Yields the lines of a file, which need not fit into memory, without their newlines.

        Raises:
            FileNotFoundError: the file does not exist.
            StorageReadError: it cannot be read.
        """
        with self.open(name) as file:
            try:
                for line in file:
                    yield line.removesuffix(b"\n")
            except Exception as error:  # every protocol of fsspec has its own exceptions
                raise StorageReadError(self._shown(name), f"cannot be read: {error_text(error)}") from None

    def is_file(self) -> bool:
        """Returns whether the root is a file instead of a folder; False where nothing is there."""
        try:
            return bool(self._reading("", lambda: self.fs.info(self.path()))["type"] == "file")
        except FileNotFoundError:
            return False

    def matching_folders(self, mark: str) -> list[str]:
        """Returns the folders that the root matches, which is a pattern, and that contain `mark`; sorted."""
        self.fs.invalidate_cache()
        try:
            found = self._reading("", lambda: self.fs.glob(self.path(mark)))
        except FileNotFoundError:
            return []
        folders = [str(path).rstrip("/").removesuffix(f"/{mark}") for path in found]
        return sorted(folders if self.local else map(self.fs.unstrip_protocol, folders))

    def names(self, folder: str = "", suffix: str = "", prefix: str = "") -> list[str]:
        """Returns the sorted names in `folder` with this prefix and suffix; [] if the folder does not exist."""
        self.fs.invalidate_cache()
        try:
            found = self._reading(folder, lambda: list(self.fs.ls(self.path(folder), detail=False)))
        except FileNotFoundError:
            return []
        except StorageReadError as error:
            if isinstance(error.__cause__, NotADirectoryError):
                return []
            raise
        names = (path.rstrip("/").rsplit("/", 1)[-1] for path in found)
        return sorted(name for name in names if name and name.endswith(suffix) and name.startswith(prefix))

    def stamps(self, folder: str = "", suffix: str = "") -> dict[str, Stamp]:
        """Returns the stamp of each file in `folder` with this suffix, sorted by name; {} if there is no folder."""
        self.fs.invalidate_cache()
        try:
            found = self._reading(folder, lambda: list(self.fs.ls(self.path(folder), detail=True)))
        except FileNotFoundError:
            return {}
        except StorageReadError as error:
            if isinstance(error.__cause__, NotADirectoryError):
                return {}
            raise
        named = {info["name"].rstrip("/").rsplit("/", 1)[-1]: info for info in found if info["type"] == "file"}
        return {name: stamp_of(named[name]) for name in sorted(named) if name.endswith(suffix)}

    def read_several(self, names: Sequence[str]) -> list[bytes]:
        """Returns the contents of some files; those of remote storage are requested concurrently."""
        if self.local:
            return [self.read(name) for name in names]
        paths = [self.path(name) for name in names]
        found = self._reading(names[0] if names else "", lambda: self.fs.cat(paths)) if paths else {}
        return [bytes(found[path]) for path in paths]

    def free_bytes(self) -> int:
        """Returns the free space on the disk of a local root, which need not exist yet."""
        return shutil.disk_usage(self._existing()).free

    def temporary_place(self) -> Path | None:
        """Returns a folder for files without a name, on the disk of a local root; None: that for temporary files."""
        folder = self._existing() if self.local else None
        return folder if folder and folder.is_dir() and os.access(folder, os.W_OK) else None

    def _existing(self) -> Path:
        """Returns the path of a local root, or the folder in which it would be created."""
        folder = Path(self.base)
        while not folder.exists():
            folder = folder.parent
        return folder

    def put(self, source: Path, name: str) -> None:
        """Moves a complete local file to `name` atomically; replaces a file of that name."""
        with write_errors(self._shown(name)):
            if not self.local:
                self.fs.put_file(str(source), self.path(name))
                source.unlink()
                return
            target = Path(self.path(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)
            sync(target.parent)

    def create(self, name: str, content: bytes) -> bool:
        """Creates a file atomically and exclusively; returns False if it exists."""
        with write_errors(self._shown(name)):
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
        """Writes a file atomically; replaces a file of that name."""
        with self.scratch() as folder:
            with write_errors(self._shown(name)):
                write_synced(folder / "file", content)
            self.put(folder / "file", name)

    def remove(self, name: str) -> None:
        """Removes a file if it exists."""
        with write_errors(self._shown(name)), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    @contextlib.contextmanager
    def scratch(self, prefix: str = "") -> Iterator[Path]:
        """Provides a new local folder in the block; below `.tmp` of a local root, so that renames are atomic.

        Its name identifies the process, also by a random id, and its modification time is renewed while it is in use;
        `sweep` uses both.
        """
        parent = Path(self.path(".tmp")) if self.local else None
        with write_errors(self._shown(".tmp")):
            if parent is not None:
                parent.mkdir(parents=True, exist_ok=True)
            pid = os.getpid()
            process = f"{machine_id()}+{pid}+{_started(pid)}+{process_id(pid)}"
            made = Path(tempfile.mkdtemp(prefix=f"{prefix}{process}+", dir=parent))
        done = threading.Event()
        threading.Thread(target=_renew, args=(made, done), name="auricle-lease", daemon=True).start()
        try:
            yield made
        finally:
            done.set()
            shutil.rmtree(made, ignore_errors=True)

    def sweep(self) -> int:
        """Removes scratch folders of ended processes, and returns their number.

        Processes of this machine (and container) are looked up. Others count as ended if their folder was not renewed
        for LEASE seconds, by the clock of the storage; so do folders with this process's host name, process number and
        start time but another random id.
        """
        parent = Path(self.path(".tmp"))
        if not self.local or not parent.is_dir():
            return 0
        with tempfile.NamedTemporaryFile(dir=parent) as probe:
            now = os.fstat(probe.fileno()).st_mtime
        dead = [left for left in parent.iterdir() if left.is_dir() and _is_abandoned(left, now)]
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

    def _reading(self, name: str, action: Callable[[], T]) -> T:
        return retry(action, self._shown(name), 0.0 if self.local else self.patience)

    def _shown(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root


@functools.cache
def machine_id() -> str:
    """Returns an id of this kernel and process namespace, which containers with the same host name do not share."""
    parts = [os.uname().nodename]
    try:
        parts += [BOOT_ID.read_text(encoding="ascii"), str(PID_NAMESPACE.stat().st_ino)]
    except OSError:  # not on Linux, or hidden by a sandbox: a unique id, so that leases decide
        parts.append(secrets.token_hex(16))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _started(pid: int) -> int:
    """Returns the start time of a process, in seconds since 1970; 0 if it does not exist."""
    try:
        return int(psutil.Process(pid).create_time())
    except psutil.Error:
        return 0


@functools.cache
def process_id(pid: int) -> str:
    """Returns the random id of this process, whose number is `pid`; forked children have their own."""
    return secrets.token_hex(8)


def _is_abandoned(folder: Path, now: float) -> bool:
    _, is_here, rest = folder.name.rpartition(f"{machine_id()}+")
    pid, started, random_id = (*rest.split("+"), "", "", "")[:3]
    if is_here and pid.isdecimal() and started.isdecimal() and int(started):
        # the boot time that start times are computed from is rounded
        is_running = abs(_started(int(pid)) - int(started)) <= 2
        if int(pid) != os.getpid() or not is_running:
            return not is_running
        if random_id == process_id(os.getpid()):
            return False
    try:
        return now - folder.stat().st_mtime > LEASE
    except FileNotFoundError:
        return False


def _renew(folder: Path, done: threading.Event) -> None:
    while not done.wait(RENEWAL):
        with contextlib.suppress(OSError):
            os.utime(folder)
