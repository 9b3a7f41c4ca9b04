"""auricle demo: preprocesses some speech, pretrains a small model and prints a summary, in a few minutes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from data_pipeline.core.jsonl import read_rows
from data_pipeline.core.schema import ConfigError
from launch.cli import request
from launch.cli.tables import show_rows
from launch.config import PretrainJob
from launch.demo_corpus import DemoCorpus, find_corpus
from launch.exit_codes import ExitCode
from launch.launchers import factory
from launch.launchers.processes import ChildProcesses
from launch.runs import metadata
from launch.workflows import submit
from launch.workflows.attended_run import run_attended

USAGE = """auricle demo [corpus=FOLDER] [field=value of `auricle pretrain`] ...

Takes speech from the given folder, else from the folder named by the
environment variable AURICLE_SPEECH, else from Debian's voice packages, else
generates speech-like sounds. Writes shards with Ray, pretrains BEST-RQ on two
ranks and prints a table of the result. All files are written below demo/."""
WORK = Path("demo")
FIELDS = ("+experiment=best_rq_tiny", "name=demo", "launcher.processes=2")
"""Fields of the training; those of the command line come after them."""


def run(arguments: list[str]) -> int:
    """Runs the demo; returns the exit code of the first step that fails, or 0."""
    given = [argument.partition("=")[2] for argument in arguments if argument.startswith("corpus=")]
    overrides = [argument for argument in arguments if not argument.startswith("corpus=")]
    if {"-h", "--help"} & set(overrides):
        request.read("pretrain", PretrainJob, [*FIELDS, *overrides], usage=USAGE)
        return ExitCode.DONE
    _require_training(overrides)
    corpus = find_corpus(given[-1] if given else "", WORK)
    print(f"speech: {corpus.origin}")
    folder_of_corpus = WORK / corpus.name
    shards = folder_of_corpus / "shards"
    if code := submit.run("preprocess", [*corpus.overrides, f"out={shards}"]):
        return code
    # the twelve synthetic voices vary so little that the collapse detector would stop the run
    overrides = ["health.on_collapse=warn", *overrides] if corpus.name == "synthetic" else overrides
    job = _job(shards, folder_of_corpus, overrides)
    submitter = factory.for_job(job)
    if not isinstance(submitter, ChildProcesses):
        raise ConfigError(f"launcher={job.launcher.name}: the demo runs on this machine")
    folder = metadata.prepare(job)
    code = run_attended(submitter, folder, job.train.steps, job.launcher)
    if code == ExitCode.DONE:
        print()
        show_rows(_table(corpus, shards, folder, job, submitter.processes))
    return code


def _require_training(overrides: list[str]) -> None:
    """Raises ConfigError, before anything is written, for a switch or a wrong field of the training."""
    known = request.read("pretrain", PretrainJob, [*FIELDS, "data.shards=none", *overrides])
    if known is None:
        raise ConfigError("--cfg: the demo has no config of its own; give it to `auricle pretrain`")


def _job(shards: Path, folder: Path, overrides: list[str]) -> PretrainJob:
    places = [f"data.shards={shards}", f"runs={folder / 'runs'}"]
    return request.config_of("pretrain", PretrainJob, [*FIELDS, *places, *overrides])


def _table(corpus: DemoCorpus, shards: Path, folder: Path, job: PretrainJob, ranks: int) -> list[tuple[str, str]]:
    from data_pipeline.core.types import SAMPLE_RATE
    from data_pipeline.shards.records import finished_units

    records = finished_units(str(shards))
    hours_in = sum(row[5] for record in records for row in record.flow if row[2] == "in") / SAMPLE_RATE / 3600
    hours_out = sum(record.samples for record in records) / SAMPLE_RATE / 3600
    rows = read_rows(folder / "metrics.jsonl")
    # without the first steps, which warm up caches and allocators
    steady = rows[len(rows) // 10 :]
    seconds = sum(row["perf/step_seconds"] for row in steady)
    speed = sum(row["data/audio_seconds"] for row in steady) / seconds
    tail = rows[-10:]
    last = sum(row["loss/total"] for row in tail) / len(tail)
    python = Path(sys.executable).parent
    tensorboard = python / "tensorboard" if (python / "tensorboard").exists() else Path("tensorboard")
    shown = tensorboard.relative_to(Path.cwd()) if tensorboard.is_relative_to(Path.cwd()) else tensorboard
    return [
        ("speech", corpus.origin),
        ("hours", f"{hours_in:.2f} in, {hours_out:.2f} in {sum(1 for record in records if record.shard)} shards"),
        ("training", f"{rows[-1]['step']} steps on {ranks} ranks, {speed:.0f} × real time"),
        ("loss", f"{rows[0]['loss/total']:.3f} → {last:.3f} (mean of the last {len(tail)} steps)"),
        ("checkpoint", str(folder / "checkpoints" / f"step_{job.train.steps:08d}")),
        ("curves", shlex.join([str(shown), "--logdir", str(folder / "tb")])),
    ]
