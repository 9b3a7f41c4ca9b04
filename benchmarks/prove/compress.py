"""Measures what small models keep of a teacher, and how much faster they are.

    python benchmarks/prove/compress.py                       # ≤ 25 minutes on two cores
    python benchmarks/prove/compress.py --teacher runs/T --minutes 0 --student-minutes 0.5 --seeds 1 --max-utterances 40

Speech: manifest.tsv of the folder that AURICLE_SPEECH names; pretraining and students read its splits pretrain and
train. Rows: the teacher, also after each block; a student of one block distilled from layer 2; two pruned blocks;
one block trained on the units of layer 2 (DiceHuBERT); each in fp32 and INT8. Columns: phone accuracy on non-silence
frames of unseen speakers, the share of the teacher's gain over log-mel that is kept, speed from audio to features in
onnxruntime on one thread, measured in turn, against the teacher in fp32, and beside it against the teacher in torch in
fp32 and bf16; MB.
Writes benchmarks/results/compress.json and .md. Exit code 1 unless one row keeps 95 % of the gain at 3 times the speed
and a learned row is above plain truncation at equal latency (paired interval above 0).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.prove.common import auricle, markdown_table, parser_of, real_speech, step_seconds, succeeds  # noqa: E402
from data_pipeline.core.schema import load  # noqa: E402
from launch.cli.compose import compose  # noqa: E402
from launch.config import PretrainJob  # noqa: E402
from launch.runs.metadata import run_config  # noqa: E402
from pretrain.checkpointing.initial import write_initial  # noqa: E402
from pretrain.evaluate.config import EvaluateConfig  # noqa: E402
from pretrain.evaluate.frozen_encoders import FrozenEncoder, log_mel_with_context, open_encoder  # noqa: E402
from pretrain.evaluate.graph_encoder import open_graph_encoder  # noqa: E402
from pretrain.evaluate.metrics import Tally, accuracy, bootstrap  # noqa: E402
from pretrain.evaluate.task_evaluation import TaskEvaluation  # noqa: E402
from pretrain.profiling.graph_timing import GraphTiming, measure_graphs  # noqa: E402
from pretrain.profiling.processor import model_name  # noqa: E402
from pretrain.train_module import build_model  # noqa: E402

MEASURE = "non-silence frames"
KEPT, FASTER, GOAL = 0.95, 3.0, 4.0
BLOCKS, BEST, STUDENT_BLOCKS = 4, 2, 1
"""Blocks of the teacher, its layer that knows most of phones, blocks of the students."""
SPARSITY = 0.5
"""Share of heads and inner channels that the pruned student loses."""
TIMED_STEPS = 20


@dataclass(frozen=True)
class Model:
    """One row before INT8.  layer: of the run.  learned: whether it was trained after or besides the teacher."""

    name: str
    run: Path
    layer: int = -1
    learned: bool = False


@dataclass
class Figures:
    """One row of the table."""

    name: str
    learned: bool
    accuracy: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    kept: float = float("nan")
    speed: float = float("nan")
    megabytes: float = float("nan")
    note: str = ""


def train(name: str, minutes: float, runs: Path, shards: Path, *overrides: str) -> Path:
    """Trains for about `minutes`, at the speed of a few timed steps; returns the run folder."""
    processes = f"launcher.processes={min(2, torch.get_num_threads())}"  # OMP_NUM_THREADS=1: on one core
    common = [*overrides, f"data.shards={shards}", f"runs={runs}", processes, "health.on_collapse=warn"]
    timing = f"{name}_timing"
    auricle("pretrain", *common, f"name={timing}", f"train.steps={TIMED_STEPS}", "schedule.warmup_steps=1")
    steps = max(TIMED_STEPS, int(minutes * 60 / step_seconds(runs / timing)))
    more = [f"objective.sparsity_steps={max(1, steps // 10)}"] if any("prune" in line for line in overrides) else []
    lengths = [
        f"train.steps={steps}",
        f"train.checkpoint_every={steps}",
        f"schedule.warmup_steps={max(1, steps // 20)}",
    ]
    auricle("pretrain", *common, *more, *lengths, f"name={name}", "train.media_every=0")
    return runs / name


def widths_of(run: Path) -> list[str]:
    """Returns the overrides of a cut run's encoder."""
    encoder = json.loads((run / "config.json").read_text(encoding="utf-8"))["encoder"]
    widths = json.dumps(encoder["widths"], separators=(",", ":"))
    last = json.dumps(encoder["final_norm"])
    return [f"encoder.layers={encoder['layers']}", f"encoder.widths={widths}", f"encoder.final_norm={last}"]


