"""Measures what pretraining gains on an unseen corpus, and from how many hours of distinct speech.

    python benchmarks/prove/out_of_domain.py                              # leave-one-corpus-out, in both directions
    python benchmarks/prove/out_of_domain.py --hours 0.3 0.6 1.2          # equal updates on so much distinct speech

Speech: manifest.tsv of the folder that AURICLE_SPEECH names, splits pretrain and train, without labels. First line:
pretraining without speechocean762, phones of speechocean762 (unseen corpus, microphone and accent). Second line:
pretraining on speechocean762 alone, words of the other corpora, judged over random weights only: pooled random features
beat pooled log-mel by far. Writes benchmarks/results/out_of_domain.json. Exit code 1 where a line is below +5 points
over random weights, or the first below +3 over log-mel with context.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.prove.common import auricle, parser_of, real_speech  # noqa: E402
from benchmarks.prove.quality import MEASURE, OVER_LOG_MEL, OVER_RANDOM, pick, pretrain  # noqa: E402
from data_pipeline.core.rng import keyed_seed  # noqa: E402
from data_pipeline.corpora.tables import read_table  # noqa: E402
from pretrain.evaluate.config import EvaluateConfig, NeuralConfig, SupervisedConfig  # noqa: E402
from pretrain.evaluate.evaluator import evaluate  # noqa: E402
from pretrain.evaluate.rows import ResultRow, plain  # noqa: E402
from pretrain.profiling.processor import model_name  # noqa: E402

LEFT_OUT = "speechocean762"
WORDS = ("keywords", "digits")
COLUMNS = ("path", "speaker", "language", "corpus", "split", "duration_s")


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


def trained(experiment: str, manifest: Path, listed: Path, work: Path, minutes: float) -> Path:
    """Makes shards and units of a manifest and trains for about `minutes`; returns the run folder."""
    shards = work / "shards"
    auricle(
        "preprocess", "corpus=manifest", f"corpus.path={listed}", f"corpus.root={manifest.parent}", f"out={shards}",
        f"runs={work / 'runs'}",
    )  # fmt: skip
    auricle("targets", f"shards={shards}", f"out={work / 'mfcc'}", "rounds=8", f"runs={work / 'runs'}")
    return pretrain(experiment, shards, work / "runs", minutes)


def measured(run: Path, manifest: Path, task: str, given: argparse.Namespace) -> list[ResultRow]:
    """Returns the rows of a task, without the baselines that are trained on labels."""
    config = EvaluateConfig(
        checkpoint=str(run), task=task, manifest=str(manifest), seeds=given.seeds, max_utterances=given.max_utterances,
        ask=given.ask, supervised=SupervisedConfig(epochs=0), neural=NeuralConfig(epochs=0),
    )  # fmt: skip
    return evaluate(config)


def passed(rows: Sequence[ResultRow], log_mel: bool) -> bool:
    """Returns whether the checkpoint, the last row, gains enough."""
    last = rows[-1]
    assert last.over_random is not None
    assert last.over_log_mel is not None
    return last.over_random[0] >= OVER_RANDOM and (not log_mel or last.over_log_mel[0] >= OVER_LOG_MEL)


def main() -> int:
    """Returns exit code 0 where every line passes."""
    parser = parser_of(__doc__, "out_of_domain")
    parser.add_argument("--experiment", default="quality_hubert")
    parser.add_argument("--minutes", type=float, default=6.0, help="of each pretraining")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-utterances", type=int, default=0, help="per split of a probe; 0: all")
    parser.add_argument("--ask", choices=["valid", "test"], default="test", help="valid while settings are chosen")
    parser.add_argument(
        "--hours", type=float, nargs="*", default=[], help="instead: phones after these hours of distinct speech"
    )
    given = parser.parse_args()
    manifest = real_speech()
    if manifest is None:
        return 0
    begun, lines = time.monotonic(), list[dict[str, Any]]()
    other: Callable[[str], bool] = lambda corpus: corpus != LEFT_OUT  # noqa: E731
    plans = [(f"{hours:g} hours", other, hours, ("phones",)) for hours in given.hours] or [
        (f"without {LEFT_OUT}", other, 0.0, ("phones",)),
        (f"{LEFT_OUT} alone", lambda corpus: corpus == LEFT_OUT, 0.0, WORDS),
    ]
    for name, keep, hours, tasks in plans:
        work = given.work / name.replace(" ", "_")
        listed, heard = selected(manifest, work, keep, hours)
        run = trained(given.experiment, manifest, listed, work, given.minutes)
        for task in tasks:
            rows = measured(run, manifest, task, given)
            of = pick(rows, MEASURE) if task == "phones" else rows
            lines.append(
                {"pretraining": name, "distinct_hours": round(heard, 3), "task": task, "rows": plain(of)}
                | {"passed": passed(of, task == "phones")}
            )
    result = {
        "when": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", "benchmarks/prove/out_of_domain.py", *sys.argv[1:]]),
        "machine": f"{model_name()}, {os.cpu_count()} cores",
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "lines": lines,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "out_of_domain.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for line in lines:
        last = line["rows"][-1]
        gains = [f"{100 * last[name][0]:+.1f}" for name in ("over_random", "over_log_mel")]
        said = f"{last['value']:.1%}, {gains[0]} over random weights, {gains[1]} over log-mel"
        print(f"{line['pretraining']} ({line['distinct_hours']} h), {line['task']}: {said}")
    return 0 if all(line["passed"] for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
