"""Config differences and name suggestions."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from data_pipeline.core.schema import ABSENT, about, config, diff, document, flatten, hint, suggest


def test_flatten_gives_dotted_paths() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [1, 2]}}, "e": None}) == {"a.b": 1, "a.c.d": [1, 2], "e": None}


def test_diff_lists_changed_added_and_removed_fields_by_path() -> None:
    before, after = {"a": {"b": 1, "c": 2}, "d": True}, {"a": {"b": 3}, "d": 1, "e": None}
    assert diff(before, after) == [("a.b", 1, 3), ("a.c", 2, ABSENT), ("d", True, 1), ("e", ABSENT, None)]
    assert diff(before, before) == []
    assert repr(ABSENT) == "(absent)"


def test_suggest_returns_the_nearest_name_or_nothing() -> None:
    assert suggest("hubrt", ["wavlm", "hubert"]) == "hubert"
    assert suggest("xyz", ["wavlm", "hubert"]) == ""
    assert hint("hubrt", ["wavlm", "hubert"]) == " (did you mean hubert?)"
    assert hint("xyz", ["wavlm", "hubert"]) == ""


@config
class Part:
    size: Annotated[int, about("its size")] = 3


@config
class Whole:
    part: Annotated[Part | None, about("a part, or none")] = dataclasses.field(default_factory=Part)


def test_a_section_that_may_be_null_is_documented_by_its_fields_or_as_null() -> None:
    assert [(row.path, row.default) for row in document(Whole)] == [("part.size", "3")]
    assert [(row.path, row.default) for row in document(Whole, "", {"part": {"size": 5}})] == [("part.size", "5")]
    assert [(row.path, row.default) for row in document(Whole, "", {"part": None})] == [("part", "null")]
