"""Lines of a text file as tokens, for losses that need text without audio: `data.lines`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from data_pipeline.core.retries import StorageReadError
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import FileStore
from data_pipeline.core.text import visible
from data_pipeline.text.tokenizer import Tokenizer

LONGEST_LINE: Final = 10_000
"""Bytes of the longest line that is used; a file without line ends is no list of lines."""
LISTED: Final = 10
"""Lines that a message names."""


@dataclass(frozen=True)
class TextLines:
    """The usable lines of a text file, as ids one after another.

    ids: (total,) int64 by the name of their tokens.  ends: for each name, (lines + 1,), where lines begin and end.
    rejects: (number of the line from 1 on, why it is left out).  sha256: of the file.
    """

    ids: Mapping[str, npt.NDArray[np.int64]]
    ends: Mapping[str, npt.NDArray[np.int64]]
    rejects: Sequence[tuple[int, str]]
    sha256: str

    def __len__(self) -> int:
        return min(len(ends) for ends in self.ends.values()) - 1

    def draw(self, rng: np.random.Generator) -> dict[str, npt.NDArray[np.int64]]:
        """Returns one line, all equally probable, as ids (N,) by the name of the tokens."""
        number = int(rng.integers(len(self)))
        return {name: ids[self.ends[name][number] : self.ends[name][number + 1]] for name, ids in self.ids.items()}


def read_lines(
    path: str, tokenizers: Mapping[str, Tokenizer], say: Callable[[str], None] = lambda _: None
) -> TextLines:
    """Reads a text file in UTF-8, one sentence a line.

    It is held in memory. A line without a token of every kind, that is no UTF-8, or longer than 10,000 bytes, is left
    out and counted; empty lines divide paragraphs and do not count.

    Args:
        path: file or fsspec URL.
        tokenizers: by the name of their tokens, one at least.
        say: receives a line with the number of the lines that are left out, and the first ones.

    Raises:
        ConfigError: there are no tokens or no such file, or no line can be used.
    """
    if not tokenizers:
        raise ConfigError(f"data.lines={path}: needs data.tokens, by which lines are read; set data.tokens.text=FOLDER")
    folder, _, name = path.rpartition("/")
    try:
        content = FileStore(folder or ".").read(name)
    except (FileNotFoundError, StorageReadError) as error:
        reason = error.__cause__ or error
        raise ConfigError(
            f"data.lines={path}: cannot be read ({reason}); give a text file, a sentence a line"
        ) from None
    parts: dict[str, list[list[int]]] = {kind: [] for kind in tokenizers}
    rejects: list[tuple[int, str]] = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        found = _encoded(line, tokenizers)
        if isinstance(found, str):
            rejects.append((number, found))
            continue
        for kind, ids in found.items():
            parts[kind].append(ids)
    used = len(next(iter(parts.values())))
    listed = "; ".join(f"line {number} {reason}" for number, reason in rejects[:LISTED])
    listed += f"; and {len(rejects) - LISTED} more" if len(rejects) > LISTED else ""
    if not used:
        raise ConfigError(f"data.lines={path}: no line can be used ({listed or 'it is empty'})")
    if rejects:
        say(f"data.lines={path}: {len(rejects):,} of {used + len(rejects):,} lines are left out: {listed}")
    ends = {
        kind: np.concatenate([[0], np.cumsum([len(ids) for ids in lines])]).astype(np.int64)
        for kind, lines in parts.items()
    }
    flat = {kind: np.concatenate([np.array(ids, np.int64) for ids in lines]) for kind, lines in parts.items()}
    return TextLines(flat, ends, rejects, hashlib.sha256(content).hexdigest())


def _encoded(line: bytes, tokenizers: Mapping[str, Tokenizer]) -> dict[str, list[int]] | str:
    """Returns the ids of a line by the name of their tokens, or why it cannot be used."""
    if len(line) > LONGEST_LINE:
        return f"has {len(line):,} bytes, more than {LONGEST_LINE:,}"
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return "is not UTF-8"
    found = {kind: tokenizer.encode(text) for kind, tokenizer in tokenizers.items()}
    missing = [kind for kind, ids in found.items() if not ids]
    return f"({visible(text.strip()[:20])!r}) has no token of data.tokens.{missing[0]}" if missing else found
