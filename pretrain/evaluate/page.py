"""One HTML page of an evaluation that opens offline: the table, curves over audio, layers × tasks, confusions."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

import numpy as np

from data_pipeline.core.atomic_files import write_atomically
from data_pipeline.core.jsonl import read_rows
from data_pipeline.core.text import visible
from pretrain.evaluate.report import HEAD, LEGEND, cells
from pretrain.evaluate.rows import Detail, ResultRow

STYLE: Final = """body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:.25rem .7rem;text-align:left;
border-bottom:1px solid #d0d7de;white-space:nowrap}td:nth-child(n+4){text-align:right}.wide{overflow-x:auto}
img{max-width:100%;height:auto}h2{margin-top:2.5rem}p.note{color:#57606a;white-space:pre-line}"""
MOST_CONFUSED: Final = 60
"""Classes shown in a confusion matrix; the rarest beyond are left out."""


@dataclass(frozen=True)
class Curve:
    """Scores of a followed run.  points: (hours of training audio, value)."""

    name: str
    run: str
    points: tuple[tuple[float, float], ...]


def read_curves(run: Path) -> list[Curve]:
    """Returns the scores in RUN/evaluations.jsonl over hours of training audio; none for other folders."""
    heard: dict[int, float] = {}
    for row in read_rows(run / "metrics.jsonl"):
        if isinstance(row.get("step"), int) and isinstance(row.get("data/audio_hours"), int | float):
            heard[row["step"]] = float(row["data/audio_hours"])
    found: dict[str, list[tuple[float, float]]] = {}
    for row in read_rows(run / "evaluations.jsonl"):
        if row.get("step") in heard and isinstance(row.get("value"), int | float):
            found.setdefault(str(row.get("name")), []).append((heard[row["step"]], float(row["value"])))
    return [Curve(name, run.resolve().name, tuple(sorted(points))) for name, points in found.items()]


def write_page(rows: Sequence[ResultRow], details: Sequence[Detail], curves: Sequence[Curve], file: Path) -> None:
    """Writes the page; it refers to no other file.

    Args:
        rows: the results.
        details: accuracies of single layers, and confusions.
        curves: scores of a followed run over hours of training audio.
        file: the page.
    """
    parts = ["<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>"]
    parts += ["<title>Evaluation</title>", f"<style>{STYLE}</style>", "<h1>Evaluation</h1>", _table(rows)]
    parts.append(f"<p class=note>{escape(LEGEND)}</p>")
    if curves:
        parts += ["<h2>Over audio heard</h2>", _image(_curves(curves), "scores over hours of audio heard")]
    if any(detail.by_layer for detail in details):
        parts += ["<h2>Layers × tasks</h2>", _image(_layers(details), "accuracy of each layer on each task")]
        parts.append("<p class=note>Accuracy of a probe of one layer, on the speakers by which layers are chosen.</p>")
    for detail in details:
        if detail.confusion_CC is not None:
            title = f"{detail.task}: {detail.who}"
            parts += [
                f"<h2>Confusions, {escape(visible(title))}</h2>",
                _image(_confusion(detail), f"confusions, {title}"),
            ]
            parts.append(f"<p class=note>{escape(visible(_most_confused(detail)))}</p>")
    write_atomically(file, "\n".join(parts) + "\n")


def _table(rows: Sequence[ResultRow]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in HEAD)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(visible(cell))}</td>" for cell in cells(row)) + "</tr>" for row in rows
    )
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def _image(figure: Any, label: str) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    data = base64.b64encode(content.getvalue()).decode()
    return f"<img alt='{escape(visible(label), quote=True)}' src='data:image/svg+xml;base64,{data}'>"


def _plain(text: str) -> str:
    """Returns a label that matplotlib takes literally."""
    return visible(text).replace("$", r"\$").lstrip("_") or "-"


