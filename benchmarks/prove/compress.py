"""Measures what small models keep of a teacher, and how much faster they are.

    python benchmarks/prove/compress.py --teacher runs/T      # three seeds, about 50 minutes on two cores
    python benchmarks/prove/compress.py --teacher runs/T --updates 20 --seeds 1 --max-utterances 20 --runs 3

Speech: manifest.tsv of the folder that AURICLE_SPEECH names; students read its splits pretrain and train, and so does
the teacher, a run of quality_hubert, which is trained first where none is given. Rows: the teacher, also after each
block; a student of one block distilled from layer 2; one block trained on the units of layer 2 (DiceHuBERT), whole and
with fewer heads and channels, and its front end alone; the same smaller blocks of the teacher without training; the
teacher after as many more updates on its own labels, truncated; two pruned blocks; each in fp32 and INT8. Columns:
phone accuracy on non-silence frames of unseen speakers, the share of the gain over log-mel of the teacher's best layer
that is kept, speed from audio to features in onnxruntime on one thread, by processor time, measured in turn, against
the teacher in fp32; MB. The page names the teacher's time in torch in fp32 and bf16, too.
Every seed trains all students again. The page is written after each seed; the same command continues. Writes
benchmarks/results/compress.json and .md. Exit code 1 unless one row keeps 95 % of the gain at 3 times the speed and a
learned row is above plain truncation at equal latency (paired interval above 0).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.prove.common import auricle, markdown_table, parser_of, real_speech  # noqa: E402
from benchmarks.prove.compress_students import (  # noqa: E402
    BLOCKS,
    NARROW,
    Model,
    Updates,
    exported,
    longer_teacher,
    narrowed,
    parts_of,
    students,
    train,
)
from data_pipeline.core import jsonl  # noqa: E402
from data_pipeline.core.schema import load  # noqa: E402
from launch.cli.compose import compose  # noqa: E402
from launch.config import PretrainJob  # noqa: E402
from launch.runs.metadata import run_config  # noqa: E402
from pretrain.checkpointing.initial import write_initial  # noqa: E402
from pretrain.evaluate.config import EvaluateConfig  # noqa: E402
from pretrain.evaluate.frozen_encoders import FrozenEncoder, log_mel_with_context, open_encoder  # noqa: E402
from pretrain.evaluate.graph_encoder import open_graph_encoder  # noqa: E402
from pretrain.evaluate.metrics import NON_SILENCE, Interval95, Tally, accuracy, bootstrap  # noqa: E402
from pretrain.evaluate.task_evaluation import TaskEvaluation  # noqa: E402
from pretrain.profiling.graph_timing import measure_graphs  # noqa: E402
from pretrain.profiling.processor import model_name  # noqa: E402
from pretrain.train_module import build_model  # noqa: E402

KEPT, FASTER, GOAL = 0.95, 3.0, 4.0
EQUAL = 0.03
"""Share by which latencies that count as equal may differ."""
TEACHER, TRUNCATED, LOG_MEL = "teacher", "teacher after block", "log-mel with context"


@dataclass
class Figures:
    """One row of the table.  speed, wall_speed: over the teacher in fp32, by processor time and by the clock."""

    name: str
    learned: bool
    accuracy: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    kept: float = float("nan")
    speed: float = float("nan")
    wall_speed: float = float("nan")
    megabytes: float = float("nan")
    note: str = ""


@dataclass
class Found:
    """What seeds gave.  tallies, timings: by row, one for each seed; rows without training have one tally.

    timings: speed, wall_speed, megabytes.  learned: rows of trained students.
    """

    tallies: dict[str, list[Tally]]
    timings: dict[str, list[dict[str, float]]]
    notes: dict[str, str]
    learned: set[str]
    noisy: str = ""

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds the results of a seed."""
        for name, tally in row["tallies"].items():
            if name in row["learned"] or name not in self.tallies:
                self.tallies.setdefault(name, []).append({speaker: tuple(two) for speaker, two in tally.items()})
        for name, timing in row["timings"].items():
            self.timings.setdefault(name, []).append(timing)
        self.notes |= row["notes"]
        self.learned |= set(row["learned"])
        self.noisy = self.noisy or row["noisy"]


def tallies(task: TaskEvaluation, encoder: FrozenEncoder) -> list[Tally]:
    """Returns hits and trials by speaker."""
    return task.scores(lambda seed: encoder, same=True)[NON_SILENCE]


