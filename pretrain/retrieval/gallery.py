"""Results of a search as one HTML file with players and pictures, which needs no network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from data_pipeline.audio import codecs
from data_pipeline.core.text import html_text
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.images import decoding
from data_pipeline.loader.pieces import Piece
from data_pipeline.loader.recordings import Unusable

SIDE: Final = 256
"""Longest side of a picture in pixels."""
POLICY: Final = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
"""The page can load nothing and run no script, whatever a name contains."""


@dataclass(frozen=True)
class SearchResult:
    """One result. piece: its content, or why it cannot be shown."""

    rank: int
    score: float
    kind: str
    name: str
    piece: Piece | Unusable


def page(query: Piece, results: Sequence[SearchResult]) -> str:
    """Returns the HTML of a query and its results. Names and texts are escaped."""
    cards = "\n".join(_card(result) for result in results)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{html_text(query.name)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        f'<h1>Nearest to <q>{html_text(query.name)}</q></h1>\n<div class="query">{_media(query)}</div>\n'
        f'<ol class="results">\n{cards}\n</ol>\n</body></html>\n'
    )


def _card(result: SearchResult) -> str:
    share = max(0.0, min(1.0, result.score))
    return (
        f'<li class="{html_text(result.kind)}"><p class="head"><b>{result.rank}</b> {html_text(result.kind)} '
        f'<meter value="{share:.3f}"></meter> {result.score:.3f}</p>\n'
        f'{_media(result.piece)}\n<p class="name">{html_text(result.name)}</p></li>'
    )


def _media(piece: Piece | Unusable) -> str:
    if isinstance(piece, Unusable):
        return f'<p class="error">cannot be shown: {html_text(piece.error)}</p>'
    if piece.wave is not None:
        flac = codecs.encode(codecs.to_int16(piece.wave), SAMPLE_RATE, "flac")
        return f'<audio controls preload="metadata" src="{_data(flac, "audio/flac")}"></audio>'
    if piece.image:
        try:
            shown = decoding.stored(decoding.decode(piece.image), SIDE)
        except decoding.ImageError as error:
            return f'<p class="error">cannot be shown: {html_text(str(error))}</p>'
        return f'<img alt="" src="{_data(shown, "image/png")}">'
    return f'<p class="text">{html_text(piece.text)}</p>'


def _data(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


STYLE: Final = """
body { font: 15px/1.4 sans-serif; margin: 2rem; color: #222; background: #fafafa; }
h1 { font-size: 1.3rem; } q { color: #0b5; }
.query { margin-bottom: 1.5rem; }
.results { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem; padding: 0; }
.results li { list-style: none; background: #fff; border: 1px solid #ddd; border-radius: 6px; padding: .7rem; }
.head { margin: 0 0 .5rem; color: #666; } .head b { color: #222; font-size: 1.1rem; margin-right: .3rem; }
.name { margin: .5rem 0 0; color: #666; font-size: .8rem; overflow-wrap: anywhere; }
.text { font-size: 1.1rem; margin: 0; overflow-wrap: anywhere; }
.error { color: #a00; }
audio { width: 100%; } img { max-width: 100%; min-width: 6rem; image-rendering: pixelated; border: 1px solid #eee; }
meter { width: 6rem; }
"""
