"""Measures what pretraining gains on an unseen corpus, and from how many hours of distinct speech.

    python benchmarks/prove/out_of_domain.py                                # leave-one-corpus-out, in both directions
    python benchmarks/prove/out_of_domain.py --hours 0.27 0.54 --curve-updates 200 600           # and the curve

Speech: manifest.tsv of the folder that AURICLE_SPEECH names, splits pretrain and train, without labels. First line:
pretraining without speechocean762, phones of speechocean762 (unseen corpus, microphone and accent). Second line:
pretraining on speechocean762 alone, words of the other corpora, judged over random weights only: pooled random features
beat pooled log-mel by far. The curve: as the first line, on part of the speech, each part for several numbers of
updates. Finished trainings in the folder of `--work` are used again. Writes benchmarks/results/out_of_domain.json and
.md after each training. Exit code 1 where a line is below +5 points over random weights, or the first below +3 over
log-mel with context.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.prove.common import auricle, markdown_table, parser_of, real_speech  # noqa: E402
from data_pipeline.core.rng import keyed_seed  # noqa: E402
from data_pipeline.corpora.tables import read_table  # noqa: E402
from pretrain.checkpointing.locate import steps_done  # noqa: E402
from pretrain.evaluate.config import EvaluateConfig  # noqa: E402
from pretrain.evaluate.evaluator import few_threads  # noqa: E402
from pretrain.evaluate.frozen_encoders import FrozenEncoder, log_mel_with_context, open_encoder  # noqa: E402
from pretrain.evaluate.metrics import NON_SILENCE, Tally, bootstrap  # noqa: E402
from pretrain.evaluate.task_evaluation import TaskEvaluation  # noqa: E402
from pretrain.profiling.processor import model_name  # noqa: E402

LEFT_OUT = "speechocean762"
OVER_RANDOM, OVER_LOG_MEL = 0.05, 0.03
WORDS = ("keywords", "digits")
COLUMNS = ("path", "speaker", "language", "corpus", "split", "duration_s")
BOOTSTRAP = 2_000


@dataclass(frozen=True)
class Plan:
    """One pretraining.  hours: of distinct speech, 0: all.  tasks: what it is judged by."""

    name: str
    keep: Callable[[str], bool]
    hours: float
    updates: int
    tasks: tuple[str, ...]


def others(corpus: str) -> bool:
    """Returns whether a corpus is not the one left out."""
    return corpus != LEFT_OUT


def plans(given: argparse.Namespace) -> list[Plan]:
    """Returns both lines, then the points of the curve; the first line is its last point."""
    lines = [
        Plan(f"without {LEFT_OUT}", others, 0.0, given.updates, ("phones",)),
        Plan(f"{LEFT_OUT} alone", lambda corpus: not others(corpus), 0.0, given.updates, WORDS),
    ]
    curve = [
        Plan(f"without {LEFT_OUT}", others, hours, updates, ("phones",))
        for hours in (*given.hours, 0.0)
        for updates in given.curve_updates
        if (hours, updates) != (0.0, given.updates)
    ]
    return [*lines, *curve]


def selected(manifest: Path, folder: Path, keep: Callable[[str], bool], hours: float = 0.0) -> tuple[Path, float]:
    """Writes a manifest of the kept corpora's splits pretrain and train, of `hours` hours; returns it and its hours.

    Recordings are taken in an order that depends on their paths alone, so that fewer hours are a part of more.
    """
    rows = [row.values for row in read_table(str(manifest), "manifest") if not row.problem]
    rows = [row for row in rows if row.get("split") in ("pretrain", "train") and keep(row["corpus"])]
    rows.sort(key=lambda row: keyed_seed("distinct", row["path"]))
    taken, seconds = [], 0.0
    for row in rows:
        if hours and seconds >= 3600 * hours:
            break
        taken.append(row)
        seconds += float(row.get("duration_s") or 0.0)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "manifest.tsv"
    lines = ["\t".join(COLUMNS), *("\t".join(str(row.get(name, "")) for name in COLUMNS) for row in taken)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file, seconds / 3600


def prepared(plan: Plan, manifest: Path, work: Path) -> tuple[Path, float]:
    """Makes shards and units of a plan's speech unless they are there; returns their folder and the hours."""
    folder = work / f"{plan.name} {plan.hours or 'all'}".replace(" ", "_")
    listed, hours = selected(manifest, folder, plan.keep, plan.hours)
    shards, units, runs = folder / "shards", folder / "mfcc", f"runs={folder / 'runs'}"
    if not (units / "checksums.json").exists():
        corpus = ["corpus=manifest", f"corpus.path={listed}", f"corpus.root={manifest.parent}"]
        auricle("preprocess", *corpus, f"out={shards}", runs)
        auricle("targets", f"shards={shards}", f"out={units}", "rounds=8", runs)
    return folder, hours


def trained(experiment: str, folder: Path, updates: int, processes: int) -> Path:
    """Pretrains for a number of updates, one thread for each process; a finished run stays. Returns the run folder."""
    name = f"{experiment}_{updates}"
    run = folder / "runs" / name
    if steps_done(run) < updates:
        auricle(
            "pretrain", f"+experiment={experiment}", f"data.shards={folder / 'shards'}", f"runs={folder / 'runs'}",
            f"data.targets={{mfcc: {folder / 'mfcc'}}}", f"name={name}", f"train.steps={updates}",
            f"train.checkpoint_every={updates}", "train.media_every=0", "health.on_collapse=warn",
            f"launcher.processes={processes}", "launcher.threads=1",
        )  # fmt: skip
    return run


