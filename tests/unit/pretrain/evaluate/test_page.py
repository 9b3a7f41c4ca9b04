"""The HTML page: complete, offline, and with names that are shown literally."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pretrain.evaluate.neural_probe import width_for
from pretrain.evaluate.page import read_curves, write_page
from pretrain.evaluate.rows import Detail, ResultRow

HOSTILE = "<script>alert(1)</script>$x_$"


class Tags(HTMLParser):
    """Collects tags, and everything that a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attributes if name in ("src", "href")]


def example(folder: Path) -> Path:
    run = folder / "run"
    run.mkdir()
    rows = [{"step": step, "data/audio_hours": step / 10} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scores = [{"step": step, "name": "phones/all_frames", "value": 0.2 + step / 10} for step in (3, 1)]
    (run / "evaluations.jsonl").write_text("\n".join(map(json.dumps, scores)))
    confusion_CC = np.array([[8, 2, 0], [1, 9, 0], [0, 0, 0]])
    details = [
        Detail("phones", HOSTILE, (0.3, 0.4, 0.35), confusion_CC, ("AA", "$b_", "never")),
        Detail("keywords", "log-mel", (), np.eye(3, dtype=int), ("x", "y", "z")),
    ]
    rows_ = [ResultRow("phones", "non-silence frames", HOSTILE, 0.35, 0.3, 0.4, (0.05, 0.01, 0.09), None, 0.5)]
    write_page(rows_, details, read_curves(run), folder / "report.html")
    return folder / "report.html"


def test_the_page_is_complete_and_loads_nothing(tmp_path: Path) -> None:
    text = example(tmp_path).read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert "script" not in tags.tags
    assert len(tags.loaded) == 4  # curves, layers, and two confusions
    assert all(source.startswith("data:image/svg+xml;base64,") for source in tags.loaded)
    assert not re.search(r"https?://", re.sub(r"base64,[^']*", "", text))
    assert "35.0%" in text
    assert "AA as $b_ 20%" in text


def test_curves_are_over_hours_of_audio(tmp_path: Path) -> None:
    example(tmp_path)
    [curve] = read_curves(tmp_path / "run")
    assert (curve.name, curve.run) == ("phones/all_frames", "run")
    assert np.allclose(curve.points, ((0.1, 0.3), (0.3, 0.5)))
    assert read_curves(tmp_path) == []


@pytest.mark.parametrize(("weights", "dim"), [(5_000_000, 1_680), (90_000_000, 1_680), (20_000, 64)])
def test_the_network_has_as_many_weights_as_the_encoder(weights: int, dim: int) -> None:
    width = width_for(weights, dim, 40)
    assert width * (dim + width + 40) == pytest.approx(weights, rel=0.01)
