"""Texts of segments as classes of heads with a blank: the blank is class 0, token i is class i + 1."""

from __future__ import annotations

from data_pipeline.core.types import Batch
from pretrain.interfaces.configs import TextHeadConfig

BLANK = 0


def text_targets(config: TextHeadConfig, batch: Batch) -> list[list[int]]:
    """Returns the classes of each segment's text; empty without text.

    Args:
        config: what is written: tokens of the data, or characters of a label, in lower case; others are left out.
        batch: one micro-batch with its labels and tokens.
    """
    if config.tokens:
        return [[number + 1 for number in row if number >= 0] for row in batch.token_rows(config.tokens).tolist()]
    classes = config.symbol_classes
    texts = batch.label_values(config.label)
    return [[classes[symbol] for symbol in text.lower() if symbol in classes] for text in texts]


def foreign_symbols(config: TextHeadConfig, batch: Batch) -> tuple[int, int]:
    """Returns how many characters of the texts `config.symbols` lacks, and of how many; white space is not foreign."""
    classes = config.symbol_classes
    written = [symbol for text in batch.label_values(config.label) for symbol in text.lower()]
    foreign = sum(symbol not in classes and not symbol.isspace() for symbol in written)
    return foreign, foreign + sum(symbol in classes for symbol in written)
