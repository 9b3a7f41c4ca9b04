"""Text that users see has the field's usual words."""

from __future__ import annotations

import re

from tests.support.paths import ROOT

UNUSUAL = re.compile(r"audio-s/s|GPU-h|hours of audio (?:an|per) |quarantined files|<h2>Quarantine")
"""Speed is in × real time, and what cannot be used is rejected."""


def test_shipped_text_has_the_usual_words() -> None:
    found = [
        f"{file.relative_to(ROOT)}: {match[0]}"
        for name in ("data_pipeline", "launch", "pretrain")
        for file in (ROOT / name).rglob("*.py")
        for match in UNUSUAL.finditer(file.read_text(encoding="utf-8"))
    ]
    assert found == []
