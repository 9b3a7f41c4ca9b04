"""The picture of the layers is drawn from those that import-linter checks."""

from __future__ import annotations

import importlib.util

from tests.support.paths import ROOT


def test_the_picture_shows_the_layers_that_are_checked() -> None:
    spec = importlib.util.spec_from_file_location("layers", ROOT / "docs" / "hooks" / "layers.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    drawing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(drawing)
    rows = drawing.layers()
    assert ["launch.cli", "launch.config"] in rows
    shown = drawing.PICTURE.read_text(encoding="utf-8")
    assert shown == drawing.svg(rows), "draw it again: python docs/hooks/layers.py"
    assert all(f">{module.partition('.')[2] or module}</text>" in shown for row in rows for module in row)
