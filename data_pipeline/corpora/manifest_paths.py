"""Finds the files that rows of a manifest name, and those of them that must not be read."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Final

from data_pipeline.core.lru import LruCache
from data_pipeline.core.storage import is_url

PLAIN: Final = re.compile(r"(?:(?!\.{1,2}(?:/|\Z))[^/\0]+)(?:/(?!\.{1,2}(?:/|\Z))[^/\0]+)*")
"""A relative path that is normalised."""
MOST_FOLDERS: Final = 10_000
"""Folders whose place on the disk is remembered."""


class PathRule:
    """Places the paths of a manifest.

    Args:
        root: folder or URL of relative paths.
        outside: whether files outside of it may be read.
    """

    def __init__(self, root: str, *, outside: bool) -> None:
        self.root, self._outside = root, outside
        self._simple = not is_url(root) and os.path.normpath(root) == root != "/"
        self._base = "" if is_url(root) else os.path.realpath(root).rstrip("/") + "/"
        self._folders: LruCache[str, str] = LruCache(MOST_FOLDERS)

    def place(self, given: str) -> tuple[str, str]:
        """Returns (absolute path or URL, path relative to the root), both normalised."""
        if self._simple and PLAIN.fullmatch(given):
            return f"{self.root}/{given}", given
        if is_url(self.root) or is_url(given):
            path = _normal_url(given if is_url(given) else f"{self.root}/{given}")
            below = path.removeprefix(f"{self.root}/")
            return path, below
        path = os.path.normpath(Path(self.root, given.removeprefix("file://")))
        return path, os.path.relpath(path, self.root) if given and "\0" not in given else given

    def refuses(self, path: str) -> bool:
        """Returns whether a file, behind all links, is outside of the root and must not be read."""
        if self._outside:
            return False
        if is_url(path):
            return not path.startswith(self.root + "/")
        return not self._real(path).startswith(self._base)

    def _real(self, path: str) -> str:
        """Returns `os.path.realpath` of a path, looking up the links of each folder once."""
        folder, name = os.path.split(path)
        try:
            if not name or stat.S_ISLNK(os.lstat(path).st_mode):
                return os.path.realpath(path)
        except (OSError, ValueError):
            return os.path.realpath(path)
        return f"{self._folders.get(folder, lambda: os.path.realpath(folder)).rstrip('/')}/{name}"


def _normal_url(url: str) -> str:
    """Returns a URL without `.` and `..` segments in its path."""
    scheme, _, rest = url.partition("://")
    rest, mark, query = rest.partition("?")
    host, *segments = rest.split("/")
    kept: list[str] = []
    for segment in segments:
        if segment == "..":
            kept[-1:] = []
        elif segment != ".":
            kept.append(segment)
    return f"{scheme}://{'/'.join([host, *kept])}{mark}{query}"
