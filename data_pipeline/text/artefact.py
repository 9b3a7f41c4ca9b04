"""Makes the tokens of a data set from its texts: `auricle tokens`."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from data_pipeline.core.schema import ConfigError, about, config, refuse
from data_pipeline.text.tokenizer import Case, Kind, byte_pair_library, normalise, phone_words, write_tokens

DICTIONARY = "model/en-us/cmudict-en-us.dict"
"""CMU's pronouncing dictionary (BSD licence) inside the package pocketsphinx; its 39 phones have no stress marks."""


@config
class TokensConfig:
    """Shards in, tokens out."""

    shards: Annotated[str, about("data set of shards whose texts are read", min_length=1)]
    out: Annotated[str, about("folder for tokens.json", min_length=1)]
    kind: Annotated[Kind, about("characters; byte-pair units; or phones, by a table of words")] = "characters"
    label: Annotated[str, about("label of a segment that holds its text", min_length=1)] = "text"
    case: Annotated[Case, about("case that texts are converted to, after Unicode's NFKC")] = "lower"
    size: Annotated[int, about("bpe: number of tokens at most", ge=2, le=1_000_000)] = 1_000
    min_count: Annotated[int, about("characters: those seen less often have no token", ge=1)] = 1
    symbols: Annotated[str, about("characters: these, in this order; empty takes those of the texts")] = ""
    dictionary: Annotated[
        str, about("phones: file with a word and its phones per line; empty takes English from pocketsphinx")
    ] = ""

    def __post_init__(self) -> None:
        """Refuses fields of another kind."""
        for field, kind in (("symbols", "characters"), ("dictionary", "phones")):
            if getattr(self, field) and self.kind != kind:
                refuse(field, getattr(self, field), f"is for kind={kind}, and kind={self.kind}")


@dataclass(frozen=True)
class TokensSummary:
    """Tokens that were made, and how they fit the texts. foreign: symbols (phones: words) without a token."""

    kind: Kind
    size: int
    sha256: str
    texts: int
    without_text: int
    symbols: int
    foreign: int

    def rows(self) -> list[tuple[str, str]]:
        """Returns the rows of a table for the terminal."""
        unit = "words" if self.kind == "phones" else "characters"
        return [
            ("tokens", f"{self.size:,} ({self.kind})"),
            ("texts", f"{self.texts:,}; {self.without_text:,} segments have none"),
            (f"{unit} without a token", f"{self.foreign:,} of {self.symbols:,}"),
            ("sha256", self.sha256),
        ]


def make_tokens(config: TokensConfig, texts: Iterable[str]) -> TokensSummary:
    """Makes `tokens.json` from texts. The same texts and settings give the same bytes.

    Args:
        config: kind, normalisation and output.
        texts: the text of each segment; "" where it has none. Read once.

    Returns:
        Number of tokens and of symbols without one.

    Raises:
        ConfigError: there is no text, the output folder holds other tokens, or a package or dictionary is missing.
    """
    seen = _Seen(config.case)
    values: dict[str, Any] = {"kind": config.kind, "label": config.label, "case": config.case}
    if config.kind == "bpe":
        values |= _byte_pairs(config.size, seen.normalised(texts))
    else:
        for _ in seen.normalised(texts):
            pass
    if not seen.texts:
        raise ConfigError(f"label={config.label}: no segment of {config.shards} has such a text")
    if config.kind == "characters":
        kept = (symbol for symbol, count in seen.characters().items() if count >= config.min_count)
        values["symbols"] = list(dict.fromkeys(config.symbols)) if config.symbols else sorted(kept)
    elif config.kind == "phones":
        values |= _phones(config.dictionary or _packaged_dictionary(), config.case)
    tokenizer = write_tokens(config.out, values)
    foreign = sum(tokenizer.foreign(word) * count for word, count in seen.words.items())
    if config.kind == "characters" and " " not in tokenizer.symbols:
        foreign += seen.characters()[" "]
    counted = sum(len(phone_words(word, config.case)) * n for word, n in seen.words.items())
    symbols = counted if config.kind == "phones" else seen.characters().total()
    return TokensSummary(
        config.kind,
        tokenizer.size,
        sha256=tokenizer.sha256,
        texts=seen.texts,
        without_text=seen.without_text,
        symbols=symbols,
        foreign=foreign,
    )


class _Seen:
    """Counts the words of texts while they pass by."""

    def __init__(self, case: Case) -> None:
        self.case, self.words = case, Counter[str]()
        self.texts = self.without_text = self._spaces = 0

    def normalised(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            line = normalise(text, self.case)
            words = line.split()
            self.texts, self.without_text = self.texts + bool(words), self.without_text + (not words)
            self._spaces += max(len(words) - 1, 0)
            self.words.update(words)
            if line:
                yield line

    def characters(self) -> Counter[str]:
        found = Counter[str]({" ": self._spaces} if self._spaces else {})
        for word, count in self.words.items():
            for symbol in word:
                found[symbol] += count
        return found


def _byte_pairs(size: int, texts: Iterator[str]) -> dict[str, Any]:
    library = byte_pair_library()
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.Metaspace()
    trainer = library.trainers.BpeTrainer(vocab_size=size, show_progress=False, special_tokens=[])
    made.train_from_iterator(texts, trainer)
    vocabulary = made.get_vocab()
    merges = json.loads(made.to_str())["model"]["merges"]
    return {"symbols": sorted(vocabulary, key=vocabulary.__getitem__), "merges": [list(pair) for pair in merges]}


def _phones(path: Path | str, case: Case) -> dict[str, Any]:
    """Reads lines `word phone phone …`; of several pronunciations (`word(2)`) the first is taken."""
    words: dict[str, str] = {}
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"dictionary={path}: cannot be read ({error})") from None
    for line in lines:
        word, *phones = line.split() if line.strip() and not line.startswith((";;;", "#")) else ("",)
        if phones and not word.endswith(")"):
            words.setdefault(normalise(word, case), " ".join(phones))
    if not words:
        raise ConfigError(f"dictionary={path}: has no line with a word and its phones")
    symbols = sorted({phone for phones in words.values() for phone in phones.split()})
    return {"symbols": symbols, "words": words}


def _packaged_dictionary() -> Path:
    """Returns the English dictionary of the package pocketsphinx, which is not imported. Raises ConfigError."""
    found = importlib.util.find_spec("pocketsphinx")
    path = Path(found.origin).parent / DICTIONARY if found is not None and found.origin else None
    if path is None or not path.is_file():
        raise ConfigError(
            "kind=phones: the English dictionary is in the package pocketsphinx: pip install pocketsphinx, or give "
            "dictionary=FILE with a word and its phones per line"
        )
    return path
