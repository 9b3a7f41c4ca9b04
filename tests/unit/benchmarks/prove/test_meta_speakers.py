"""Speakers as tasks on made-up frames: given utterances help where speakers differ, and ANIL learns a better start."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.prove import meta_speakers
from data_pipeline.core.rng import keyed_rng
from pretrain.evaluate.config import FewShotConfig
from pretrain.evaluate.features import Labelled

PHONES, DIM = 3, 6


def spoken(first: int, speakers: int) -> dict[str, list[Labelled]]:
    """Makes six utterances of each speaker, who moves two of the phones towards each other."""
    made = {}
    for number in range(first, first + speakers):
        rng = np.random.default_rng(number)
        means = np.eye(DIM)[:PHONES] + 0.6 * rng.normal(0, 1, (PHONES, DIM))
        made[f"s{number}"] = [
            Labelled(
                torch.from_numpy(means[y_N] + 0.4 * rng.normal(0, 1, (len(y_N), DIM)))[:, None].half(),
                torch.from_numpy(y_N),
                np.zeros(len(y_N), int),
                (f"s{number}",),
            )
            for y_N in rng.integers(0, PHONES, (6, 30))
        ]
    return made


def test_given_utterances_help_and_a_learned_start_helps_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta_speakers, "UPDATES", 40)
    monkeypatch.setattr(meta_speakers, "LR", 0.03)
    start, scaled = meta_speakers.fitted(spoken(0, 8))
    train, test = (
        {name: [scaled(one) for one in utterances] for name, utterances in part.items()}
        for part in (spoken(0, 8), spoken(20, 6))
    )
    own, rates = meta_speakers.learned(start, train, FewShotConfig(shots=(1, 3)), seed=0)

    def accuracy(begin: dict[str, torch.Tensor], rate: object, steps: int) -> float:
        by = rate if callable(rate) else lambda name, step: torch.tensor(rate)
        tally = meta_speakers.adapted_hits(begin, by, steps, test, 3, 0)
        assert list(tally) == sorted(test)
        return sum(hits for hits, _ in tally.values()) / sum(frames for _, frames in tally.values())

    unadapted, tuned, learned = accuracy(start, 0.0, 0), accuracy(start, 1.0, 5), accuracy(own, rates.rate, 5)
    assert tuned > unadapted
    assert learned > unadapted + 0.05
    rows = meta_speakers.rows_of({("unadapted", 3): [{"a": (1, 2)}], ("fine-tuned", 3): [{"a": (2, 2)}]})
    assert [row.over_tuned is None for row in rows] == [False, True]
    assert rows[0].over_tuned is not None
    assert rows[0].over_tuned.value == -0.5


def test_utterances_that_are_given_are_not_counted() -> None:
    utterances = [meta_speakers.Spoken(torch.zeros(1, 1), torch.tensor([n])) for n in range(5)]
    given, others = meta_speakers.drawn(utterances, 2, keyed_rng(0))
    assert len(given) == 2
    assert sorted(int(one.y_N) for one in (*given, *others)) == list(range(5))