def students(teacher: Path, minutes: float, runs: Path, shards: Path) -> tuple[list[Model], dict[str, str]]:
    """Trains the learned models; each takes about `minutes`. Returns them, and a note on each that could not be cut.

    Layer BEST of the teacher teaches, as the last layer of a run cut after it: later layers know less of phones.
    """
    best, cut = runs / "best", runs / "truncated"
    auricle("compress", str(teacher), str(best), "--blocks", str(BEST))
    auricle("compress", str(teacher), str(cut), "--blocks", str(STUDENT_BLOCKS))
    distil, last = f"objective.teacher={best}", f"objective.layers=[[{BEST}]]"
    distilled = train(
        "distilled", minutes, runs, shards, "+experiment=distil_tiny", distil, last, f"init={cut}", *widths_of(cut)
    )
    found, notes = [Model("distilled, 1 block", distilled, learned=True)], {}
    overrides = [distil, f"objective.layers=[[0],[{BEST}]]", f"objective.sparsity={SPARSITY}", f"init={best}"]
    pruned = train("pruning", 0.6 * minutes, runs, shards, "+experiment=prune_tiny", *overrides, *widths_of(best))
    if succeeds("compress", str(pruned), str(runs / "pruned_cut")):
        overrides = [distil, last, f"init={runs / 'pruned_cut'}", *widths_of(runs / "pruned_cut")]
        final = train("pruned", 0.4 * minutes, runs, shards, "+experiment=distil_tiny", *overrides)
        found.append(Model("pruned, 2 blocks", final, learned=True))
    else:
        notes["pruned, 2 blocks"] = "not cut: its closed gates are off the target (see auricle compress)"
    units = runs / "units"
    auricle("targets", f"shards={shards}", f"out={units}", f"features={teacher}", f"layer={BEST}", "rounds=8")
    labels = ["objective.labels=units", "objective.label_rate_hz=50", f"data.targets={{units: {units}}}"]
    overrides = ["+experiment=quality_hubert", f"init={cut}", *widths_of(cut), *labels]
    dice = train("units_of_teacher", minutes, runs, shards, *overrides)
    return [*found, Model("teacher's units, 1 block", dice, learned=True)], notes


def exported(models: list[Model], out: Path, shards: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Exports each model in fp32 and INT8; returns folders by row, and a note where INT8 was refused."""
    folders, notes = {}, {}
    for number, model in enumerate(models):
        for kind, options in (("fp32", []), ("INT8", ["--int8", "dynamic", "--shards", str(shards)])):
            folder = out / f"{number}_{kind.lower()}"
            line = ["export", str(model.run), str(folder), "--to", "onnx", "--layer", str(model.layer), *options]
            if succeeds(*line):
                folders[f"{model.name}, {kind}"] = folder
            else:
                notes[f"{model.name}, {kind}"] = "not exported: see the message of auricle export"
    return folders, notes


def tallies(task: TaskEvaluation, encoder: FrozenEncoder) -> list[Tally]:
    """Returns hits and trials by speaker, for each seed."""
    return task.scores(lambda seed: encoder, same=True)[MEASURE]


def torch_speeds(teacher: Path, seconds: float, runs: int) -> dict[str, float]:
    """Returns the teacher's real-time factor in torch on one thread, in fp32 and bf16 in turn, medians."""
    torch.set_num_threads(1)
    encoder, wave_T = open_encoder(str(teacher)), 0.1 * torch.randn(int(seconds * 16_000))
    found: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for _ in range(runs + 1):
        for name, on in (("fp32", False), ("bf16", True)):
            begun = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                encoder.encode(wave_T)
            found[name].append((time.perf_counter() - begun) / seconds)
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
        "megabytes": [exact.file_mb, small.file_mb],
        "peak_above_bare_mb": [graph.peak_rss_mb - graph.bare_rss_mb for graph in timings.graphs],
        "noisy": timings.noisy,
    }