class Judge:
    """A task with its two baselines, which all runs of one architecture share."""

    def __init__(self, name: str, manifest: Path, given: argparse.Namespace) -> None:
        config = EvaluateConfig(
            checkpoint="none", task=name, manifest=str(manifest), seeds=given.seeds, ask=given.ask,
            max_utterances=given.max_utterances,
        )  # fmt: skip
        self.task = TaskEvaluation(config, name, partial(print, flush=True))
        self.name, self.baselines = name, dict[str, list[Tally]]()

    def tallies(self, make: Callable[[int], FrozenEncoder], same: bool) -> list[Tally]:
        """Returns hits and trials by speaker of each seed."""
        found = self.task.scores(make, same)
        return found[NON_SILENCE] if NON_SILENCE in found else next(iter(found.values()))

    def row(self, encoder: FrozenEncoder) -> dict[str, Any]:
        """Returns an encoder's accuracy and its differences to both baselines, with intervals over speakers."""
        if not self.baselines:
            log_mel = log_mel_with_context()
            self.baselines["log_mel"] = self.tallies(lambda seed: log_mel, same=True)
            self.baselines["random"] = self.tallies(partial(self.task.random, encoder), same=False)
        ours = self.tallies(lambda seed: encoder, same=True)
        row: dict[str, Any] = {"task": self.name, "value": bootstrap(ours, BOOTSTRAP).value}
        for name, theirs in self.baselines.items():
            gap = bootstrap(ours, BOOTSTRAP, theirs)
            row[name] = bootstrap(theirs, BOOTSTRAP).value
            row[f"over_{name}"] = [gap.value, gap.low, gap.high]
        return row


def passed(row: dict[str, Any]) -> bool:
    """Returns whether a row gains enough; words need no gain over log-mel."""
    return row["over_random"][0] >= OVER_RANDOM and (row["task"] in WORDS or row["over_log_mel"][0] >= OVER_LOG_MEL)


def points(gap: list[float]) -> str:
    """Returns a difference with its interval, in points."""
    value, low, high = (100 * one for one in gap)
    return f"{value:+.1f} ({low:+.1f} … {high:+.1f})"


def write(result: dict[str, Any], out: Path) -> None:
    """Writes out_of_domain.json and .md."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "out_of_domain.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    header = ["pretraining", "distinct speech", "updates", "task", "accuracy", "over random weights", "over log-mel"]
    cells = [
        [
            row["pretraining"], f"{row['distinct_hours']:.2f} h", str(row["updates"]), row["task"],
            f"{row['value']:.1%}", points(row["over_random"]), points(row["over_log_mel"]),
        ]
        for row in result["rows"]
    ]  # fmt: skip
    text = [
        "# Out of domain: pretraining that never saw the corpus, and hours of distinct speech", "",
        f"`{result['command']}`: {result['machine']}, {result['when']}. {result['experiment']}, {result['seeds']} "
        "seeds of random weights, one pretraining for each row.",
        "", *markdown_table(header, cells), "",
        f"Phones: {NON_SILENCE} of speechocean762, unseen speakers; labels by the alignment of the folder of speech,",
        "which may be automatic. Intervals: paired bootstrap over test speakers.",
        f"The gate, for the first two lines: {100 * OVER_RANDOM:+g} points over random weights, and for phones "
        f"{100 * OVER_LOG_MEL:+g} over log-mel",
        "with context. Words are judged over random weights only.", "",
    ]  # fmt: skip
    (out / "out_of_domain.md").write_text("\n".join(text), encoding="utf-8")


def main() -> int:
    """Returns exit code 0 where both lines pass."""
    parser = parser_of(__doc__, "out_of_domain")
    parser.add_argument("--experiment", default="quality_hubert")
    parser.add_argument("--updates", type=int, default=600, help="of the two lines")
    parser.add_argument("--processes", type=int, default=2, help="of a training")
    parser.add_argument("--seeds", type=int, default=3, help="of random weights")
    parser.add_argument("--max-utterances", type=int, default=0, help="per split of a probe; 0: all")
    parser.add_argument("--ask", choices=["valid", "test"], default="test", help="valid while settings are chosen")
    parser.add_argument("--hours", type=float, nargs="*", default=[], help="of distinct speech: points of the curve")
    parser.add_argument("--curve-updates", type=int, nargs="*", default=[], help="updates of each point of the curve")
    given = parser.parse_args()
    manifest = real_speech()
    if manifest is None:
        return 0
    result: dict[str, Any] = {
        "when": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", "benchmarks/prove/out_of_domain.py", *sys.argv[1:]]),
        "machine": f"{model_name()}, {os.cpu_count()} cores",
        "experiment": given.experiment,
        "seeds": given.seeds,
        "rows": [],
    }
    judges = {name: Judge(name, manifest, given) for name in ("phones", *WORDS)}
    for plan in plans(given):
        folder, hours = prepared(plan, manifest, given.work)
        run = trained(given.experiment, folder, plan.updates, given.processes)
        for name in plan.tasks:
            with few_threads(given.processes):
                row = judges[name].row(open_encoder(str(run)))
            named = {"pretraining": plan.name, "distinct_hours": round(hours, 3), "updates": plan.updates}
            result["rows"].append({**named, **row, "passed": passed(row)})
            print(plan.name, f"{hours:.2f} h, {plan.updates} updates, {name}: {row['value']:.1%}", flush=True)
        write(result, given.out)
    lines = [row for row in result["rows"] if row["updates"] == given.updates and not short(row, result["rows"])]
    return 0 if all(row["passed"] for row in lines) else 1


def short(row: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Returns whether a row is a point of the curve with less speech than another row of the same pretraining."""
    return any(
        row["pretraining"] == one["pretraining"] and row["distinct_hours"] < one["distinct_hours"] for one in rows
    )


if __name__ == "__main__":
    sys.exit(main())
