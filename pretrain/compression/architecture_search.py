"""Searches the subnets of a supernet for the best scores at low latency, by NSGA-II (Deb et al. 2002) of optuna.

A search is a pure function of its seed and of the scores. Scores are kept in a file as they are computed; a search
that is started again draws the same subnets and reads the scores of those that it had reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.core.jsonl import append_row, read_rows
from data_pipeline.core.schema import ConfigError
from pretrain.interfaces.subnets import Space, Subnet

NAMES = ("heads", "ffn")
DRAWS = 20
"""Most draws for each subnet to score."""


class SubnetCost(NamedTuple):
    """Cost of a subnet.  rtf: predicted seconds of computing per second of audio.  megabytes: of its weights, fp32."""

    rtf: float
    megabytes: float


class ScoredSubnet(NamedTuple):
    """A subnet with its score, which is to be high, and its cost."""

    subnet: Subnet
    score: float
    cost: SubnetCost


@dataclass(frozen=True)
class Budget:
    """Limits of a search.  most_rtf, most_megabytes: largest cost; least_rtf: smallest; None: no limit."""

    most_rtf: float | None = None
    most_megabytes: float | None = None
    least_rtf: float | None = None

    def over(self, cost: SubnetCost) -> dict[str, float]:
        """Returns by how much a cost is outside of each limit, as a share of it; 0 or less where it is within."""
        limits = {"rtf": (cost.rtf, self.most_rtf), "megabytes": (cost.megabytes, self.most_megabytes)}
        found = {name: value / limit - 1 for name, (value, limit) in limits.items() if limit is not None}
        return found if self.least_rtf is None else found | {"least rtf": 1 - cost.rtf / self.least_rtf}

    def without_least(self) -> Budget:
        """Returns the same limits without a smallest latency."""
        return replace(self, least_rtf=None)

    def holds(self, cost: SubnetCost) -> bool:
        """Returns whether a cost is within all limits."""
        return all(over <= 0 for over in self.over(cost).values())


@dataclass(frozen=True)
class Scores:
    """Scores by subnet, kept in a JSON-lines file.

    file: the file.  compute: returns the score of a subnet.
    """

    file: Path
    compute: Callable[[Subnet], float]

    def known(self) -> dict[Subnet, float]:
        """Returns the scores in the file."""
        return {tuple((h, f) for h, f in row["widths"]): float(row["score"]) for row in read_rows(self.file)}

    def score(self, subnet: Subnet) -> float:
        """Returns a subnet's score, computed and kept unless it is in the file."""
        known = self.known()
        return known[subnet] if subnet in known else self.keep(subnet)

    def keep(self, subnet: Subnet) -> float:
        """Computes a subnet's score and adds it to the file."""
        score = self.compute(subnet)
        append_row(self.file, {"widths": [list(pair) for pair in subnet], "score": score})
        return score


