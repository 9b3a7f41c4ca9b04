"""CTC beam search over a list of words with a word n-gram model: torchaudio's decoder (flashlight-text, KenLM)."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.core.schema import ConfigError

BLANK_TOKEN, SPACE_TOKEN = "blank", "space"
IMPOSSIBLE = -1e4
"""ln p of symbols that cannot be at the end."""
BEGINNING, END, UNKNOWN = "<s>", "</s>", "<unk>"


class WordBeamSearch:
    """Finds the words with the largest ln p of their best path + weight · log10 p(words) + bonus · their number.

    Only words of the list are found. Words with characters that the recogniser does not write are left out.

    Args:
        lm: an n-gram model of words, in ARPA format or KenLM's binary one.
        symbols: the text of each symbol of the recogniser; one of them is a space.
        beam: hypotheses that are kept.
        weight: of the model.
        bonus: per word.
        words: a text file with one word per line; "" takes the words of an ARPA file.

    Raises:
        ConfigError: a file is missing or cannot be used, or flashlight-text is not installed.
    """

    def __init__(
        self, lm: str, symbols: Sequence[str], beam: int, weight: float = 2.0, bonus: float = 0.0, words: str = ""
    ) -> None:
        try:
            from torchaudio.models.decoder import ctc_decoder
        except (ImportError, RuntimeError):
            raise ConfigError(f"lm={lm}: needs flashlight-text: pip install 'flashlight-text>=0.0.7'") from None
        if " " not in symbols:
            raise ConfigError(f"lm={lm}: the recogniser writes no spaces, so it has no words; leave lm out")
        file = Path(lm).expanduser()
        if not file.is_file():
            raise ConfigError(f"lm={lm}: there is no such file")
        names = [SPACE_TOKEN if symbol == " " else f"symbol{number}" for number, symbol in enumerate(symbols)]
        known = dict(zip(symbols, names, strict=True))
        with tempfile.TemporaryDirectory(prefix="auricle-") as folder:
            lexicon = Path(folder, "lexicon.txt")
            count = _write_lexicon(lexicon, _words(file, words), known)
            if not count:
                raise ConfigError(f"lm={lm}: no word of it can be written with the symbols {''.join(symbols)!r}")
            try:
                self._decoder = ctc_decoder(
                    lexicon=str(lexicon),
                    tokens=[BLANK_TOKEN, *names],
                    lm=str(file),
                    beam_size=beam,
                    lm_weight=weight,
                    word_score=bonus,
                    blank_token=BLANK_TOKEN,
                    sil_token=SPACE_TOKEN,
                )
            except RuntimeError as error:
                raise ConfigError(f"lm={lm}: not a model that KenLM reads ({error})") from None
        self._space = list(symbols).index(" ")

    def __call__(self, log_probs_FV: np.ndarray) -> list[int]:
        """Returns the symbols of the best words, for ln p of blank (0) and symbol i (class i + 1), (F, V)."""
        import torch

        if not len(log_probs_FV):
            return []
        # a word of the list ends with a space, which is not spoken at the end
        end_V = np.full(log_probs_FV.shape[1], IMPOSSIBLE, np.float32)
        end_V[self._space + 1] = 0.0
        emission_BFV = torch.from_numpy(np.concatenate([log_probs_FV, end_V[None]]).astype(np.float32))[None]
        hypotheses = self._decoder(emission_BFV)[0]
        found = [int(token) - 1 for token in hypotheses[0].tokens] if hypotheses else []
        while found and found[-1] == self._space:
            found.pop()
        return list(itertools.dropwhile(lambda symbol: symbol == self._space, found))


def _words(lm: Path, words: str) -> Iterator[str]:
    """Yields the words of a list, or the unigrams of an ARPA file."""
    if words:
        try:
            yield from Path(words).expanduser().read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"words={words}: cannot be read ({error})") from None
        return
    with lm.open("rb") as file:
        if not file.read(64).lstrip().startswith(b"\\data\\"):
            raise ConfigError(f"lm={lm}: is not in ARPA format, so its words are unknown; set words=FILE, one per line")
        file.seek(0)
        inside = False
        for line in file:
            if line.startswith(b"\\"):
                inside = line.strip() == b"\\1-grams:"
            elif inside and len(fields := line.split()) >= 2:
                word = fields[1].decode("utf-8", errors="replace")
                if word not in (BEGINNING, END, UNKNOWN, UNKNOWN.upper()):
                    yield word


def _write_lexicon(path: Path, words: Iterator[str], known: dict[str, str]) -> int:
    """Writes each word with the tokens that spell it; returns how many can be spelled."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for word in dict.fromkeys(words):
            if all(symbol in known for symbol in word):
                file.write(f"{word} {' '.join(known[symbol] for symbol in word)} {SPACE_TOKEN}\n")
                count += 1
    return count
