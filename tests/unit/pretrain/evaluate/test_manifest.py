"""Labelled parts of a manifest: splits, corpora, speakers, and fewer utterances."""

from __future__ import annotations

import pytest

from pretrain.evaluate.manifest import Utterance, labelled_parts, thinned


def utterance(number: int, split: str, speaker: str, corpus: str = "a", text: str = "yes") -> Utterance:
    return Utterance(f"{number}.wav", str(number), speaker=speaker, text=text, corpus=corpus, split=split)


LISTED = [
    utterance(0, "train", "ann"),
    utterance(1, "train", "ann", text=""),
    utterance(2, "train", "bob", corpus="b"),
    utterance(3, "valid", "eve"),
    utterance(4, "test", "zoe"),
]


def names(parts: tuple[list[Utterance], list[Utterance]]) -> list[list[str]]:
    return [[one.name for one in part] for part in parts]


def test_parts_have_labels_and_are_of_the_corpora() -> None:
    assert names(labelled_parts(LISTED, (), "test", lambda u: bool(u.text))) == [["0", "2"], ["4"]]
    assert names(labelled_parts(LISTED, ("a",), "valid", lambda u: bool(u.text))) == [["0"], ["3"]]
    assert names(labelled_parts(LISTED, ("c",), "test", lambda u: bool(u.text))) == [[], []]


def test_usual_names_of_splits_are_those_splits() -> None:
    listed = [utterance(0, "Training", "ann"), utterance(1, "dev", "bob"), utterance(2, "EVAL", "eve")]
    assert names(labelled_parts(listed, (), "test", lambda u: True)) == [["0"], ["2"]]
    assert names(labelled_parts(listed, (), "valid", lambda u: True)) == [["0"], ["1"]]


def test_a_speaker_in_both_parts_is_refused() -> None:
    with pytest.raises(ValueError, match="ann"):
        labelled_parts([*LISTED, utterance(5, "test", "ann")], (), "test", lambda u: True)


@pytest.mark.parametrize(("length", "most", "kept"), [(10, 0, 10), (10, 3, 3), (10, 4, 4), (3, 10, 3), (0, 5, 0)])
def test_fewer_utterances_are_spread_over_all(length: int, most: int, kept: int) -> None:
    part = [utterance(number, "test", f"speaker{number}") for number in range(length)]
    found = thinned(part, most)
    assert len(found) == kept
    assert found[:1] == part[:1]
