"""Untrusted text is escaped before it is shown."""

from __future__ import annotations

import re

import pytest

from data_pipeline.core.text import html_text, markdown_block, markdown_text, table_cell, visible


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("plain é 日本 😀", "plain é 日本 😀"),
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("bell\x07\x00", r"bell\x07\x00"),
        ("two\nlines\r\t", r"two\nlines\r\t"),
        ("rtl\u202e\u2066", r"rtl\u202e\u2066"),
        ("c1\x9b", r"c1\x9b"),
        ("zero\u200bwidth\ufeff", r"zero\u200bwidth\ufeff"),
        ("lone\udc80", r"lone\udc80"),
        ("tag\U000e0041", r"tag\U000e0041"),
        ("line\u2028para\u2029", r"line\u2028para\u2029"),
    ],
)
def test_control_characters_become_escapes(given: str, shown: str) -> None:
    assert visible(given) == shown
    assert shown.isprintable()


def test_allowed_characters_are_kept() -> None:
    assert visible("a\n\x1b", keep="\n") == "a\n\\x1b"


def test_html_and_markdown_are_escaped() -> None:
    assert html_text("<script>'\"&\x1b") == "&lt;script&gt;&#x27;&quot;&amp;\\x1b"
    assert markdown_text("<b>|[x](http://y)`#_*") == r"\<b\>\|\[x\](http://y)\`#\_\*"
    assert markdown_text("a &lt; b (step 4, +1.5)") == "a &amp;lt; b (step 4, +1.5)"
    assert [markdown_text(text) for text in ("# a", "- a", "+ a", "1. a")] == [r"\# a", r"\- a", r"\+ a", r"1\. a"]
    assert "\n" not in markdown_text("a\n# b")


@pytest.mark.parametrize("given", ["=1+1", "+cmd", "-x", "@SUM(A1)"])
def test_a_cell_is_never_a_spreadsheet_formula(given: str) -> None:
    assert table_cell(given) == f"'{given}"


@pytest.mark.parametrize("given", ["-1.5", "+3", "a=b", "-inf", "-"])
def test_numeric_cells_are_unchanged(given: str) -> None:
    assert table_cell(given) == given


def test_cells_contain_no_column_separator() -> None:
    assert table_cell("a\tb\nc") == r"a\tb\nc"


@pytest.mark.parametrize("ends", ["```\n# x", "````", "a\r```\r<b>", "\x0c```\x85```\u2028```"])
def test_text_cannot_end_its_code_block(ends: str) -> None:
    lines = re.split(r"[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]", markdown_block(f"+{ends}\n+after", "diff"))
    fence = lines[0].removesuffix("diff")
    assert [number for number, line in enumerate(lines) if line.strip().startswith(fence)] == [0, len(lines) - 1]
    assert "+after" in lines
