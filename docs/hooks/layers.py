"""Draws docs/images/layers.svg from the layers in pyproject.toml: `python docs/hooks/layers.py`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "images" / "layers.svg"
COLUMNS = {
    "launch": ("the command line, and where jobs run", "#fef3c7"),
    "pretrain": ("batches in, checkpoints out", "#dcfce7"),
    "data_pipeline": ("audio in, shards out; shards in, batches out", "#dbeafe"),
}
"""Root packages from left to right: meaning and colour. `auricle`, the top layer, is drawn above launch."""
WIDTH, GAP, ROW, BOX, TOP, LEFT = 350, 40, 40, 28, 66, 14


def layers() -> list[list[str]]:
    """Returns the modules of each layer, the highest layer first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    found = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[module.strip() for module in layer.split("|")] for layer in found]


def svg(rows: list[list[str]]) -> str:
    """Returns the picture: a column for each root package, a row for each layer."""
    columns: dict[str, list[list[str]]] = {name: [] for name in COLUMNS}
    for row in rows:
        root = row[0].partition(".")[0]
        columns[root if root in columns else "launch"].append(row)
    width = LEFT * 2 + WIDTH * len(columns) + GAP * (len(columns) - 1)
    height = TOP + ROW * max(map(len, columns.values())) + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="Layers of '
        'auricle: a module imports from rows below its own and from columns to the right" '
        'font-family="Helvetica, Arial, sans-serif">',
        '<defs><marker id="h" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L10 5L0 10z" fill="#334155"/></marker></defs>',
        "<style>.t{font-size:14px;font-weight:bold;fill:#0f172a}.l{font-size:11px;fill:#475569}"
        ".s{font-size:12px;text-anchor:middle;fill:#1e293b}.a{stroke:#334155;stroke-width:1.4;marker-end:url(#h)}</style>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for number, (name, found) in enumerate(columns.items()):
        x = LEFT + number * (WIDTH + GAP)
        meaning, colour = COLUMNS[name]
        parts.append(f'<text x="{x}" y="20" class="t">{name}/</text>')
        parts.append(f'<text x="{x}" y="38" class="l">{escape(meaning)}</text>')
        for place, row in enumerate(found):
            parts += boxes(row, x, TOP + place * ROW, colour)
            if place:
                middle, y = x + WIDTH / 2, TOP + place * ROW
                parts.append(f'<line x1="{middle:g}" y1="{y - ROW + BOX}" x2="{middle:g}" y2="{y - 1}" class="a"/>')
        if number:
            parts.append(
                f'<line x1="{x - GAP + 4}" y1="{TOP + BOX // 2}" x2="{x - 4}" y2="{TOP + BOX // 2}" class="a"/>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def boxes(row: list[str], x: int, y: int, colour: str) -> list[str]:
    """Returns the boxes of one layer, side by side, each as wide as its name needs; `x` and `y` are the left top."""
    names = [module.partition(".")[2] or module for module in row]
    free = WIDTH - 6 * (len(names) - 1)
    total, parts, left = sum(len(name) + 3 for name in names), [], float(x)
    for name in names:
        size = free * (len(name) + 3) / total
        parts.append(
            f'<rect x="{left:.1f}" y="{y}" width="{size:.1f}" height="{BOX}" rx="6" fill="{colour}" stroke="#334155"/>'
        )
        parts.append(f'<text x="{left + size / 2:.1f}" y="{y + 18}" class="s">{escape(name)}</text>')
        left += size + 6
    return parts


if __name__ == "__main__":
    PICTURE.write_text(svg(layers()), encoding="utf-8")
