"""The search finds the known optimum of a made-up score, and a killed one ends in the same front."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.core.schema import ConfigError
from pretrain.compression.architecture_search import (
    Budget,
    ScoredSubnet,
    Scores,
    SubnetCost,
    finalists,
    front,
    search_subnets,
)
from pretrain.interfaces.subnets import ElasticConfig, Space, Subnet

SPACE = Space(ElasticConfig(blocks=(2, 3), heads=(1, 2, 4), ffn=(16, 32, 64)), layers=3, heads=4, ffn_dim=64, parts=1)
BUDGET = Budget(most_rtf=0.011)
TRIALS = 180


def score(subnet: Subnet) -> float:
    """Later blocks profit from heads, earlier ones from channels; each size gains less than the one before it."""
    gains = [(n + 1) * np.log2(1 + heads) + (3 - n) * np.log2(ffn / 8) for n, (heads, ffn) in enumerate(subnet)]
    return float(sum(gains)) / 100


def cost(subnet: Subnet) -> SubnetCost:
    return SubnetCost(
        0.001 + sum(0.0008 * heads + 0.00003 * ffn for heads, ffn in subnet), sum(f for _, f in subnet) / 100
    )


def every() -> list[Subnet]:
    pairs = list(itertools.product(SPACE.heads, SPACE.ffn))
    return [subnet for blocks in SPACE.blocks for subnet in itertools.product(pairs, repeat=blocks)]


def searched(
    file: Path, trials: int = TRIALS, budget: Budget = BUDGET, compute: Callable[[Subnet], float] = score, seed: int = 1
) -> list[ScoredSubnet]:
    return search_subnets(SPACE, Scores(file, compute), cost, budget=budget, trials=trials, seed=seed)


def test_the_known_optimum_of_a_made_up_score_is_found(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    within = {subnet: score(subnet) for subnet in every() if BUDGET.holds(cost(subnet))}
    best = max(within.values())
    assert len(every()) == SPACE.size == 810
    found = searched(tmp_path / "scores.jsonl", seed=2)
    assert max(candidate.score for candidate in found) == pytest.approx(best)
    assert len({candidate.subnet for candidate in found}) == len(found) == TRIALS < 0.4 * len(within)
    assert all(BUDGET.holds(candidate.cost) and SPACE.holds(candidate.subnet) for candidate in found)
    uniform = max(score(subnet) for subnet in SPACE.uniforms() if BUDGET.holds(cost(subnet)))
    begun = searched(tmp_path / "scores.jsonl", trials=10, seed=2)
    assert max(candidate.score for candidate in begun) >= uniform, "it begins with equal blocks"
    random = [max(np.random.default_rng(seed).choice(list(within.values()), TRIALS)) for seed in range(20)]
    assert np.mean(random) < 0.99 * best, "as many random draws do not find it"


def test_a_killed_search_ends_in_the_same_front(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    whole = searched(tmp_path / "whole.jsonl")
    scored = 0

    def killed(subnet: Subnet) -> float:
        nonlocal scored
        scored += 1
        if scored > 60:
            os._exit(9)
        return score(subnet)

    file = tmp_path / "parts.jsonl"
    child = os.fork()
    if not child:
        searched(file, compute=killed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with file.open("ab") as lines:
        lines.write(b'{"widths": [[1, 1')  # a line that the kill cut off
    more: list[Subnet] = []

    def counted(subnet: Subnet) -> float:
        more.append(subnet)
        return score(subnet)

    again = searched(file, compute=counted)
    assert again == whole
    assert front(again) == front(whole)
    assert len(more) == len(whole) - 60, "scores that were computed are kept"
    assert searched(tmp_path / "whole.jsonl", trials=80) == whole[:80]


def test_fronts_and_finalists() -> None:
    points = [(3.0, 0.5), (1.0, 0.2), (2.0, 0.2), (4.0, 0.9), (2.5, 0.6), (5.0, 0.8)]
    candidates = [ScoredSubnet(((n, n),), high, SubnetCost(slow, 1.0)) for n, (slow, high) in enumerate(points)]
    assert [(c.cost.rtf, c.score) for c in front(candidates)] == [(1.0, 0.2), (2.5, 0.6), (4.0, 0.9)]
    assert finalists(candidates, 3) == front(candidates)
    assert [c.score for c in finalists(candidates, 2)] == [0.6, 0.9]
    assert [c.score for c in finalists(candidates, 1)] == [0.9]


def test_limits_below_the_smallest_subnet_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"smallest subnet \(1×16, 1×16\) has an rtf of 0.00356 and 0.3 MB"):
        searched(tmp_path / "scores.jsonl", budget=Budget(0.003))
    assert Budget(0.01, 0.5).over(SubnetCost(0.02, 0.4)) == pytest.approx({"rtf": 1.0, "megabytes": -0.2})
