"""Writes cells.json with fastabx (Python 3.12): pip install fastabx; python tests/evaluate/fastabx/make.py"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from fastabx import Dataset, InMemoryAccessor, Score, Task

HERE = Path(__file__).resolve().parent


def tokens() -> list[tuple[str, str, list[list[float]]]]:
    """Returns (phone, speaker, (F, 3) features): 4 phones, 3 speakers, lengths from 1 to 6, values of two digits."""
    rng = np.random.default_rng(7)
    made = []
    for speaker in range(3):
        for phone in range(4):
            for _ in range(3 if phone else 1):  # one phone has a single token, so within speakers it can only be B
                centre = np.eye(3)[phone % 3] + 0.3 * speaker
                x = np.round(centre + 0.7 * rng.standard_normal((int(rng.integers(1, 7)), 3)), 2)
                made.append((f"p{phone}", f"s{speaker}", x.tolist()))
    return made


def main() -> None:
    import polars as pl
    import torch

    given = tokens()
    found = {}
    for name, conditions in (("within", {"by": ["speaker"]}), ("across", {"across": ["speaker"]})):
        ends = np.cumsum([len(x) for _, _, x in given])
        indices = {i: (int(end) - len(given[i][2]), int(end)) for i, end in enumerate(ends)}
        data = torch.tensor([frame for _, _, x in given for frame in x], dtype=torch.float32)
        labels = pl.DataFrame({"phone": [p for p, _, _ in given], "speaker": [s for _, s, _ in given]})
        dataset = Dataset(labels, InMemoryAccessor(indices, data, torch.device("cpu")))
        score = Score(Task(dataset, on="phone", **conditions), "angular", progress=False)
        columns = [column for column in score.cells.columns if not column.startswith("index")]
        found[name] = score.cells.select(columns).to_dicts()
    (HERE / "cells.json").write_text(json.dumps({"tokens": given, **found}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
