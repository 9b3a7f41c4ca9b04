"""Single definitions are read from a module's source without importing the module."""

from __future__ import annotations

import sys
import typing
from pathlib import Path

import pytest

from data_pipeline.core.definitions import definition

BASE = """
raise RuntimeError("the module was imported")
LIMIT = 3
class Base:
    limit: int = LIMIT
    def own(self):
        return missing_name
"""
DERIVED = """
from __future__ import annotations
import no_such_package
from typing import Annotated, Literal
from definitions_base import Base as Parent
Kind = Literal["a", "b"]
@staticmethod
def unused(): ...
def twice(value):
    return twice if value else 2 * LIMIT
LIMIT: int = 4
class Config(Parent):
    kind: Annotated[Kind, twice(0)] = "a"
    other: no_such_package.Thing
"""


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "definitions_base.py").write_text(BASE)
    (tmp_path / "definitions_derived.py").write_text(DERIVED.replace("    other: no_such_package.Thing\n", ""))
    (tmp_path / "definitions_wrong.py").write_text(DERIVED)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("modules")
def test_a_class_is_read_with_what_it_needs_and_no_more() -> None:
    found = definition("definitions_derived", "Config", lambda module: module.startswith("definitions_"))
    hints = typing.get_type_hints(found, include_extras=True)
    assert hints["kind"] == typing.Annotated[typing.Literal["a", "b"], 8]
    assert found.limit == 3
    assert not {"definitions_base", "definitions_derived"} & set(sys.modules)


@pytest.mark.usefixtures("modules")
def test_what_cannot_be_read_is_an_error() -> None:
    with pytest.raises(AttributeError):
        definition("definitions_base", "nothing", lambda module: True)
    with pytest.raises(ImportError, match="no_such"):
        definition("definitions_wrong", "Config", lambda module: module.startswith("definitions_"))
    with pytest.raises(ImportError, match="no module no_such_module"):
        definition("no_such_module", "Config", lambda module: True)
