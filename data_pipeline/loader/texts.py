"""Texts of segments: which labels are text, what a crop leaves of them, and their tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.core.rng import keyed_rng, keyed_seed
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import LINE, SAMPLE_RATE
from data_pipeline.preprocess.unit_worker import TIMED_LABELS
from data_pipeline.sampling.config import DataConfig
from data_pipeline.shards.local import LABELS_IN_COLUMNS
from data_pipeline.text.lines import read_lines
from data_pipeline.text.tokenizer import Tokenizer, load_tokenizer

TEXT: Final = "text"
TEXT_LENGTH: Final = "text_length"
"""Column of an index: characters of the label `text`."""


def keeps_text(key: str, share: float) -> bool:
    """Returns whether a segment is one of the `share` that keep their text.

    It depends on the key alone: runs with other seeds have the same segments with text, and those of a smaller share
    are among those of a larger one.
    """
    return keyed_seed("labelled", key) < share * 2**63


class SegmentTexts:
    """The labels that a run reads, and the tokens of those that are text.

    Args:
        config: the run's `data`.

        say: receives a line about the lines of `data.lines` that are left out.

    Raises:
        ConfigError: a folder of `data.tokens` has no usable tokens.json, or `data.lines` no usable line.
    """

    def __init__(self, config: DataConfig, say: Callable[[str], None] = lambda _: None) -> None:
        self.tokenizers: dict[str, Tokenizer] = {name: load_tokenizer(root) for name, root in config.tokens.items()}
        sources = [tokenizer.label for tokenizer in self.tokenizers.values()]
        self.labels = tuple(dict.fromkeys([*config.labels, *sources]))
        """Labels to read: those of `data.labels`, and those that hold texts to encode."""
        self.sources = tuple(dict.fromkeys(sources)) or (TEXT,)
        """Labels that heads read texts from."""
        self._of_whole_segments = {TEXT, *TIMED_LABELS, *sources}
        self._share = config.labelled_share
        self.lines = read_lines(config.lines, self.tokenizers, say) if config.lines else None

    def of_crop(self, labels: Mapping[str, str], key: str, whole: bool) -> dict[str, str]:
        """Returns the labels that hold for the audio that is read; texts and times may become "".

        Args:
            labels: of the segment.
            key: of the segment, which decides whether it is one of those that keep their text.
            whole: whether all of the segment is read; texts and times otherwise also describe audio outside of the
                crop.
        """
        kept = whole and keeps_text(key, self._share)
        return {name: "" if name in self._of_whole_segments and not kept else text for name, text in labels.items()}

    def encode(self, labels: Mapping[str, str]) -> dict[str, npt.NDArray[Any]]:
        """Returns the tokens of one segment by their name in `data.tokens`, (N,) int64; empty without text."""
        return {
            name: np.array(tokenizer.encode(labels[tokenizer.label]), np.int64)
            for name, tokenizer in self.tokenizers.items()
        }

    def draw_line(self, key_of_draw: Sequence[int | str]) -> dict[str, npt.NDArray[Any]]:
        """Returns the tokens of a line for one segment, by their names in `Batch.tokens`; none without `data.lines`."""
        if self.lines is None:
            return {}
        return {LINE.format(name): ids for name, ids in self.lines.draw(keyed_rng(*key_of_draw)).items()}

    def extend_hash(self, plan_hash: str) -> str:
        """Returns a hash of the plan that covers tokens and lines, since a run must not continue with others."""
        if not self.tokenizers:
            return plan_hash
        hashes = sorted((name, tokenizer.sha256) for name, tokenizer in self.tokenizers.items())
        hashes += [("lines", self.lines.sha256)] if self.lines else []
        return hashlib.sha256(f"{plan_hash} tokens {hashes}".encode()).hexdigest()[:16]


class SegmentsWithText:
    """Finds the segments of a shard with a text that a run will read: a `sampling.catalog.TextSearch`.

    A segment longer than `data.max_seconds` is always cropped, so it counts as one without.

    Args:
        config: the run's `data`.
        labels: those that hold texts.
    """

    def __init__(self, config: DataConfig, labels: Sequence[str]) -> None:
        self.labels, self._share, self._longest = tuple(labels), config.labelled_share, config.max_seconds
        self.columns = ("key", TEXT_LENGTH, *self.labels)
        self.identity = repr((self.labels, self._share, self._longest))

    def found(self, table: pa.Table) -> npt.NDArray[Any]:
        """Returns whether each segment has a text, (n,).

        Args:
            table: `columns` of the index and n_samples, as far as they are there.

        Raises:
            ConfigError: the index does not show which segments have these labels.
        """
        text_n = np.any([_filled(table, name) for name in self.labels], axis=0)
        text_n &= table.column("n_samples").to_numpy() <= round(self._longest * SAMPLE_RATE)
        if self._share < 1:
            keys = table.column("key").to_pylist()
            text_n &= np.fromiter((keeps_text(key, self._share) for key in keys), bool, len(keys))
        return np.asarray(text_n)


def _filled(table: pa.Table, label: str) -> npt.NDArray[Any]:
    """Returns whether each segment has this label, (n,), by a column of the index. Raises ConfigError without one."""
    if label in table.column_names:
        lengths = pc.utf8_length(table.column(label).cast(pa.string()))
    elif label == TEXT and TEXT_LENGTH in table.column_names:
        lengths = table.column(TEXT_LENGTH)
    elif LABELS_IN_COLUMNS in (table.schema.metadata or {}):  # no segment of this shard has it
        return np.zeros(table.num_rows, bool)
    else:
        raise ConfigError(
            f"data.text_share: the index of the shards does not show which segments have a {label}; index them again "
            "with `auricle shards index SHARDS index_out=FOLDER` and train on FOLDER, or set data.text_share=0"
        )
    return np.asarray(lengths.fill_null(0).to_numpy() > 0)
