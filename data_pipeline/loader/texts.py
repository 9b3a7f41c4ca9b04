"""Texts of segments: which labels are text, what a crop leaves of them, and their tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from data_pipeline.preprocess.unit_worker import TIMED_LABELS
from data_pipeline.sampling.config import DataConfig
from data_pipeline.text.tokenizer import Tokenizer, load_tokenizer

TEXT: Final = "text"


class SegmentTexts:
    """The labels that a run reads, and the tokens of those that are text.

    Args:
        config: the run's `data`.

    Raises:
        ConfigError: a folder of `data.tokens` has no usable tokens.json.
    """

    def __init__(self, config: DataConfig) -> None:
        self.tokenizers: dict[str, Tokenizer] = {name: load_tokenizer(root) for name, root in config.tokens.items()}
        sources = [tokenizer.label for tokenizer in self.tokenizers.values()]
        self.labels = tuple(dict.fromkeys([*config.labels, *sources]))
        """Labels to read: those of `data.labels`, and those that hold texts to encode."""
        self._of_whole_segments = {TEXT, *TIMED_LABELS, *sources}

    def of_crop(self, labels: Mapping[str, str], whole: bool) -> dict[str, str]:
        """Returns the labels that hold for the audio that is read.

        Args:
            labels: of the segment.
            whole: whether all of the segment is read; otherwise texts and times become "", because they also describe
                audio outside of the crop.
        """
        return {name: "" if name in self._of_whole_segments and not whole else text for name, text in labels.items()}

    def encode(self, labels: Mapping[str, str]) -> dict[str, npt.NDArray[Any]]:
        """Returns the tokens of one segment by their name in `data.tokens`, (N,) int64; empty without text."""
        return {
            name: np.array(tokenizer.encode(labels[tokenizer.label]), np.int64)
            for name, tokenizer in self.tokenizers.items()
        }

    def extend_hash(self, plan_hash: str) -> str:
        """Returns a hash of the plan that covers the tokens, since a run must not continue with others."""
        if not self.tokenizers:
            return plan_hash
        hashes = sorted((name, tokenizer.sha256) for name, tokenizer in self.tokenizers.items())
        return hashlib.sha256(f"{plan_hash} tokens {hashes}".encode()).hexdigest()[:16]
