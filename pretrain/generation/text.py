"""Plain text as sentences that a tokenizer knows."""

from __future__ import annotations

import functools
import re
import unicodedata
from typing import Any, Final

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.text import visible
from data_pipeline.text.tokenizer import Tokenizer, phone_words

SENTENCE_END: Final = re.compile(r"(?<=[.!?;:。！？])\s+")
LONGEST_SENTENCE: Final = 40
"""Words that are spoken in one pass; longer sentences are cut at commas, then anywhere."""
SHOWN: Final = 10
"""Unknown symbols that a message lists."""


class TextError(ConfigError):
    """A text that cannot be spoken."""


def sentences(text: str, tokenizer: Tokenizer, language: str, max_words: int) -> list[list[int]]:
    """Returns the tokens of each sentence of a text, at least one each.

    Numbers and abbreviations are written out first; punctuation that has no token separates words.

    Args:
        text: plain text.
        tokenizer: that of the synthesiser.
        language: of `written_out`; "none" leaves the text as it is.
        max_words: limit.

    Raises:
        TextError: the text is empty or too long, or has symbols without a token.
        ConfigError: the package that writes out numbers is missing.
    """
    words = len(text.split())
    if words > max_words:
        raise TextError(
            f"text: has {words:,} words, and at most max_words={max_words:,} are spoken; split it, or raise the limit"
        )
    found = [_encoded(part, tokenizer, language) for part in _split(text)]
    kept = [ids for ids in found if ids]
    if not kept:
        raise TextError(f"text={visible(text[:40])!r}: has no word to speak")
    return kept


def _split(text: str) -> list[str]:
    parts = []
    for sentence in SENTENCE_END.split(" ".join(text.split())):
        words = sentence.split(" ")
        while len(words) > LONGEST_SENTENCE:
            commas = [n for n in range(LONGEST_SENTENCE // 2, LONGEST_SENTENCE) if words[n].endswith((",", "，"))]
            cut = commas[-1] + 1 if commas else LONGEST_SENTENCE
            parts.append(" ".join(words[:cut]))
            words = words[cut:]
        parts.append(" ".join(words))
    return parts


def _encoded(sentence: str, tokenizer: Tokenizer, language: str) -> list[int]:
    text = sentence if language == "none" else written_out(sentence, language)
    text = "".join(" " if _is_needless(symbol, tokenizer) else symbol for symbol in text)
    if unknown := unknown_symbols(text, tokenizer):
        kind = "words" if tokenizer.kind == "phones" else "symbols"
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        raise TextError(
            f"text={visible(sentence[:40])!r}: the tokenizer of the checkpoint does not know the {kind} "
            f"{', '.join(visible(symbol) for symbol in unknown[:SHOWN])}{more}; write them in another way, or "
            "train with tokens that have them"
        )
    return tokenizer.encode(text)


def _is_needless(symbol: str, tokenizer: Tokenizer) -> bool:
    """Returns whether a symbol is punctuation without a token."""
    return unicodedata.category(symbol)[0] == "P" and bool(tokenizer.kind != "phones" and tokenizer.foreign(symbol))


def unknown_symbols(text: str, tokenizer: Tokenizer) -> list[str]:
    """Returns the symbols (phones: words) of a text without a token, once each, in their order."""
    parts = phone_words(text, tokenizer.case) if tokenizer.kind == "phones" else list("".join(text.split()))
    return [part for part in dict.fromkeys(parts) if tokenizer.foreign(part)]


def written_out(text: str, language: str) -> str:
    """Returns text with numbers, dates, times, money and units as words, by WeTextProcessing's grammars.

    Raises:
        ConfigError: the package wetext is missing.
    """
    made: str = _normalizer(language).normalize(text)
    return made


@functools.cache
def _normalizer(language: str) -> Any:
    try:
        from wetext import Normalizer
    except ImportError:
        raise ConfigError(
            f"language={language}: numbers are written out by the package wetext: pip install wetext; or set "
            "language=none for text without numbers"
        ) from None
    return Normalizer(lang=language, operator="tn")
