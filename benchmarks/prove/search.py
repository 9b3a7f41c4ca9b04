"""Measures what an architecture search finds beyond uniform scaling, random search and truncation.

    python benchmarks/prove/search.py --teacher runs/T             # ≤ 25 minutes on two cores
    python benchmarks/prove/search.py --teacher runs/T --minutes 0.1 --subnets 8 --trials 6 --max-utterances 20

Speech: manifest.tsv of the folder that AURICLE_SPEECH names; the teacher is a run of quality_hubert, and the supernet
is distilled from it on the splits pretrain and train. At three latencies, from this machine's table: the best subnet
on validation speakers of NSGA-II, of as many random draws, of uniform scaling, and plain truncation. All share the
supernet's weights and are compared on test speakers, paired. Writes benchmarks/results/search.json and .md. Exit code 1
unless at each latency the search is 0.5 points above uniform scaling (interval above 0) and above random search.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.prove.common import auricle, markdown_table, parser_of, real_speech  # noqa: E402
from benchmarks.prove.compress import MEASURE, tallies, train  # noqa: E402
from data_pipeline.core.rng import keyed_rng  # noqa: E402
from data_pipeline.core.schema import load  # noqa: E402
from launch.workflows.searching_architecture import open_supernet, subnet_score  # noqa: E402
from pretrain.checkpointing.weights import LoadedCheckpoint  # noqa: E402
from pretrain.compression.architecture_search import Budget, Scores, SubnetCost, search_subnets, subnet_label  # noqa: E402
from pretrain.compression.cut import cut_subnet  # noqa: E402
from pretrain.compression.latency import LatencyModel, megabytes  # noqa: E402
from pretrain.evaluate.config import EvaluateConfig  # noqa: E402
from pretrain.evaluate.frozen_encoders import freeze, log_mel_with_context  # noqa: E402
from pretrain.evaluate.metrics import Tally, accuracy, bootstrap  # noqa: E402
from pretrain.evaluate.task_evaluation import TaskEvaluation  # noqa: E402
from pretrain.interfaces.subnets import Space, Subnet  # noqa: E402
from pretrain.profiling.processor import model_name  # noqa: E402

SHARES = (0.55, 0.7, 0.85)
"""Latencies, as shares of the supernet's."""
TOLERANCE, ABOVE = 0.03, 0.005


