"""Phone ABX by fastabx (arXiv 2505.02692), which needs Python 3.12; `abx.cells` gives the same cells elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from data_pipeline.core.schema import ConfigError
from pretrain.evaluate.abx import Cell, Token


def cells(tokens: Sequence[Token], across: bool, others: int = 1) -> list[Cell]:
    """Returns all cells with at least one triple; see `abx.cells`. fastabx draws the speakers of X itself.

    Raises:
        ConfigError: fastabx is not installed.
        ValueError: there is no triple.
    """
    try:
        import polars
        from fastabx import Dataset, InMemoryAccessor, Score, Subsampler, Task
    except ImportError as error:
        raise ConfigError(
            f"abx=fastabx: needs the package fastabx, on Python 3.12 or later ({error}): pip install fastabx; "
            "abx=own gives the same cells"
        ) from None
    ends = np.cumsum([len(x_FD) for _, _, x_FD in tokens])
    places = {i: (int(end) - len(tokens[i][2]), int(end)) for i, end in enumerate(ends)}
    frames = torch.from_numpy(np.concatenate([x_FD for _, _, x_FD in tokens]).astype(np.float32))
    labels = polars.DataFrame({"phone": [phone for phone, _, _ in tokens], "speaker": [who for _, who, _ in tokens]})
    dataset = Dataset(labels, InMemoryAccessor(places, frames, torch.device("cpu")))
    conditions = {"across": ["speaker"]} if across else {"by": ["speaker"]}
    sampler = Subsampler(max_size_group=None, max_x_across=others) if across else None
    score = Score(Task(dataset, on="phone", subsampler=sampler, **conditions), "angular", progress=False)
    found = [
        Cell(row["phone"], row["phone_b"], row["speaker"], row.get("speaker_x", row["speaker"]), float(row["score"]))
        for row in score.cells.to_dicts()
    ]
    if not found:
        raise ValueError("abx: these utterances have no triple of two phones by one speaker")
    return found
