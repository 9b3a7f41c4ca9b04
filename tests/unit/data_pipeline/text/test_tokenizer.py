"""Tokens: round trips, determinism, foreign symbols, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.core.integrity import with_check
from data_pipeline.core.json_object import DamagedFileError
from data_pipeline.core.schema import ConfigError, load
from data_pipeline.text.artefact import TokensConfig, TokensSummary, make_tokens
from data_pipeline.text.tokenizer import load_tokenizer, normalise, parse_tokenizer

TEXTS = ["One  two three", "", "TWO four's one", "naïve five two two"] * 5


def made(out: Path, texts: list[str] = TEXTS, **values: object) -> TokensSummary:
    return make_tokens(load(TokensConfig, {"shards": "s", "out": str(out), **values}), texts)


def dictionary(folder: Path) -> str:
    path = folder / "words.dict"
    path.write_text("one W AH N\none(2) HH W AH N\ntwo T UW\nthree TH R IY\nfour's F AO R Z\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_texts_survive_encoding_up_to_their_normalisation(tmp_path: Path, kind: str) -> None:
    summary = made(tmp_path, kind=kind, size=60)
    tokenizer = load_tokenizer(str(tmp_path))
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert all(0 <= number < tokenizer.size for number in ids)
        assert tokenizer.decode(ids) == normalise(text, "lower")
        assert tokenizer.foreign(text) == 0
    assert (summary.texts, summary.without_text, summary.foreign) == (15, 5, 0)
    assert summary.symbols == sum(len(normalise(text, "lower")) for text in TEXTS)


@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_the_same_texts_give_the_same_bytes(tmp_path: Path, kind: str) -> None:
    first, second = (made(tmp_path / name, kind=kind, size=40) for name in "ab")
    assert (tmp_path / "a/tokens.json").read_bytes() == (tmp_path / "b/tokens.json").read_bytes()
    assert first.sha256 == second.sha256 == load_tokenizer(str(tmp_path / "a")).sha256


def test_byte_pair_units_merge_frequent_pairs(tmp_path: Path) -> None:
    made(tmp_path, ["banana"] * 10, kind="bpe", size=30)
    assert len(load_tokenizer(str(tmp_path)).encode("banana")) == 1


def test_foreign_symbols_are_left_out_and_counted(tmp_path: Path) -> None:
    summary = made(tmp_path, symbols="enotw")
    tokenizer = load_tokenizer(str(tmp_path))
    assert (tokenizer.encode("one two!"), tokenizer.foreign("one two!")) == ([2, 1, 0, 3, 4, 2], 2)
    assert summary.foreign == sum(tokenizer.foreign(text) for text in TEXTS)


def test_phones_follow_the_first_pronunciation_and_leave_out_unknown_words(tmp_path: Path) -> None:
    summary = made(tmp_path, kind="phones", dictionary=dictionary(tmp_path))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode("One, two; FOUR'S.")) == "W AH N T UW F AO R Z"
    assert (tokenizer.encode("one seven two"), tokenizer.foreign("one seven two")) == ([], 1)
    assert (summary.foreign, summary.symbols) == (10, 50)


def test_english_phones_come_from_the_packaged_dictionary(tmp_path: Path) -> None:
    pytest.importorskip("pocketsphinx")
    made(tmp_path, kind="phones")
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.size == 39
    assert tokenizer.decode(tokenizer.encode("speech")) == "S P IY CH"


@given(st.text(max_size=40))
def test_any_text_can_be_encoded(text: str) -> None:
    values = {"kind": "characters", "label": "text", "case": "lower", "symbols": [" ", "a", "b"], "format": 1}
    tokenizer = parse_tokenizer(with_check(values))
    assert len(tokenizer.encode(text)) + tokenizer.foreign(text) == len(normalise(text, "lower"))


def test_another_text_does_not_replace_tokens_in_use(tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(ConfigError, match="holds other tokens"):
        made(tmp_path, ["xyz"])


def test_altered_or_missing_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="auricle tokens"):
        load_tokenizer(str(tmp_path))
    made(tmp_path)
    file = tmp_path / "tokens.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**values, "symbols": values["symbols"][::-1]}), encoding="utf-8")
    with pytest.raises(DamagedFileError, match="checksum"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "bpe", "symbols": "ab"}, "symbols"),
        ({"dictionary": "words"}, "dictionary"),
        ({"kind": "phones", "dictionary": "/nowhere"}, "dictionary=/nowhere"),
        ({"kind": "words"}, "kind"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(tmp_path, **values)


def test_a_data_set_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="label=text"):
        made(tmp_path, ["", " "])
