"""Text files and outputs of programs are read and written in a named encoding, whatever the locale is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.support.paths import ROOT

PLACE_OF_MODE = {"open": 1, "fdopen": 1, "NamedTemporaryFile": 0, "TemporaryFile": 0}
DEFAULT_MODE = {"open": "r", "fdopen": "r", "NamedTemporaryFile": "w+b", "TemporaryFile": "w+b"}


def without_encoding(source: str) -> Iterator[int]:
    """Yields the lines of calls that take the encoding of the locale."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(word.arg in ("encoding", None) for word in node.keywords):
            continue
        is_method = isinstance(node.func, ast.Attribute)
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        words = {word.arg: word.value for word in node.keywords}
        if re.search(r"open\(.*b.*\)\.open\(\)", ast.unparse(node)):
            continue  # fsspec.open(path, "rb").open()
        if (
            (name == "read_text" and not node.args)
            or (name == "write_text" and len(node.args) < 2)
            or any(getattr(words.get(word), "value", None) is True for word in ("text", "universal_newlines"))
            or (name in PLACE_OF_MODE and "b" not in mode_of(name, is_method, node.args, words))
        ):
            yield node.lineno


def mode_of(name: str, is_method: bool, arguments: list[ast.expr], words: dict[str | None, ast.expr]) -> str:
    """The mode of a call that opens a file; "b" where the call is another one, such as tarfile.open."""
    place = 0 if is_method and name == "open" else PLACE_OF_MODE[name]
    given = words.get("mode", arguments[place] if len(arguments) > place else None)
    if given is None:
        return DEFAULT_MODE[name]
    mode = given.value if isinstance(given, ast.Constant) else "b"
    return mode if isinstance(mode, str) and re.fullmatch("[rwaxbt+]+", mode) else "b"


FILES = [
    path for folder in ("data_pipeline", "pretrain", "launch", "benchmarks") for path in (ROOT / folder).rglob("*.py")
]


def test_no_call_takes_the_encoding_of_the_locale() -> None:
    found = [f"{path}:{line}" for path in FILES for line in without_encoding(path.read_text(encoding="utf-8"))]
    assert not found
    assert len(FILES) > 200


@pytest.mark.parametrize(
    "call",
    [
        "open(path)", "open(path, 'w')", "Path(path).open()", "path.open()", "path.open('a')", "path.open(mode='w')",
        "os.fdopen(3)",
        "path.read_text()", "path.write_text(text)", "NamedTemporaryFile('w')", "subprocess.run(line, text=True)",
    ],
)  # fmt: skip
def test_such_a_call_would_be_found(call: str) -> None:
    assert list(without_encoding(call)) == [1]


@pytest.mark.parametrize(
    "call",
    [
        "open(path, 'rb')", "path.open('ab')", "path.open(encoding='utf-8')", "path.read_text('utf-8')",
        "tarfile.open(fileobj=file, mode='r:')", "os.open(path, os.O_RDONLY)", "NamedTemporaryFile()",
        "subprocess.run(line, encoding='utf-8')", "fs.open(path, 'rb')", "Row(text=text)",
        "fsspec.open(path, 'rb').open()",
    ],
)  # fmt: skip
def test_other_calls_are_not(call: str) -> None:
    assert not list(without_encoding(call))
