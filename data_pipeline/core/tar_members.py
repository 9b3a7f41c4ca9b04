"""The fsspec protocol `tarmember://`: reads members of tars as byte ranges.

    tarmember://OFFSET+SIZE/PATH OF THE TAR/NAME OF THE MEMBER        both names percent-encoded

With it, code that opens fsspec URLs reads a member without unpacking or scanning its tar.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import quote, unquote

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

PROTOCOL: Final = "tarmember"
CHUNK: Final = 1 << 20


@dataclass(frozen=True)
class TarMember:
    """A regular file in a tar."""

    tar: str
    """Path or URL of the tar."""
    name: str
    offset: int
    """Position of its content in the tar, in bytes."""
    size: int

    @property
    def url(self) -> str:
        """The URL of the member for fsspec."""
        return f"{PROTOCOL}://{self.offset}+{self.size}/{quote(self.tar, safe='')}/{quote(self.name, safe='')}"

    @staticmethod
    def from_path(path: str) -> TarMember:
        """Parses the URL without the protocol. Raises FileNotFoundError if it is malformed."""
        place, _, rest = path.removeprefix(f"{PROTOCOL}://").partition("/")
        tar, _, name = rest.partition("/")
        offset, _, size = place.partition("+")
        if not (offset.isdecimal() and size.isdecimal() and tar and name):
            raise FileNotFoundError(path)
        return TarMember(unquote(tar), unquote(name), int(offset), int(size))


def list_members(tar: str) -> Iterator[TarMember | tarfile.TarInfo]:
    """Yields the regular files of an uncompressed tar, and the header of each other member that is not a folder.

    Args:
        tar: local path or fsspec URL.

    Raises:
        tarfile.TarError: the file is not a tar, or ends inside a member; raised after the members before.
        OSError: the file cannot be read.
    """
    with fsspec.open(tar, "rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                archive.members = []  # type: ignore[attr-defined]  # it keeps every header otherwise
                if info.isreg() and info.offset_data + info.size > size:
                    raise tarfile.ReadError(f"ends in the middle of {info.name}")
                if info.isreg():
                    yield TarMember(tar, info.name, info.offset_data, info.size)
                elif not info.isdir():
                    yield info


def read_member(member: TarMember) -> bytes:
    """Returns the content of a member. Raises OSError."""
    with fsspec.open(member.tar, "rb") as file:
        file.seek(member.offset)
        return bytes(file.read(member.size))


class TarMemberFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Reads members of tars by their position."""

    protocol = PROTOCOL

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Returns the size of a member and the version of its tar."""
        member = TarMember.from_path(path)
        fs, tar = fsspec.core.url_to_fs(member.tar)
        if isinstance(fs, LocalFileSystem):
            return {"name": path, "size": member.size, "type": "file", "mtime": Path(tar).stat().st_mtime_ns}
        fs.invalidate_cache()
        about = fs.info(tar)
        version = {key: about[key] for key in ("ETag", "etag", "mtime", "LastModified", "created") if key in about}
        return {"name": path, "size": member.size, "type": "file", **version}

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        """Copies a member to a local file."""
        member = TarMember.from_path(rpath)
        with fsspec.open(member.tar, "rb") as source, Path(lpath).open("wb") as target:
            source.seek(member.offset)
            left = member.size
            while left and (data := source.read(min(left, CHUNK))):
                target.write(data)
                left -= len(data)

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> IO[bytes]:
        return io.BytesIO(read_member(TarMember.from_path(path)))
