"""Tokens of text: characters, byte-pair units or phones. A folder with `tokens.json` defines them.

`tokens.json` is plain data: the kind, the normalisation, the symbols in the order of their ids, and for byte-pair units
the merges (Sennrich et al. 2016), for phones the table of words. There are no special ids: ids are 0 … size - 1.
"""

from __future__ import annotations

import abc
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Final, Literal

from data_pipeline.core.integrity import with_check
from data_pipeline.core.json_object import DamagedFileError, parse_object
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import FileStore

TOKENS: Final = "tokens.json"
FORMAT: Final = 1
Kind = Literal["characters", "bpe", "phones"]
Case = Literal["lower", "upper", "keep"]
_WORD_EDGES: Final = re.compile(r"^[^\w']+|[^\w']+$")


def normalise(text: str, case: Case) -> str:
    """Returns text in Unicode's form NFKC and one case, with single spaces between words and none around them."""
    text = unicodedata.normalize("NFKC", text)
    text = text.lower() if case == "lower" else text.upper() if case == "upper" else text
    return " ".join(text.split())


class Tokenizer(abc.ABC):
    """Converts text to ids and back. Made by `load_tokenizer`.

    Args:
        values: the content of `tokens.json`.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self.kind: Kind = values["kind"]
        self.label: str = values["label"]
        """The label of a segment that holds the text."""
        self.case: Case = values["case"]
        self.symbols: tuple[str, ...] = tuple(values["symbols"])
        self.size: int = len(self.symbols)
        self.sha256: str = values["check"]
        """Checksum of the content of `tokens.json`."""
        self._ids = {symbol: number for number, symbol in enumerate(self.symbols)}

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text after its normalisation; foreign symbols are left out."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, each 0 … size - 1."""

    @abc.abstractmethod
    def foreign(self, text: str) -> int:
        """Returns how many symbols of the text (for phones: words) have no token."""

    def in_library(self) -> Any | None:
        """Returns a tokenizer of the package `tokenizers` with the same ids; None where it has no such tokens.

        It has no rule for the case `upper`, and keeps symbols without a token as nothing.
        """
        return None

    def _normalised(self, made: Any) -> Any:
        """Adds the normalisation of texts to a tokenizer of the package."""
        steps = byte_pair_library().normalizers
        made.normalizer = steps.Sequence([steps.NFKC(), *([steps.Lowercase()] if self.case == "lower" else [])])
        return made


class _Characters(Tokenizer):
    def encode(self, text: str) -> list[int]:
        return [self._ids[symbol] for symbol in normalise(text, self.case) if symbol in self._ids]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.symbols[number] for number in ids)

    def foreign(self, text: str) -> int:
        return sum(symbol not in self._ids for symbol in normalise(text, self.case))

    def in_library(self) -> Any:
        library = byte_pair_library()
        made = library.Tokenizer(library.models.BPE(vocab=dict(self._ids), merges=[]))
        made.decoder = library.decoders.Fuse()
        return self._normalised(made)


class _BytePairs(Tokenizer):
    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        library = byte_pair_library()
        merges = [(str(first), str(second)) for first, second in values["merges"]]
        self._model = library.Tokenizer(library.models.BPE(vocab=dict(self._ids), merges=merges))
        self._model.pre_tokenizer = library.pre_tokenizers.Metaspace()
        self._model.decoder = library.decoders.Metaspace()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(normalise(text, self.case)).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._model.decode(list(ids))
        return text

    def foreign(self, text: str) -> int:
        return sum(symbol != " " and symbol not in self._ids for symbol in normalise(text, self.case))

    def in_library(self) -> Any:
        return self._normalised(byte_pair_library().Tokenizer.from_str(self._model.to_str()))


class _Phones(Tokenizer):
    """Phones of each word by a table. A text with a word outside the table has no tokens: its phones are unknown."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self._words = {word: [self._ids[phone] for phone in phones.split()] for word, phones in values["words"].items()}

    def encode(self, text: str) -> list[int]:
        words = phone_words(text, self.case)
        return [] if self.foreign(text) else [number for word in words for number in self._words[word]]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(self.symbols[number] for number in ids)

    def foreign(self, text: str) -> int:
        return sum(word not in self._words for word in phone_words(text, self.case))


_KINDS: Final[dict[str, type[Tokenizer]]] = {"characters": _Characters, "bpe": _BytePairs, "phones": _Phones}


def phone_words(text: str, case: Case) -> list[str]:
    """Returns the words of a text as a pronouncing dictionary has them, without punctuation at their edges."""
    words = (_WORD_EDGES.sub("", word) for word in normalise(text, case).split())
    return [word for word in words if word]


def byte_pair_library() -> Any:
    """Returns the package `tokenizers`. Raises ConfigError if it is not installed."""
    try:
        import tokenizers
    except ImportError:
        raise ConfigError("byte-pair tokens need the package tokenizers: pip install tokenizers") from None
    return tokenizers


def write_tokens(folder: str, values: dict[str, Any]) -> Tokenizer:
    """Writes `tokens.json` and returns its tokenizer.

    Args:
        folder: folder or fsspec URL; may hold the same tokens already.
        values: the content, without format and checksum.

    Raises:
        ConfigError: the folder holds other tokens.
    """
    store, content = FileStore(folder), with_check({"format": FORMAT, **values})
    if store.exists(TOKENS) and store.read(TOKENS) != content:
        raise ConfigError(f"out={folder}: holds other tokens, which runs may use; choose another folder or remove it")
    store.replace(TOKENS, content)
    return load_tokenizer(folder)


def load_tokenizer(folder: str) -> Tokenizer:
    """Returns the tokenizer of a folder that `auricle tokens` wrote.

    Args:
        folder: folder or fsspec URL with `tokens.json`.

    Raises:
        ConfigError: there is no `tokens.json`, or one of its fields is missing or wrong.
        DamagedFileError: it is no JSON object, or was altered.
    """
    try:
        content = FileStore(folder).read(TOKENS)
    except FileNotFoundError:
        raise ConfigError(f"{folder} holds no tokens (no {TOKENS}); make them with `auricle tokens`") from None
    return parse_tokenizer(content, f"{folder}/{TOKENS}")


def parse_tokenizer(content: bytes, name: str = TOKENS) -> Tokenizer:
    """Returns the tokenizer of the content of a `tokens.json`; `name` is for messages. Raises as `load_tokenizer`."""
    again = "restore it from a copy, or remove it and give the same `auricle tokens` command"
    try:
        values = parse_object(content)
    except ValueError as error:
        raise DamagedFileError(f"{name}: cannot be read as JSON ({error}); {again}") from None
    if with_check(values) != content:
        raise DamagedFileError(f"{name}: its checksum differs; {again}")
    try:
        if values["format"] != FORMAT:
            raise ValueError(f"its format is {values['format']}; this version reads {FORMAT}")
        return _KINDS[values["kind"]](values)
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{name} cannot be used: {error}") from None