def main() -> int:
    """Returns exit code 0 where both gates are passed."""
    parser = parser_of(__doc__, "compress")
    parser.add_argument("--teacher", type=Path, help="a finished run of quality_hubert; default: train one")
    parser.add_argument("--minutes", type=float, default=6.0, help="of the teacher's training")
    parser.add_argument("--student-minutes", type=float, default=2.5, help="of each student's training")
    parser.add_argument("--shards", type=Path, help="of the splits pretrain and train; default: made here")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-utterances", type=int, default=0, help="per split of the probe; 0: all")
    parser.add_argument("--runs", type=int, default=30, help="timed runs of each graph")
    parser.add_argument("--base-only", action="store_true", help="only INT8 at BASE width, with random weights")
    parser.add_argument("--ask", choices=("test", "valid"), default="test")
    given = parser.parse_args()
    manifest = real_speech()
    if manifest is None:
        return 0
    begun, shards = time.monotonic(), given.shards or given.work / "shards"
    if given.shards is None:
        splits = "corpus.splits=[pretrain,train]"
        auricle("preprocess", "corpus=manifest", f"corpus.path={manifest}", splits, f"out={shards}")
    base = base_width(given.work, shards, given.runs)
    if given.base_only:
        print(json.dumps(base, indent=2))
        return 0
    teacher = given.teacher
    if teacher is None:
        auricle("targets", f"shards={shards}", f"out={given.work / 'mfcc'}", "rounds=8")
        labels = f"data.targets={{mfcc: {given.work / 'mfcc'}}}"
        teacher = train("teacher", given.minutes, given.work, shards, "+experiment=quality_hubert", labels)
    models = [Model("teacher", teacher)]
    models += [Model(f"teacher after block {n}", teacher, n) for n in range(1, BLOCKS)]
    learned, not_cut = students(teacher, given.student_minutes, given.work, shards)
    models += learned
    folders, notes = exported(models, given.work / "exported", shards)
    settings = EvaluateConfig(
        checkpoint="graphs", task="phones", manifest=str(manifest), seeds=given.seeds, ask=given.ask,
        max_utterances=given.max_utterances,
    )  # fmt: skip
    task = TaskEvaluation(settings, "phones", lambda line: None)
    found = {name: tallies(task, open_graph_encoder(folder, name)) for name, folder in folders.items()}
    log_mel = tallies(task, log_mel_with_context())
    timings = measure_graphs(list(folders.values()), 10.0, given.runs, 1)
    by_name = dict(zip(folders, timings.graphs, strict=True))
    rows = table(models, found, log_mel, by_name, notes)
    against = {kind: rtf / by_name["teacher, fp32"].rtf_p50 for kind, rtf in torch_speeds(teacher, 10.0, 10).items()}
    result = {
        "when": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", "benchmarks/prove/compress.py", *sys.argv[1:]]),
        "machine": f"{model_name()}, {os.cpu_count()} cores",
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "log_mel": accuracy(log_mel),
        "rows": [asdict(row) for row in rows],
        "noisy": timings.noisy,
        "torch_seconds_over_onnx_fp32": against,
        "base_width": base,
        "not_cut": not_cut,
        "learned_over_truncation": paired(rows, found),
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "compress.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    passed = write_page(result, rows, given.out / "compress.md")
    return 0 if passed else 1


def table(
    models: list[Model],
    found: dict[str, list[Tally]],
    log_mel: list[Tally],
    timings: dict[str, GraphTiming],
    notes: dict[str, str],
) -> list[Figures]:
    """Returns the rows: log-mel, then every model in fp32 and INT8."""
    gain = accuracy(found["teacher, fp32"]) - accuracy(log_mel)
    rows = [Figures("log-mel with context", False, accuracy(log_mel), kept=0.0)]
    for model in models:
        for kind in ("fp32", "INT8"):
            name = f"{model.name}, {kind}"
            if name in notes:
                rows.append(Figures(name, model.learned, note=notes[name]))
                continue
            interval, timing = bootstrap(found[name], 2_000), timings[name]
            kept = (interval.value - accuracy(log_mel)) / gain
            speed = timings["teacher, fp32"].rtf_p50 / timing.rtf_p50
            rows.append(
                Figures(
                    name=name,
                    learned=model.learned,
                    accuracy=interval.value,
                    low=interval.low,
                    high=interval.high,
                    kept=kept,
                    speed=speed,
                    megabytes=timing.file_mb,
                )
            )
    return rows


def paired(rows: list[Figures], found: dict[str, list[Tally]]) -> list[dict[str, Any]]:
    """Returns each learned row's accuracy minus that of the best truncation that is at least as fast (within 3 %)."""
    truncated = [row for row in rows if row.name in found and not row.learned]
    compared = []
    for row in rows:
        rivals = [other for other in truncated if other.speed >= 0.97 * row.speed]
        if not row.learned or row.name not in found or not rivals:
            continue
        best = max(rivals, key=lambda other: other.accuracy)
        interval = bootstrap(found[row.name], 2_000, found[best.name])
        compared.append({"row": row.name, "truncation": best.name, **_interval(interval)})
    return compared


def _interval(interval: Any) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def write_page(result: dict[str, Any], rows: list[Figures], file: Path) -> bool:
    """Writes the table and both gates; returns whether they are passed."""
    fast = [row for row in rows if row.kept >= KEPT and row.speed >= FASTER]
    above = [one for one in result["learned_over_truncation"] if one["low"] > 0]
    base = result["base_width"]
    in_torch = result["torch_seconds_over_onnx_fp32"]
    at_goal = [row.name for row in rows if row.kept >= KEPT and row.speed >= GOAL]
    lines = [
        "# Small models: accuracy kept, and speed", "",
        f"{result['when']}, {result['machine']}, {result['minutes']} minutes: `{result['command']}`", "",
        *markdown_table(
            ("model", "phones, non-silence frames", "gain kept", "speed", "MB", ""),
            [
                (
                    r.name, f"{100 * r.accuracy:.1f} ({100 * r.low:.1f} to {100 * r.high:.1f})",
                    f"{100 * r.kept:.0f} %", f"{r.speed:.2f}", f"{r.megabytes:.1f}", r.note,
                )
                for r in rows
            ],
        ),
        "", "Speed: against the teacher in fp32 in onnxruntime, one thread, 10 s of audio, in turn"
        + (f"; noisy: {result['noisy']}." if result["noisy"] else "."),
        "The teacher in torch takes "
        + " and ".join(f"{times:.2f} times as long in {name}" for name, times in in_torch.items()) + ".",
        f"BASE width, random weights: INT8 is {base['speed']:.2f} times as fast as fp32 (bar: {FASTER:g}), features "
        f"differ by {100 * base['relative_error']:.1f} % (bar: 2 %)"
        + (f"; noisy: {base['noisy']}." if base["noisy"] else "."),
        "", f"Gate 1, {KEPT:.0%} of the gain at {FASTER:g} times the speed: "
        + (f"passed by {', '.join(row.name for row in fast)}." if fast else "missed.")
        + (f" At {GOAL:g} times: {', '.join(at_goal)}." if at_goal else f" None at {GOAL:g} times."),
        "Gate 2, a learned model above the best truncation at least as fast, paired: "
        + (f"passed by {', '.join(one['row'] for one in above)}." if above else "missed."), "",
        *(
            f"- {one['row']} minus {one['truncation']}: {100 * one['value']:+.1f} "
            f"({100 * one['low']:+.1f} to {100 * one['high']:+.1f})"
            for one in result["learned_over_truncation"]
        ),
        *(f"- {name}: {note}" for name, note in result["not_cut"].items()), "",
    ]  # fmt: skip
    file.write_text("\n".join(lines), encoding="utf-8")
    print(file.read_text(encoding="utf-8"))
    return bool(fast and above)


if __name__ == "__main__":
    sys.exit(main())