def rivals(
    space: Space, scores: Scores, cost: Callable[[Subnet], SubnetCost], budget: Budget, trials: int
) -> dict[str, Subnet]:
    """Returns the best subnet within the budget of each way to choose one."""
    known = scores.known()

    def scored(subnet: Subnet) -> float:
        if subnet not in known:
            known[subnet] = scores.compute(subnet)
        return known[subnet]

    def within(subnets: Sequence[Subnet]) -> list[Subnet]:
        return [subnet for subnet in subnets if budget.holds(cost(subnet))]

    found = search_subnets(space, scores, cost, budget, trials, population=max(4, trials // 6), say=print)
    known |= scores.known()
    rng, drawn = keyed_rng(0, "random search"), dict[Subnet, None]()
    while len(drawn) < len(found):
        drawn.update(dict.fromkeys(within([space.draw(rng)])))
    whole = [space.uniform(blocks, space.heads[-1], space.ffn[-1]) for blocks in space.blocks]
    chosen = {
        "search": max(found, key=lambda candidate: candidate.score).subnet,
        "random search": max(drawn, key=scored),
        "uniform scaling": max(within(list(space.uniforms())), key=scored),
    }
    if kept := within(whole):
        chosen["truncation"] = kept[-1]
    return chosen


def probe(manifest: Path, ask: str, seeds: int, most: int) -> TaskEvaluation:
    """Returns the evaluation of phones on the speakers of a split."""
    values = {
        "checkpoint": "subnets", "task": "phones", "manifest": str(manifest), "seeds": seeds, "ask": ask,
        "max_utterances": most,
    }  # fmt: skip
    return TaskEvaluation(load(EvaluateConfig, values), "phones", lambda line: None)


def tested(task: TaskEvaluation, found: LoadedCheckpoint, subnet: Subnet) -> list[Tally]:
    """Returns hits and trials by speaker of a subnet, for each seed."""
    return tallies(task, freeze(cut_subnet(found, subnet).module.model, subnet_label(subnet)))


def compared(
    chosen: dict[str, Subnet], test: Callable[[Subnet], list[Tally]], cost: Callable[[Subnet], SubnetCost], rtf: float
) -> dict[str, Any]:
    """Returns the rows of one latency: accuracy of each way, and how far the search is above it, paired."""
    mine, rows = test(chosen["search"]), []
    for name, subnet in chosen.items():
        other = test(subnet)
        gap = bootstrap(mine, 2_000, other)
        row = {"way": name, "subnet": subnet_label(subnet), "accuracy": accuracy(other), **cost(subnet)._asdict()}
        rows.append(row | {"search_above": gap.value, "low": gap.low, "high": gap.high})
    return {"rtf": rtf, "rows": rows}


def passed(latency: dict[str, Any]) -> bool:
    """Returns whether the search is far enough above uniform scaling, and above random search."""
    rows = {row["way"]: row for row in latency["rows"]}
    uniform, random = rows["uniform scaling"], rows["random search"]
    return uniform["search_above"] >= ABOVE and uniform["low"] > 0 and random["search_above"] > 0


def main() -> int:
    """Returns exit code 0 where the gate is passed at all latencies."""
    parser = parser_of(__doc__, "search")
    teacher = ROOT / "runs" / "quality_hubert"
    parser.add_argument("--teacher", type=Path, default=teacher, help="a finished run of quality_hubert")
    parser.add_argument("--minutes", type=float, default=8.0, help="of the supernet's training")
    parser.add_argument("--subnets", type=int, default=40, help="whole subnets that are measured")
    parser.add_argument("--trials", type=int, default=30, help="subnets scored at each latency, by both searches")
    parser.add_argument("--shards", type=Path, help="of the splits pretrain and train; default: made here")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-utterances", type=int, default=0, help="per split of the probes; 0: all")
    parser.add_argument("--runs", type=int, default=10, help="timed runs of each subnet")
    given = parser.parse_args()
    manifest = real_speech()
    if manifest is None:
        return 0
    begun, shards = time.monotonic(), given.shards or given.work / "shards"
    if given.shards is None:
        splits = "corpus.splits=[pretrain,train]"
        auricle("preprocess", "corpus=manifest", f"corpus.path={manifest}", splits, f"out={shards}")
    overrides = ["+experiment=supernet_tiny", f"objective.teacher={given.teacher}", f"init={given.teacher}"]
    run = train("supernet", given.minutes, given.work, shards, *overrides)
    _, found, space = open_supernet(str(run))
    line = [sys.executable, "-m", "launch.main", "bench", "--table", str(run), "--subnets", str(given.subnets)]
    made = subprocess.run([*line, "--runs", str(given.runs)], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    table = json.loads(made.stdout)
    latency = LatencyModel(table, space)

    def cost(subnet: Subnet) -> SubnetCost:
        return SubnetCost(latency.real_time_factor(subnet), megabytes(found, subnet))

    choosing, asking = (
        probe(manifest, ask, n, given.max_utterances) for ask, n in (("valid", 1), ("test", given.seeds))
    )
    scores = Scores(given.work / "scores.jsonl", lambda subnet: subnet_score(choosing, found, subnet))
    results = []
    for share in SHARES:
        rtf = share * cost(space.largest).rtf
        chosen = rivals(space, scores, cost, Budget((1 + TOLERANCE) * rtf), given.trials)
        results.append(compared(chosen, lambda subnet: tested(asking, found, subnet), cost, rtf))
    result = {
        "when": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", "benchmarks/prove/search.py", *sys.argv[1:]]),
        "machine": f"{model_name()}, {os.cpu_count()} cores",
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "latency_error": latency.error,
        "noisy": table["noisy_subnets"],
        "measure": MEASURE,
        "log_mel": accuracy(tallies(asking, log_mel_with_context())),
        "supernet": accuracy(tested(asking, found, space.largest)),
        "subnets": space.size,
        "latencies": results,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "search.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    write_page(result, given.out / "search.md")
    return 0 if all(map(passed, results)) else 1


def write_page(result: dict[str, Any], file: Path) -> None:
    """Writes the table and the gate."""
    rows = [
        (
            f"{latency['rtf']:.5f}", row["way"], row["subnet"], f"{row['rtf']:.5f}", f"{row['megabytes']:.1f}",
            f"{100 * row['accuracy']:.1f}",
            f"{100 * row['search_above']:+.1f} ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})",
        )
        for latency in result["latencies"]
        for row in latency["rows"]
    ]  # fmt: skip
    good = [passed(latency) for latency in result["latencies"]]
    error, scored = 100 * result["latency_error"], 100 * ABOVE
    header = ("RTF at most", "way", "heads × inner channels", "RTF", "MB", "phones", "search above")
    noisy = f"; noisy: {result['noisy']}." if result["noisy"] else "."
    lines = [
        "# Architecture search against uniform scaling and random search", "",
        f"{result['when']}, {result['machine']}, {result['minutes']} minutes: `{result['command']}`", "",
        *markdown_table(header, rows), "",
        f"Phones: {result['measure']} of test speakers, with the supernet's weights. Log-mel "
        f"{100 * result['log_mel']:.1f}, the whole supernet {100 * result['supernet']:.1f}. "
        f"{result['subnets']} subnets.",
        f"Mean error of the predicted latency on subnets left out of the fit: {error:.1f} % "
        f"(bar: 5 %){noisy}", "",
        f"Gate, at each latency {scored:g} points above uniform scaling (interval above 0) and above random search: "
        f"passed at {sum(good)} of {len(good)}.", "",
    ]  # fmt: skip
    file.write_text("\n".join(lines), encoding="utf-8")
    print(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