def _curves(curves: Sequence[Curve]) -> Any:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(curve.name for curve in curves))
    figure = Figure(figsize=(11, 3.2 * -(-len(names) // 2)), layout="constrained")
    axes = figure.subplots(-(-len(names) // 2), 2, squeeze=False).flat
    for axis, name in zip(axes, names, strict=False):
        for curve in curves:
            if curve.name == name:
                axis.plot(*zip(*curve.points, strict=True), marker="o", markersize=3, label=_plain(curve.run))
        axis.set(title=_plain(name), xlabel="hours of audio heard")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in list(figure.axes)[len(names) :]:
        axis.remove()
    return figure


def _layers(details: Sequence[Detail]) -> Any:
    from matplotlib.figure import Figure

    shown = [detail for detail in details if detail.by_layer]
    depth = max(len(detail.by_layer) for detail in shown)
    values = np.full((len(shown), depth), np.nan)
    for row, detail in enumerate(shown):
        values[row, : len(detail.by_layer)] = [100 * value for value in detail.by_layer]
    figure = Figure(figsize=(4 + 0.6 * depth, 1 + 0.4 * len(shown)), layout="constrained")
    axis = figure.subplots()
    # tasks differ in their level: colours compare the layers of a row
    low, high = np.nanmin(values, 1, keepdims=True), np.nanmax(values, 1, keepdims=True)
    axis.imshow((values - low) / np.maximum(high - low, 1e-9), cmap="viridis", aspect="auto", vmin=0, vmax=1)
    for (row, layer), value in np.ndenumerate(values):
        if value == value:
            bright = (value - low[row, 0]) / max(high[row, 0] - low[row, 0], 1e-9) > 0.6
            axis.text(
                layer, row, f"{value:.1f}", ha="center", va="center", color="black" if bright else "white", size=8
            )
    axis.set_yticks(range(len(shown)), [_plain(f"{detail.task}, {detail.who}") for detail in shown], size=8)
    axis.set_xticks(range(depth), [str(layer) for layer in range(depth)])
    axis.set_xlabel("layer (0 is the input of the first block); %, colour within a row")
    return figure


def _shares(detail: Detail) -> tuple[np.ndarray, list[str]]:
    """Returns the shares of the true class's vectors, (C, C), of the most frequent classes, and their names."""
    assert detail.confusion_CC is not None
    counts_CC = detail.confusion_CC.astype(float)
    common = np.argsort(-counts_CC.sum(1), kind="stable")[:MOST_CONFUSED]
    kept = np.array(sorted(i for i in common if counts_CC[i].sum() > 0), dtype=int)
    total_C1 = np.maximum(counts_CC.sum(1, keepdims=True), 1.0)
    return (counts_CC / total_C1)[np.ix_(kept, kept)], [detail.classes[i] for i in kept]


def _confusion(detail: Detail) -> Any:
    from matplotlib.figure import Figure

    share_CC, names = _shares(detail)
    figure = Figure(figsize=(2.5 + 0.2 * len(names), 2 + 0.2 * len(names)), layout="constrained")
    axis = figure.subplots()
    drawn = axis.imshow(100 * share_CC, cmap="magma_r", vmin=0, vmax=100)
    axis.set_xticks(range(len(names)), list(map(_plain, names)), rotation=90, size=7)
    axis.set_yticks(range(len(names)), list(map(_plain, names)), size=7)
    axis.set(xlabel="predicted", ylabel="true")
    figure.colorbar(drawn, ax=axis, shrink=0.6, label="% of the true class")
    return figure


def _most_confused(detail: Detail) -> str:
    share_CC, names = _shares(detail)
    off_CC = share_CC * (1 - np.eye(len(names)))
    pairs = [np.unravel_index(at, off_CC.shape) for at in np.argsort(-off_CC, axis=None)[:8]]
    found = [f"{names[i]} as {names[j]} {off_CC[i, j]:.0%}" for i, j in pairs if off_CC[i, j] > 0]
    return f"Most frequent: {', '.join(found)}" if found else "No confusions."