def finished(given: Namespace, key: dict[str, Any]) -> dict[str, Any] | None:
    """Returns what an earlier call with the same settings found, from the work folder."""
    rows = jsonl.read(given.work / "found.jsonl").rows
    return next((row["found"] for row in rows if row["key"] == key), None)


def settings(given: Namespace) -> dict[str, Any]:
    """Returns what results of an earlier call must have in common with this one."""
    return {
        "teacher": str(given.teacher), "updates": given.updates, "ask": given.ask,
        "max_utterances": given.max_utterances,
    }  # fmt: skip


def seed_results(seed: int, task: TaskEvaluation, given: Namespace) -> dict[str, Any]:
    """Trains, exports, evaluates and times the students of a seed; with the first one, also what is not trained."""
    models = [Model(TEACHER, given.teacher)]
    models += [Model(f"teacher after block {n}", given.teacher, n) for n in range(BLOCKS)]
    updates = Updates.scaled(given.updates)
    if seed == 0:
        _, truncated, _ = parts_of(given.teacher, given.work, given.shards)
        models += [Model(f"teacher's {name} block", narrowed(truncated, name, given.work)) for name in NARROW]
        models += longer_teacher(given.teacher, updates.units, given.work, given.shards)
    learned, notes = students(given.teacher, updates, given.work, given.shards, seed)
    made = exported([*models, *learned], given.work / "exported", given.shards)
    names = [row for model in learned for row in (f"{model.name}, fp32", f"{model.name}, INT8") if row in made.folders]
    wanted = [name for name in made.folders if seed == 0 or name in names]
    counted = {name: tallies(task, open_graph_encoder(made.folders[name], name))[0] for name in wanted}
    if seed == 0:
        counted[LOG_MEL] = tallies(task, log_mel_with_context())[0]
    timings = measure_graphs(list(made.folders.values()), 10.0, given.runs, 1)
    by_row = dict(zip(made.folders, timings.graphs, strict=True))
    whole = by_row[f"{TEACHER}, fp32"]
    speeds = {
        name: {
            "speed": whole.cpu_rtf / timing.cpu_rtf,
            "wall_speed": whole.rtf_p50 / timing.rtf_p50,
            "megabytes": timing.file_mb,
            "rtf": timing.cpu_rtf,
        }
        for name, timing in by_row.items()
    }
    notes |= made.notes
    return {"tallies": counted, "timings": speeds, "notes": notes, "learned": names, "noisy": timings.noisy}


def torch_seconds(teacher: Path, seconds: float, runs: int) -> dict[str, float]:
    """Returns the teacher's processor time in torch per second of audio, one thread, fp32 and bf16 in turn, medians."""
    torch.set_num_threads(1)
    encoder, wave_T = open_encoder(str(teacher)), 0.1 * torch.randn(int(seconds * 16_000))
    found: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for _ in range(runs + 1):
        for name, on in (("fp32", False), ("bf16", True)):
            begun = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                encoder.encode(wave_T)
            found[name].append((time.process_time() - begun) / seconds)
    return {name: statistics.median(values[1:]) for name, values in found.items()}


def base_width(work: Path, shards: Path, runs: int) -> dict[str, Any]:
    """Returns speed and error of INT8 at BASE width, with random weights: 4 blocks × 768 behind log-mel at 50 Hz."""
    run = work / "base_width"
    if not run.exists():
        values = compose("pretrain", [f"data.shards={shards}", "objective=hubert", "frontend=log_mel",
            "frontend.subsampling=2", "encoder=transformer_rope", "encoder.layers=4"])  # fmt: skip
        config = run_config(load(PretrainJob, values))
        write_initial(run, build_model(config), config)
    folders = []
    for kind, options in (("fp32", []), ("int8", ["--int8", "dynamic", "--shards", str(shards)])):
        folders.append(work / f"base_width_{kind}")
        if not folders[-1].exists():
            checkpoint = run / "checkpoints" / "step_00000000"
            auricle("export", str(checkpoint), str(folders[-1]), "--to", "onnx", *options)
    timings = measure_graphs(folders, 10.0, runs, 1)
    exact, small = timings.graphs
    int8 = json.loads((folders[1] / "features.json").read_text(encoding="utf-8"))["int8"]
    return {
        "speed": exact.rtf_p50 / small.rtf_p50,
        "cpu_speed": exact.cpu_rtf / small.cpu_rtf,
        "relative_error": int8["relative_error"],
        "frames_that_change_cluster": int8["frames_that_change_cluster"],
        "torch_seconds_over_onnx_fp32": {
            name: spent / exact.cpu_rtf for name, spent in torch_seconds(run, 10.0, runs).items()
        },
        "megabytes": [exact.file_mb, small.file_mb],
        "peak_above_bare_mb": [graph.peak_rss_mb - graph.bare_rss_mb for graph in timings.graphs],
        "noisy": timings.noisy,
    }