def search_subnets(
    space: Space,
    scores: Scores,
    cost: Callable[[Subnet], SubnetCost],
    budget: Budget,
    trials: int,
    population: int = 20,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> list[ScoredSubnet]:
    """Searches for subnets with high scores and low latency; the same call continues an interrupted search.

    The first generation begins with subnets whose blocks are alike, and so what is found is at least as good as they
    are. Subnets over a limit are not scored: they compete by how far they are over it. A subnet that was drawn before
    is sampled again, which keeps generations diverse.

    Args:
        space: all subnets.
        scores: computes and keeps scores.
        cost: returns the cost of a subnet.
        budget: limits of the cost.
        trials: different subnets to score; fewer where DRAWS times as many draws do not give as many.
        population: subnets of a generation.
        seed: keys every draw.
        say: receives a line after each score that was computed.

    Returns:
        All scored subnets, in the order in which they were drawn; a search with fewer trials has the first of them.

    Raises:
        ConfigError: the smallest subnet is over a limit, or optuna is missing.
    """
    _require_room(space, cost, budget)
    study, repeated = _study(population, seed)
    for subnet in uniform_start(space, cost, budget, population // 2):
        study.enqueue_trial(_parameters(subnet, space))
    known, found, drawn = scores.known(), list[ScoredSubnet](), set[Subnet]()
    for _ in range(DRAWS * trials):
        if len(found) == trials:
            break
        trial = study.ask()
        subnet = _suggested(trial, space)
        if subnet in drawn:
            study.tell(trial, state=repeated)
            continue
        drawn.add(subnet)
        price = cost(subnet)
        for name, over in budget.over(price).items():
            trial.set_constraint(name, over)
        if not budget.holds(price):
            study.tell(trial, (0.0, price.rtf))
            continue
        if subnet not in known:
            known[subnet] = scores.keep(subnet)
            say(f"{len(found) + 1} of {trials}: {known[subnet]:.2%}, RTF {price.rtf:.5f}  {subnet_label(subnet)}")
        found.append(ScoredSubnet(subnet, known[subnet], price))
        study.tell(trial, (known[subnet], price.rtf))
    return found


def uniform_start(space: Space, cost: Callable[[Subnet], SubnetCost], budget: Budget, count: int) -> list[Subnet]:
    """Returns the slowest subnets with equal blocks that are within the limits, at most `count` of them."""
    within = [subnet for subnet in space.uniforms() if budget.holds(cost(subnet))]
    return sorted(within, key=lambda subnet: cost(subnet).rtf, reverse=True)[:count]


def front(candidates: Sequence[ScoredSubnet]) -> list[ScoredSubnet]:
    """Returns the candidates of which none has a score as high at less latency (Pareto front), the fastest first."""
    best, kept = float("-inf"), []
    for candidate in sorted(candidates, key=lambda c: (c.cost.rtf, -c.score)):
        if candidate.score > best:
            best = candidate.score
            kept.append(candidate)
    return kept


def finalists(candidates: Sequence[ScoredSubnet], count: int) -> list[ScoredSubnet]:
    """Returns the best score of the front, and others of it at evenly spaced places, the fastest first."""
    fronts = front(candidates)
    if len(fronts) <= count:
        return fronts
    places = {round((number + 1) * (len(fronts) - 1) / count) for number in range(count)}
    return [fronts[place] for place in sorted(places)]


def subnet_label(subnet: Subnet) -> str:
    """Returns a subnet as text: heads × inner channels of each block."""
    return ", ".join(f"{heads}×{ffn}" for heads, ffn in subnet)


def _require_room(space: Space, cost: Callable[[Subnet], SubnetCost], budget: Budget) -> None:
    least = cost(space.smallest)
    if not budget.without_least().holds(least):
        raise ConfigError(
            f"the smallest subnet ({subnet_label(space.smallest)}) has an rtf of {least.rtf:.5f} and "
            f"{least.megabytes:.1f} MB, and the limits are {_limit(budget.most_rtf)} and "
            f"{_limit(budget.most_megabytes)}; raise them, or "
            "train a supernet with smaller subnets (objective.elastic)"
        )


def _limit(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


def _study(population: int, seed: int) -> tuple[Any, Any]:
    """Returns a study in memory that maximises the score and minimises latency, and the state of repeated trials."""
    try:
        import optuna
    except ModuleNotFoundError:
        raise ConfigError("auricle search-architecture needs optuna: pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    return study, optuna.trial.TrialState.FAIL


def _parameters(subnet: Subnet, space: Space) -> dict[str, int]:
    """Returns a subnet as the parameters of a trial; those of blocks that do not run are the last block's."""
    padded = [*subnet, *[subnet[-1]] * (space.blocks[-1] - len(subnet))]
    sizes = {f"{name}_{n}": size for n, pair in enumerate(padded) for name, size in zip(NAMES, pair, strict=True)}
    return {"blocks": len(subnet)} | sizes


def _suggested(trial: Any, space: Space) -> Subnet:
    """Returns the subnet of a trial; each block has its own sizes, of which the first `blocks` count."""
    blocks = trial.suggest_categorical("blocks", space.blocks)
    pairs = [
        tuple(
            trial.suggest_categorical(f"{name}_{n}", sizes)
            for name, sizes in zip(NAMES, (space.heads, space.ffn), strict=True)
        )
        for n in range(space.blocks[-1])
    ]
    return tuple(pairs[:blocks])
