"""Text to sentences of tokens: nothing is lost, and what cannot be spoken is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.text.tokenizer import Tokenizer, write_tokens
from pretrain.generation.text import LONGEST_SENTENCE, TextError, sentences, unknown_symbols

LETTERS = {"kind": "characters", "label": "text", "case": "lower", "symbols": [" ", *"abcdefghijklmnopqrstuvwxyz,"]}


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return write_tokens(str(tmp_path_factory.mktemp("letters")), LETTERS)


def spoken(text: str, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(ids) for ids in sentences(text, tokenizer, "none", 1_000)]


def test_sentences_end_at_their_marks(letters: Tokenizer) -> None:
    assert spoken("One. Two!  Three?\nfour; five", letters) == ["one", "two", "three", "four", "five"]


def test_punctuation_without_a_token_separates_words_and_other_is_kept(letters: Tokenizer) -> None:
    assert spoken("well-known, (yes)", letters) == ["well known, yes"]


@given(st.lists(st.text("abc,", min_size=1, max_size=5).filter(lambda word: word.strip(",")), min_size=1, max_size=200))
def test_long_sentences_are_cut_without_losing_a_word(letters: Tokenizer, words: list[str]) -> None:
    parts = spoken(" ".join(words), letters)
    assert " ".join(parts).split() == words
    assert max(len(part.split()) for part in parts) <= LONGEST_SENTENCE


def test_a_long_sentence_is_cut_at_its_last_comma(letters: Tokenizer) -> None:
    words = ["go"] * 60
    words[24], words[32] = "there,", "back,"
    assert [len(part.split()) for part in spoken(" ".join(words), letters)] == [33, 27]


def test_symbols_without_a_token_are_named_and_limited_in_number(letters: Tokenizer) -> None:
    with pytest.raises(TextError, match=r"does not know the symbols 7, α; "):
        sentences("a7 α7", letters, "none", 10)
    with pytest.raises(TextError, match="and 16 more"):
        sentences("".join(map(chr, range(0x3B1, 0x3B1 + 27))).replace("ς", ""), letters, "none", 10)
    assert unknown_symbols("a 7b7α", letters) == ["7", "α"]


@pytest.mark.parametrize("text", ["", "  ", "...", "—"])
def test_a_text_without_a_word_is_refused(text: str, letters: Tokenizer) -> None:
    with pytest.raises(TextError, match="has no word to speak"):
        sentences(text, letters, "none", 10)


def test_words_without_phones_are_named(tmp_path: Path) -> None:
    values = {
        "kind": "phones",
        "label": "text",
        "case": "lower",
        "symbols": ["HH", "AY"],
        "words": {"hi": "HH AY"},
    }
    phones = write_tokens(str(tmp_path), values)
    assert sentences("Hi, hi!", phones, "none", 10) == [[0, 1, 0, 1]]
    with pytest.raises(TextError, match="does not know the words there"):
        sentences("hi there", phones, "none", 10)