def main() -> int:
    """Returns exit code 0 where both gates are passed."""
    parser = parser_of(__doc__, "compress")
    parser.add_argument("--teacher", type=Path, help="a finished run of quality_hubert; default: train one")
    parser.add_argument("--teacher-updates", type=int, default=1_000, help="of a teacher that is trained here")
    parser.add_argument("--updates", type=int, default=1_200, help="of the student of units; others have fewer")
    parser.add_argument("--shards", type=Path, help="of the splits pretrain and train; default: made here")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-utterances", type=int, default=150, help="per split of the probe; 0: all")
    parser.add_argument("--runs", type=int, default=30, help="timed runs of each graph")
    parser.add_argument("--base-only", action="store_true", help="only INT8 at BASE width, with random weights")
    parser.add_argument("--ask", choices=("test", "valid"), default="test")
    given = parser.parse_args()
    manifest = real_speech()
    if manifest is None:
        return 0
    begun = time.monotonic()
    if given.shards is None:
        given.shards = given.work / "shards"
        splits = "corpus.splits=[pretrain,train]"
        auricle("preprocess", "corpus=manifest", f"corpus.path={manifest}", splits, f"out={given.shards}")
    if given.base_only:
        print(json.dumps(base_width(given.work, given.shards, given.runs), indent=2))
        return 0
    if given.teacher is None:
        mfcc = given.work / "mfcc"
        auricle("targets", f"shards={given.shards}", f"out={mfcc}", "rounds=8")
        lines = ["+experiment=quality_hubert", f"data.targets={{mfcc: {mfcc}}}"]
        given.teacher = train("teacher", given.teacher_updates, given.work, given.shards, *lines)
    values = {
        "checkpoint": "graphs", "task": "phones", "manifest": str(manifest), "seeds": 1, "ask": given.ask,
        "max_utterances": given.max_utterances,
    }  # fmt: skip
    task = TaskEvaluation(load(EvaluateConfig, values), "phones", lambda line: None)
    found, passed = Found({}, {}, {}, set()), False
    for seed in range(given.seeds):  # a page after each seed: a run that is stopped leaves the seeds that it finished
        key = {**settings(given), "seed": seed}
        results = finished(given, key)
        if results is None:
            results = seed_results(seed, task, given)
            jsonl.append_rows(given.work / "found.jsonl", [{"key": key, "found": results}])
        found.add(results)
        passed = report(found, seed + 1, begun, given)
    return 0 if passed else 1


