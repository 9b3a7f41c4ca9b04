"""Runs of equal frame labels."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from pretrain.nn.unit_runs import frames_of_runs, runs_of


def test_equal_neighbours_are_one_unit() -> None:
    labels_BF = torch.tensor([[3, 3, 1, 1, 1, 3, -1], [-1, -1, -1, -1, -1, -1, -1]])
    runs = runs_of(labels_BF)
    assert runs.ids_BN.tolist() == [[3, 1, 3], [-1, -1, -1]]
    assert runs.frames_BN.tolist() == [[2, 3, 1], [0, 0, 0]]
    assert runs.lengths_B.tolist() == [3, 0]


def test_frames_without_a_label_divide_units() -> None:
    runs = runs_of(torch.tensor([[2, -1, 2, 2]]))
    assert (runs.ids_BN.tolist(), runs.frames_BN.tolist()) == ([[2, 2]], [[1, 2]])


def test_runs_become_the_frames_they_were_made_of() -> None:
    rng = np.random.default_rng(0)
    labels_BF = torch.full((5, 60), -1)
    for row, length in enumerate((60, 1, 0, 31, 7)):
        labels_BF[row, :length] = torch.from_numpy(rng.integers(0, 3, length))
    runs = runs_of(labels_BF)
    assert torch.equal(frames_of_runs(runs.ids_BN, runs.frames_BN), labels_BF)
    for ids, length, row in zip(runs.ids_BN.tolist(), runs.lengths_B.tolist(), labels_BF.tolist(), strict=True):
        assert ids[:length] == [unit for unit, _ in itertools.groupby(row) if unit >= 0]


def test_no_frames_give_no_units() -> None:
    assert runs_of(torch.zeros(2, 0, dtype=torch.int64)).ids_BN.tolist() == [[-1], [-1]]
