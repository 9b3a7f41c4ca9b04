"""Ranks of retrieval with made-up vectors: shared texts, several right recordings, ties."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pretrain.evaluate.joint_retrieval import ranks


def unit(degrees: float) -> npt.NDArray[np.float32]:
    return np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], np.float32)


def test_the_nearest_right_candidate_counts() -> None:
    speech = {"a": unit(0), "b": unit(80), "c": unit(50), "d": unit(4)}
    text = {"yes": unit(5), "no": unit(90)}
    pairs = [("a", "yes", "s"), ("b", "yes", "t"), ("c", "no", "t")]
    assert ranks(pairs, speech, text).tolist() == [1, 2, 1]  # c is 40 degrees from "no" and 45 from "yes"
    back = [(candidate, query, speaker) for query, candidate, speaker in pairs]
    assert ranks(back, text, speech).tolist() == [2, 2, 2]  # d, which has no text, is nearest to "yes", b to "no"


def test_an_equally_near_wrong_candidate_comes_first() -> None:
    same = {"yes": unit(10), "no": unit(10)}
    found = ranks([("a", "yes", "s"), ("b", "no", "s")], {"a": unit(0), "b": unit(20)}, same)
    assert found.tolist() == [2, 2]
