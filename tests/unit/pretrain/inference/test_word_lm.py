"""Beam search with a word language model, against enumeration of all paths."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.core.schema import ConfigError
from pretrain.inference.word_lm import WordBeamSearch

pytest.importorskip("flashlight.lib.text", reason="needs flashlight-text")
SYMBOLS = (" ", "a", "b")
UNIGRAMS = {"a": (-0.6, -0.3), "ab": (-0.9, -0.2), "ba": (-1.1, -0.4)}
"""word -> (log10 p, log10 of the back-off weight)."""
BIGRAMS = {("<s>", "ab"): -0.2, ("ab", "a"): -0.3, ("a", "</s>"): -0.15}
START_BACKOFF, END = -0.5, -0.7


@pytest.fixture(scope="module")
def arpa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = ["\\data\\", "ngram 1=6", "ngram 2=3", "", "\\1-grams:", "-2.0\t<unk>", f"-99\t<s>\t{START_BACKOFF}"]
    lines += [f"{END}\t</s>", *(f"{p}\t{word}\t{backoff}" for word, (p, backoff) in UNIGRAMS.items())]
    lines += ["", "\\2-grams:", *(f"{p}\t{' '.join(pair)}" for pair, p in BIGRAMS.items()), "", "\\end\\", ""]
    path = tmp_path_factory.mktemp("lm") / "words.arpa"
    path.write_text("\n".join(lines))
    return path


def lm_score(words: list[str]) -> float:
    total, context = 0.0, "<s>"
    for word in [*words, "</s>"]:
        backoff = START_BACKOFF if context == "<s>" else UNIGRAMS[context][1]
        unigram = END if word == "</s>" else UNIGRAMS[word][0]
        total += BIGRAMS.get((context, word), backoff + unigram)
        context = word
    return total


def best_words(output: np.ndarray, weight: float, bonus: float) -> str:
    """Returns the words with the best score over all paths that spell them; spaces at the ends are free."""
    score: dict[str, float] = defaultdict(lambda: -math.inf)
    for path in itertools.product(range(4), repeat=len(output)):
        merged = [v for i, v in enumerate(path) if v and (i == 0 or v != path[i - 1])]
        text = "".join(SYMBOLS[v - 1] for v in merged)
        words = text.split()
        if all(word in UNIGRAMS for word in words):
            p = float(sum(frame[v] for frame, v in zip(output, path, strict=True)))
            score[" ".join(words)] = max(score[" ".join(words)], p + weight * lm_score(words) + bonus * len(words))
    return max(score, key=lambda text: score[text])


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(("weight", "bonus"), [(2.0, 0.0), (0.5, 1.5)])
def test_the_best_words_are_found(arpa: Path, seed: int, weight: float, bonus: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    output = torch.randn(6, 4, generator=generator).mul(1.5).log_softmax(1).numpy()
    search = WordBeamSearch(str(arpa), SYMBOLS, beam=500, weight=weight, bonus=bonus)
    assert "".join(SYMBOLS[number] for number in search(output)) == best_words(output, weight, bonus)


def test_files_that_cannot_be_used_are_named(arpa: Path, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0")
    (tmp_path / "foreign").write_text("Ä Ö\n")
    for lm, words, symbols, said in (
        (str(tmp_path / "none"), "", SYMBOLS, "there is no such file"),
        (str(tmp_path / "binary"), "", SYMBOLS, "set words=FILE"),
        (str(arpa), str(tmp_path / "foreign"), SYMBOLS, "no word of it can be written"),
        (str(arpa), str(tmp_path / "none"), SYMBOLS, "words=.*cannot be read"),
        (str(arpa), "", ("a", "b"), "the recogniser writes no spaces"),
        (str(tmp_path / "foreign"), str(arpa), SYMBOLS, "not a model that KenLM reads"),
    ):
        with pytest.raises(ConfigError, match=said):
            WordBeamSearch(lm, symbols, 10, words=words)


def test_words_of_a_list_are_found_alone(arpa: Path, tmp_path: Path) -> None:
    (tmp_path / "words").write_text("ba\n")
    search = WordBeamSearch(str(arpa), SYMBOLS, 50, words=str(tmp_path / "words"))
    assert "".join(SYMBOLS[n] for n in search(np.eye(4, dtype=np.float32)[[2, 3, 1, 3, 2]] * 5)) in ("ba", "ba ba")
    assert search(np.zeros((0, 4), np.float32)) == []
