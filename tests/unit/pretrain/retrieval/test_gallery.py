"""The page of a search: escaped, self-contained, and with a reason for what cannot be shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.loader.pieces import Piece, pieces
from data_pipeline.loader.recordings import Unusable
from pretrain.retrieval import gallery
from tests.support.pictures import colours
from tests.support.sounds import sound


def test_names_and_texts_are_escaped() -> None:
    hostile = '<script>alert(1)</script>"\x1b[31m'
    piece = Piece("text", hostile, text=hostile)
    page = gallery.page(piece, [gallery.SearchResult(1, 0.5, "text", hostile, piece)])
    assert "<script" not in page
    assert "\x1b" not in page
    assert page.count("&lt;script&gt;") >= 3
    assert "default-src 'none'" in page


def test_a_picture_is_reduced(tmp_path: Path) -> None:
    Image.fromarray(np.tile(colours("large"), (100, 100, 1))).save(tmp_path / "large.png")
    [piece] = pieces([str(tmp_path / "large.png")])
    assert isinstance(piece, Piece)
    page = gallery.page(piece, [])
    assert len(page) < 300_000


def test_the_page_holds_all_that_it_shows() -> None:
    heard = Piece("speech", "a.wav", wave=sound("a", 0.3))
    lost = Unusable("b.wav", "vanished", "is <gone>")
    page = gallery.page(
        heard, [gallery.SearchResult(1, 1.5, "speech", "a.wav", heard), gallery.SearchResult(2, -1, "x", "b", lost)]
    )
    assert page.count('src="data:audio/flac;base64,') == 2
    assert page.count("src=") == 2
    assert "cannot be shown: is &lt;gone&gt;" in page
    assert 'value="1.000"' in page
    assert 'value="0.000"' in page
