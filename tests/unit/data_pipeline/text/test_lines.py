"""Lines of a text file: which are used, and what is said about the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.core.schema import ConfigError
from data_pipeline.text.lines import LONGEST_LINE, read_lines
from data_pipeline.text.tokenizer import Tokenizer, write_tokens


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    values = {"kind": "characters", "label": "text", "case": "lower", "symbols": [*" abcdefghijklmnopqrstuvwxyz"]}
    return {"text": write_tokens(str(tmp_path_factory.mktemp("tokens")), values)}


def test_usable_lines_are_drawn_and_the_others_are_counted_and_listed(
    letters: dict[str, Tokenizer], tmp_path: Path
) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes(b"go on\r\n\nA tool\n123\n\xff\xfe\n" + b"a" * (LONGEST_LINE + 1) + b"\nlast")
    said: list[str] = []
    lines = read_lines(str(path), letters, said.append)
    assert len(lines) == 3
    assert [number for number, _ in lines.rejects] == [4, 5, 6]
    assert "3 of 6 lines are left out" in said[0]
    assert "line 4 ('123') has no token of data.tokens.text" in said[0]
    assert "line 5 is not UTF-8" in said[0]
    rng = np.random.default_rng(0)
    drawn = {letters["text"].decode(lines.draw(rng)["text"].tolist()) for _ in range(100)}
    assert drawn == {"go on", "a tool", "last"}


@pytest.mark.parametrize(("content", "reason"), [(b"", "it is empty"), (b"1\n2\n", "line 1 .* has no token")])
def test_a_file_without_a_usable_line_is_refused(
    letters: dict[str, Tokenizer], tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "lines.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=f"data.lines=.*no line can be used \\({reason}"):
        read_lines(str(tmp_path / "lines.txt"), letters)


def test_a_folder_and_a_missing_file_are_refused(letters: dict[str, Tokenizer], tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(ConfigError, match=r"cannot be read.*a sentence a line"):
            read_lines(str(path), letters)
