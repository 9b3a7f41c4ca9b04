"""Measures what an architecture search finds beyond uniform scaling, random search and truncation.

    python benchmarks/prove/search.py --teacher runs/T             # more than an hour on two cores
    python benchmarks/prove/search.py --teacher runs/T --updates 20 --seeds 1 --subnets 8 --trials 4 --max-utterances 20

Speech: manifest.tsv of the folder that AURICLE_SPEECH names; the teacher is a run of quality_hubert, and a supernet is
distilled from it on the splits pretrain and train, anew for each seed. At the latencies of three subnets whose blocks
are alike, from this machine's table, within 3 %: the best subnet on validation speakers of NSGA-II, of as many random
draws and of uniform scaling; beside them the deepest truncation of the supernet that is not slower. All share the
supernet's weights and are compared on test speakers, paired. With the first seed, eight subnets are distilled alone,
too, and Kendall's τ says whether the supernet ranks them as they are. The page is written after each seed, and the same
command continues. Writes benchmarks/results/search.json and .md. Exit code 1 unless at each latency the search is 0.5
points above uniform scaling (interval above 0) and above random search.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import scipy.stats

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.prove.common import auricle, markdown_table, parser_of, real_speech  # noqa: E402
from benchmarks.prove.compress import EQUAL, tallies  # noqa: E402
from benchmarks.prove.compress_students import cut, train, widths_of  # noqa: E402
from data_pipeline.core import jsonl  # noqa: E402
from data_pipeline.core.rng import keyed_rng  # noqa: E402
from data_pipeline.core.schema import load  # noqa: E402
from launch.workflows.searching_architecture import open_supernet, subnet_encoder, subnet_score  # noqa: E402
from pretrain.checkpointing.weights import LoadedCheckpoint  # noqa: E402
from pretrain.compression.architecture_search import Budget, Scores, SubnetCost, search_subnets, subnet_label  # noqa: E402
from pretrain.compression.latency import LatencyModel, measured_subnets, megabytes  # noqa: E402
from pretrain.evaluate.config import EvaluateConfig  # noqa: E402
from pretrain.evaluate.frozen_encoders import last_layer, log_mel_with_context, open_encoder  # noqa: E402
from pretrain.evaluate.metrics import NON_SILENCE, Tally, accuracy, bootstrap  # noqa: E402
from pretrain.evaluate.task_evaluation import TaskEvaluation  # noqa: E402
from pretrain.interfaces.subnets import Space, Subnet  # noqa: E402
from pretrain.profiling.processor import model_name  # noqa: E402

SHARES = (0.55, 0.7, 0.85)
"""Latencies, about, as shares of the supernet's."""
ABOVE = 0.005
TAU = 0.6
"""Least rank correlation of subnets in the supernet and trained alone."""
SEARCH, RANDOM, UNIFORM, TRUNCATION = "search", "random search", "uniform scaling", "truncation"
Cost = Callable[[Subnet], SubnetCost]


def latencies(space: Space, cost: Cost) -> list[float]:
    """Returns the latencies of the subnets with equal blocks that are nearest to SHARES of the supernet's."""
    whole, uniform = cost(space.largest).rtf, [cost(subnet).rtf for subnet in space.uniforms()]
    return [min(uniform, key=lambda rtf: abs(rtf - share * whole)) for share in SHARES]


