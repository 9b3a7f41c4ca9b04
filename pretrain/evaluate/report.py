"""Writes the rows of an evaluation as a table, as JSON, and as scalars to a run's TensorBoard."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from data_pipeline.core.atomic_files import write_json
from data_pipeline.core.jsonl import append_row
from data_pipeline.core.text import markdown_text, visible
from pretrain.evaluate import projector
from pretrain.evaluate.rows import ResultRow, plain
from pretrain.monitoring.figures import add_frames

HEAD = ("task", "measure", "features", "value", "95 %", "− log-mel", "− random", "retained")

LEGEND = """95 %: bootstrap interval over speakers. − log-mel, − random: difference to probing log-mel features,
and random weights of the same architecture, in percentage points. retained: share of the way
from log-mel to the architecture trained from scratch on the labels (100 %) that the frozen
encoder reaches."""


def cells(row: ResultRow) -> tuple[str, ...]:
    """Formats a row in the order of HEAD. Rates are in percent, differences in percentage points."""
    share = row.measure.startswith(
        (
            "accuracy",
            "non-silence",
            "all frames",
            "ABX",
            "PNMI",
            "phone",
            "cluster",
            "EER",
            "word",
            "character",
            "mean average",
        )
    )
    value = f"{row.value:.1%}" if share else f"{row.value:.1f}"
    interval = ""
    if row.low == row.low:
        interval = f"{row.low:.1%} … {row.high:.1%}" if share else f"{row.low:.1f} … {row.high:.1f}"
    gaps = [
        f"{100 * gap[0]:+.1f} ({100 * gap[1]:+.1f} … {100 * gap[2]:+.1f})" if gap else ""
        for gap in (row.over_log_mel, row.over_random)
    ]
    retained = f"{row.retained:.0%}" if row.retained is not None else ""
    return (row.task, row.measure, row.who, value, interval, *gaps, retained)


def table(rows: Sequence[ResultRow]) -> Table:
    """Returns the table for a terminal, without columns that are empty in all rows; nothing in it is cut."""
    shown = [cells(row) for row in rows]
    used = [number for number, name in enumerate(HEAD) if name == "value" or any(row[number] for row in shown)]
    made = Table(box=None, pad_edge=False)
    for number in used:
        made.add_column(HEAD[number], overflow="fold")
    for row in shown:
        made.add_row(*(Text(visible(row[number])) for number in used))
    return made


def markdown(rows: Sequence[ResultRow]) -> str:
    """Returns the table in Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    return (
        "\n".join(lines + ["| " + " | ".join(map(markdown_text, cells(row))) + " |" for row in rows])
        + f"\n\n{LEGEND}\n"
    )


def write(rows: Sequence[ResultRow], folder: Path) -> None:
    """Writes results.json and results.md into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", plain(rows))
    (folder / "results.md").write_text(markdown(rows), encoding="utf-8")


def into_run(
    rows: Sequence[ResultRow],
    run: Path,
    step: int,
    frames: tuple[Tensor, list[list[str]]] | None = None,
    weights: str = "",
) -> None:
    """Appends the rows to RUN/evaluations.jsonl and to its TensorBoard under evaluate/.

    Args:
        rows: the rows.
        run: the run folder.
        step: number of updates of the checkpoint.
        frames: (N, D) frames and a row of values for each, for TensorBoard's projector.
        weights: checksum of the evaluated weights.
    """
    board = SummaryWriter(str(run / "tb" / "evaluate"))
    for row in rows:
        name = re.sub(r"[^A-Za-z0-9]+", "_", f"{row.task}/{row.measure}").replace("_", "/", 1)
        found = {"step": step, "weights": weights, "name": name, **plain([row])[0]}
        append_row(run / "evaluations.jsonl", found)
        board.add_scalar(f"evaluate/{name}", row.value, step)
    if frames is not None:
        add_frames(board, *frames, projector.HEADER, "labelled_frames", step)
    board.close()