def report(found: Found, seeds: int, begun: float, given: Namespace) -> bool:
    """Writes compress.json and compress.md; returns whether both gates are passed."""
    rows = table(found)
    whole = statistics.mean(timing["rtf"] for timing in found.timings[f"{TEACHER}, fp32"])
    result = {
        "when": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", "benchmarks/prove/compress.py", *sys.argv[1:]]),
        "machine": f"{model_name()}, {os.cpu_count()} cores",
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "seeds": seeds,
        "updates": asdict(Updates.scaled(given.updates)),
        "log_mel": accuracy(found.tallies[LOG_MEL]),
        "rows": [asdict(row) for row in rows],
        "noisy": found.noisy,
        "torch_seconds_over_onnx_fp32": {k: s / whole for k, s in torch_seconds(given.teacher, 10.0, 10).items()},
        "learned_over_truncation": paired(rows, found, TRUNCATED),
        "learned_over_any_cut": paired(rows, found, TEACHER),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "compress.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return write_page(result, rows, given.out / "compress.md")


def table(found: Found) -> list[Figures]:
    """Returns the rows: log-mel, then every model in fp32 and INT8."""
    log_mel = accuracy(found.tallies[LOG_MEL])
    exact = [name for name in found.tallies if name.startswith(TEACHER) and name.endswith("fp32")]
    gain = max(accuracy(found.tallies[name]) for name in exact if name not in found.learned) - log_mel
    rows = [Figures(LOG_MEL, False, **_interval(bootstrap(found.tallies[LOG_MEL], 2_000)), kept=0.0)]
    for name, timings in found.timings.items():
        interval = bootstrap(found.tallies[name], 2_000)
        speeds = {key: statistics.mean(t[key] for t in timings) for key in ("speed", "wall_speed", "megabytes")}
        rows.append(
            Figures(
                name=name,
                learned=name in found.learned,
                **_interval(interval),
                kept=(interval.value - log_mel) / gain,
                **speeds,
            )
        )
    return [*rows, *(Figures(name, True, note=note) for name, note in found.notes.items())]


def _interval(found: Interval95) -> dict[str, float]:
    return {"accuracy": found.value, "low": found.low, "high": found.high}


def _shown(row: Figures) -> tuple[str, ...]:
    """Returns the cells of a row; those without a figure are empty."""
    cells = (
        f"{100 * row.accuracy:.1f} ({100 * row.low:.1f} to {100 * row.high:.1f})", f"{100 * row.kept:.0f} %",
        f"{row.speed:.2f}", f"{row.wall_speed:.2f}", f"{row.megabytes:.1f}",
    )  # fmt: skip
    return (row.name, *("" if "nan" in cell else cell for cell in cells), row.note)


def paired(rows: list[Figures], found: Found, kind: str) -> list[dict[str, Any]]:
    """Returns each learned row's accuracy minus that of the best rival that is at least as fast (within 3 %).

    Args:
        rows: the table.
        found: results by row.
        kind: beginning of the names of rivals, which did not learn.
    """
    untrained = [row for row in rows if row.name in found.timings and not row.learned and row.name.startswith(kind)]
    compared = []
    for row in rows:
        rivals = [other for other in untrained if other.speed >= (1 - EQUAL) * row.speed]
        if row.name not in found.timings or not row.learned or not rivals:
            continue
        best = max(rivals, key=lambda other: other.accuracy)
        gap = bootstrap(found.tallies[row.name], 2_000, found.tallies[best.name])
        compared.append({"row": row.name, "rival": best.name, "value": gap.value, "low": gap.low, "high": gap.high})
    return compared


def _differences(compared: list[dict[str, Any]]) -> list[str]:
    return [
        f"- {one['row']} minus {one['rival']}: {100 * one['value']:+.1f} ({100 * one['low']:+.1f} to "
        f"{100 * one['high']:+.1f})"
        for one in compared
    ]


def write_page(result: dict[str, Any], rows: list[Figures], file: Path) -> bool:
    """Writes the table and both gates; returns whether they are passed."""
    fast = [row.name for row in rows if row.kept >= KEPT and row.speed >= FASTER]
    above = [one["row"] for one in result["learned_over_truncation"] if one["low"] > 0]
    at_goal = [row.name for row in rows if row.kept >= KEPT and row.speed >= GOAL]
    lines = [
        "# Small models: accuracy kept, and speed", "",
        f"{result['when']}, {result['machine']}, {result['seeds']} seeds, {result['minutes']} minutes: "
        f"`{result['command']}`", "",
        *markdown_table(
            ("model", "phones, non-silence frames", "gain kept", "speed", "by the clock", "MB", ""),
            map(_shown, rows),
        ),
        "", "Gain: over log-mel, of the teacher's best layer. Speed: against the teacher in fp32 in onnxruntime, one "
        "thread, 10 s of audio, in turn, by processor time" + (f"; {result['noisy']}." if result["noisy"] else "."),
        "The teacher in torch takes "
        + " and ".join(
            f"{times:.2f} times as long in {name}" for name, times in result["torch_seconds_over_onnx_fp32"].items()
        ) + ": the speed over the teacher in bf16 is that of the table, times the last number.",
        "Updates of each training: " + ", ".join(f"{n} {name}" for name, n in result["updates"].items()) + ".",
        "", f"Gate 1, {KEPT:.0%} of the gain at {FASTER:g} times the speed: "
        + (f"passed by {'; '.join(fast)}." if fast else "missed.")
        + (f" At {GOAL:g} times: {'; '.join(at_goal)}." if at_goal else f" None at {GOAL:g} times."),
        "Gate 2, a learned model above the best truncation at least as fast, paired: "
        + (f"passed by {'; '.join(above)}." if above else "missed."), "",
        *_differences(result["learned_over_truncation"]), "",
        "Against the best model at least as fast that no student's training made: the teacher cut by blocks, or by "
        "blocks and widths, or trained longer:", "",
        *_differences(result["learned_over_any_cut"]), "",
    ]  # fmt: skip
    file.write_text("\n".join(lines), encoding="utf-8")
    print(file.read_text(encoding="utf-8"))
    return bool(fast and above)


if __name__ == "__main__":
    sys.exit(main())