def rivals(space: Space, scores: Scores, cost: Cost, budget: Budget, trials: int, seed: int) -> dict[str, Subnet]:
    """Returns the best subnet within the budget of each way to choose one; a truncation may be faster."""

    def within(subnets: Sequence[Subnet]) -> list[Subnet]:
        return [subnet for subnet in subnets if budget.holds(cost(subnet))]

    population = max(4, trials // 2)
    found = search_subnets(space, scores, cost, budget, trials, population=population, seed=seed, say=print)
    rng, drawn = keyed_rng(seed, "random search"), dict[Subnet, None]()
    while len(drawn) < len(found):
        drawn.update(dict.fromkeys(within([space.draw(rng)])))
    whole = [space.uniform(blocks, space.heads[-1], space.ffn[-1]) for blocks in space.blocks]
    chosen = {
        SEARCH: max(found, key=lambda candidate: candidate.score).subnet,
        RANDOM: max(drawn, key=scores.score),
        UNIFORM: max(within(list(space.uniforms())), key=scores.score),
    }
    if kept := [subnet for subnet in whole if budget.without_least().holds(cost(subnet))]:
        chosen[TRUNCATION] = kept[-1]
    return chosen


def probe(manifest: Path, ask: str, most: int) -> TaskEvaluation:
    """Returns the evaluation of phones on the speakers of a split."""
    values = {
        "checkpoint": "subnets", "task": "phones", "manifest": str(manifest), "seeds": 1, "ask": ask,
        "max_utterances": most,
    }  # fmt: skip
    return TaskEvaluation(load(EvaluateConfig, values), "phones", lambda line: None)


def tested(task: TaskEvaluation, found: LoadedCheckpoint, subnet: Subnet) -> Tally:
    """Returns hits and trials by speaker of a subnet's last layer."""
    return tallies(task, subnet_encoder(found, subnet))[0]


def latency_table(run: Path, given: Namespace) -> dict[str, Any]:
    """Returns this machine's latencies of the subnets' architectures, measured once."""
    file = given.work / f"latency_{given.subnets}_{given.runs}.json"
    if not file.exists():
        line = [sys.executable, "-m", "launch.main", "bench", "--table", str(run), "--subnets", str(given.subnets)]
        made = subprocess.run([*line, "--runs", str(given.runs)], cwd=ROOT, check=True, stdout=subprocess.PIPE)
        file.write_bytes(made.stdout)
    table: dict[str, Any] = json.loads(file.read_bytes())
    return table


def trained_alone(subnet: Subnet, space: Space, given: Namespace) -> Path:
    """Returns a run of one subnet that was distilled alone, from the teacher's weights, for the supernet's updates."""
    label = "_".join(f"{heads}x{ffn}" for heads, ffn in subnet)
    first, cut_run, widths = (given.work / f"{kind}_{label}" for kind in ("first", "cut", "widths"))
    widths.write_text(json.dumps(subnet) + "\n", encoding="utf-8")
    source = given.teacher
    if len(subnet) < space.layers:
        cut(source, first, "--blocks", str(len(subnet)))
        source = first
    cut(source, cut_run, "--widths", str(widths))
    overrides = ["+experiment=distil_tiny", "data.batch_seconds=64", f"objective.teacher={given.teacher}"]
    return train(
        f"alone_{label}", given.updates, given.work, given.shards, *overrides, f"init={cut_run}", *widths_of(cut_run)
    )


def rank_correlation(
    space: Space, scored: Callable[[Subnet], float], choosing: TaskEvaluation, given: Namespace
) -> dict[str, Any]:
    """Returns Kendall's τ of subnets' scores with the supernet's weights and of the same, trained alone.

    Args:
        space: all subnets.
        scored: returns the score with the supernet's weights.
        choosing: the probe.
        given: the command line.
    """
    rows = []
    for subnet in measured_subnets(space, given.alone):
        run = trained_alone(subnet, space, given)
        encoder = last_layer(open_encoder(str(run)))
        rows.append((subnet_label(subnet), scored(subnet), accuracy(tallies(choosing, encoder))))
    shared, alone = ([row[column] for row in rows] for column in (1, 2))
    return {"subnets": rows, "tau": float(scipy.stats.kendalltau(shared, alone).statistic)}


def seed_results(seed: int, choosing: TaskEvaluation, asking: TaskEvaluation, given: Namespace) -> dict[str, Any]:
    """Trains a supernet, searches it at each latency and tests what was chosen; returns plain values for JSON."""
    overrides = ["+experiment=supernet_tiny", f"objective.teacher={given.teacher}", f"init={given.teacher}"]
    run = train("supernet", given.updates, given.work, given.shards, *overrides, seed=seed)
    _, found, space = open_supernet(str(run))
    table = latency_table(run, given)
    latency = LatencyModel(table, space)

    def cost(subnet: Subnet) -> SubnetCost:
        return SubnetCost(latency.real_time_factor(subnet), megabytes(found, subnet))

    def score(subnet: Subnet) -> float:
        return subnet_score(choosing, found, subnet)

    scores = Scores(given.work / f"scores_{given.updates}_{seed}_{given.max_utterances}.jsonl", score)
    alone = None
    if given.alone and seed == 0:
        alone = rank_correlation(space, scores.score, choosing, given)
    counted, rows = dict[str, Tally](), []
    for rtf in latencies(space, cost):
        budget = Budget(most_rtf=(1 + EQUAL) * rtf, least_rtf=(1 - EQUAL) * rtf)
        chosen = rivals(space, scores, cost, budget=budget, trials=given.trials, seed=seed)
        ways = {}
        for way, subnet in chosen.items():
            label = subnet_label(subnet)
            if label not in counted:
                counted[label] = tested(asking, found, subnet)
            ways[way] = {"subnet": label, **cost(subnet)._asdict(), "tally": counted[label]}
        rows.append({"rtf": rtf, "ways": ways})
    return {
        "latencies": rows,
        "log_mel": accuracy(tallies(asking, log_mel_with_context())),
        "supernet": accuracy([tested(asking, found, space.largest)]),
        "subnets": space.size,
        "latency_error": latency.error,
        "noisy": table["noisy_subnets"],
        "alone": alone,
    }


def compared(number: int, seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the rows of one latency: accuracy of each way, and how far the search is above it, paired."""
    parts = [seed["latencies"][number] for seed in seeds]

    def tally_of(way: str) -> list[Tally]:
        return [part["ways"][way]["tally"] for part in parts]

    rows = []
    for way in (SEARCH, RANDOM, UNIFORM, TRUNCATION):
        if not all(way in part["ways"] for part in parts):
            continue
        found, gap = [part["ways"][way] for part in parts], bootstrap(tally_of(SEARCH), 2_000, tally_of(way))
        costs = {name: sum(one[name] for one in found) / len(found) for name in ("rtf", "megabytes")}
        row = {"way": way, "subnets": [one["subnet"] for one in found], "accuracy": accuracy(tally_of(way)), **costs}
        rows.append(row | {"search_above": gap.value, "low": gap.low, "high": gap.high})
    return {"rtf": parts[0]["rtf"], "rows": rows}


def passed(latency: dict[str, Any]) -> bool:
    """Returns whether the search is far enough above uniform scaling, and above random search."""
    rows = {row["way"]: row for row in latency["rows"]}
    uniform, random = rows[UNIFORM], rows[RANDOM]
    return bool(uniform["search_above"] >= ABOVE and uniform["low"] > 0 and random["search_above"] > 0)


def main() -> int:
    """Returns exit code 0 where the gate is passed at all latencies."""
    parser = parser_of(__doc__, "search")
    teacher = ROOT / "runs" / "quality_hubert"
    parser.add_argument("--teacher", type=Path, default=teacher, help="a finished run of quality_hubert")
    parser.add_argument("--updates", type=int, default=300, help="of each supernet")
    parser.add_argument("--subnets", type=int, default=16, help="whole subnets that are measured")
    parser.add_argument("--trials", type=int, default=16, help="subnets scored at each latency, by both searches")
    parser.add_argument("--shards", type=Path, help="of the splits pretrain and train; default: made here")
    parser.add_argument("--seeds", type=int, default=3, help="supernets, each with its own searches")
    parser.add_argument("--max-utterances", type=int, default=60, help="per split of the probe that chooses; 0: all")
    parser.add_argument("--test-utterances", type=int, default=150, help="per split of the probe that tests; 0: all")
    parser.add_argument("--runs", type=int, default=10, help="timed runs of each subnet")
    parser.add_argument("--alone", type=int, default=8, help="subnets that are trained alone, with seed 0; 0: none")
    given = parser.parse_args()
    manifest = real_speech()
    if manifest is None:
        return 0
    begun = time.monotonic()
    if given.shards is None:
        given.shards, splits = given.work / "shards", "corpus.splits=[pretrain,train]"
        auricle("preprocess", "corpus=manifest", f"corpus.path={manifest}", splits, f"out={given.shards}")
    choosing = probe(manifest, "valid", given.max_utterances)
    asking = probe(manifest, "test", given.test_utterances)
    names = ("teacher", "updates", "trials", "max_utterances", "test_utterances", "subnets", "runs")
    seeds, good = list[dict[str, Any]](), False
    for seed in range(given.seeds):  # a page after each seed: a run that is stopped leaves the seeds that it finished
        key = {name: str(getattr(given, name)) for name in names} | {"seed": seed}
        rows = jsonl.read(given.work / "found.jsonl").rows
        results = next((row["found"] for row in rows if row["key"] == key), None)
        if results is None:
            results = seed_results(seed, choosing, asking, given)
            jsonl.append_rows(given.work / "found.jsonl", [{"key": key, "found": results}])
        seeds.append(results)
        good = report(seeds, begun, given)
    return 0 if good else 1


def report(seeds: Sequence[dict[str, Any]], begun: float, given: Namespace) -> bool:
    """Writes search.json and search.md; returns whether the gate is passed at all latencies."""
    found = [compared(number, seeds) for number in range(len(SHARES))]
    result = {
        "when": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", "benchmarks/prove/search.py", *sys.argv[1:]]),
        "machine": f"{model_name()}, {os.cpu_count()} cores",
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "seeds": len(seeds),
        "latency_error": seeds[0]["latency_error"],
        "noisy": seeds[0]["noisy"],
        "measure": NON_SILENCE,
        "log_mel": seeds[0]["log_mel"],
        "supernet": sum(seed["supernet"] for seed in seeds) / len(seeds),
        "subnets": seeds[0]["subnets"],
        "latencies": found,
        "alone": seeds[0].get("alone"),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "search.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    write_page(result, given.out / "search.md")
    return all(map(passed, found))


def write_page(result: dict[str, Any], file: Path) -> None:
    """Writes the table and the gate."""
    rows = [
        (
            f"{latency['rtf']:.5f}", row["way"], "; ".join(row["subnets"]), f"{row['rtf']:.5f}",
            f"{row['megabytes']:.1f}", f"{100 * row['accuracy']:.1f}",
            f"{100 * row['search_above']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})",
        )
        for latency in result["latencies"]
        for row in latency["rows"]
    ]  # fmt: skip
    good = [passed(latency) for latency in result["latencies"]]
    error, scored = 100 * result["latency_error"], 100 * ABOVE
    header = ("RTF, ± 3 %", "way", "heads × inner channels", "RTF", "MB", "phones", "search above")
    noisy = f"; noisy: {result['noisy']}." if result["noisy"] else "."
    lines = [
        "# Architecture search against uniform scaling and random search", "",
        f"{result['when']}, {result['machine']}, {result['seeds']} seeds, {result['minutes']} minutes: "
        f"`{result['command']}`", "",
        *markdown_table(header, rows), "",
        f"Phones: {result['measure']} of test speakers, with the supernet's weights. Log-mel "
        f"{100 * result['log_mel']:.1f}, the whole supernet {100 * result['supernet']:.1f}. "
        f"{result['subnets']} subnets.",
        f"Mean error of the predicted latency on subnets left out of the fit: {error:.1f} % "
        f"(bar: 5 %){noisy}", "",
        f"Gate, at each latency {scored:g} points above uniform scaling (interval above 0) and above random search: "
        f"passed at {sum(good)} of {len(good)}.", "",
    ]  # fmt: skip
    if alone := result["alone"]:
        header = ("heads × inner channels", "with the supernet's weights", "trained alone")
        cells = [(label, f"{100 * shared:.1f}", f"{100 * own:.1f}") for label, shared, own in alone["subnets"]]
        lines += [
            f"Phones of validation speakers, seed 0, of {len(cells)} subnets, also distilled alone from the teacher's "
            f"weights for as many updates: Kendall's τ {alone['tau']:.2f} (bar: {TAU:g}).", "",
            *markdown_table(header, cells), "",
        ]  # fmt: skip
    file.write_text("\n".join(lines), encoding="utf-8")
    print(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
