"""auricle jobs: lists, follows, cancels and requeues runs on any launcher."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.core.schema import ConfigError, load
from data_pipeline.core.text import visible
from launch.cli.command_table import SUBCOMMANDS
from launch.cli.parser import Parser
from launch.cli.tables import show, table, warn
from launch.config import LAUNCHERS
from launch.exit_codes import ExitCode
from launch.launchers import factory
from launch.launchers.in_process import InProcess
from launch.launchers.processes import ChildProcesses
from launch.launchers.status import is_elsewhere, require_ended, shown_state, state_of, total_steps
from launch.launchers.waiting import waiting_for
from launch.runs.follow import Follower, progress_line
from launch.runs.job_record import FILE_NAME, read_record, write_record
from launch.runs.metadata import require_plugins, submitted_from
from launch.runs.summary import find_run, number
from launch.workers import task
from pretrain.checkpointing.locate import steps_done

ENDED = ("done", "failed", "cancelled")


def run(arguments: list[str]) -> int:
    """Runs a subcommand; returns 0, or 1 for the `status` of a run that failed or was cancelled."""
    parser = Parser("auricle jobs", description="runs on this machine, SLURM or Ray")
    subcommands = parser.add_subparsers(dest="subcommand", required=True, metavar="|".join(SUBCOMMANDS["jobs"]))
    for name, text in SUBCOMMANDS["jobs"].items():
        subcommand = subcommands.add_parser(name, help=text)
        if name == "list":
            subcommand.add_argument("--runs", type=Path, default=Path("runs"), help="default: runs")
            continue
        subcommand.add_argument("run", help="run folder, or a run's name below runs/")
        if name == "logs":
            subcommand.add_argument("-f", "--follow", action="store_true", help="print new output until the run ends")
            subcommand.add_argument("--rank", type=int, default=0, help="default: 0")
    given = parser.parse_args(arguments)
    if given.subcommand == "list":
        return _list(given.runs)
    folder = find_run(given.run)
    if given.subcommand == "logs":
        return _logs(folder, given.rank, given.follow)
    return {"status": _status, "cancel": _cancel, "requeue": _requeue}[given.subcommand](folder)


def _list(runs: Path) -> int:
    if not runs.is_dir():
        raise ConfigError(f"--runs {runs}: there is no such folder")
    listed: list[tuple[str, ...]] = []
    for file in sorted(runs.glob(f"*/{FILE_NAME}")):
        folder = file.parent
        try:
            listed.append(_row(folder))
        except (ValueError, KeyError) as error:  # one unreadable run must not hide the rest
            listed.append((folder.name, *"–––", "unreadable", *"–––"))
            warn(f"{folder}: {error}")
    show(table(("run", "command", "where", "job", "state", "step", "of", "submitted"), listed, keep={3}))
    return ExitCode.DONE


def _row(folder: Path) -> tuple[str, ...]:
    record, row = read_record(folder), Follower(folder).read()
    step = f"{number(row or {}, 'step', 0.0):.0f}" if total_steps(folder) else "–"
    handle = record.handle.partition(":")[0]
    steps = str(total_steps(folder) or "–")
    submitted = record.submitted[:16].replace("T", " ")  # to the minute
    return folder.name, record.command, record.launcher, handle, shown_state(folder), step, steps, submitted


def _status(folder: Path) -> int:
    state, row = shown_state(folder), Follower(folder).read()
    if not total_steps(folder):
        print(f"{visible(str(folder))}: {read_record(folder).command} {state}")
        return 1 if state in ("failed", "cancelled", "unhealthy") else 0
    done = (
        f"step {number(row, 'step', 0.0):.0f}/{total_steps(folder)}, {progress_line(row)}"
        if row
        else "no step done yet"
    )
    print(f"{visible(str(folder))}: {state}, {done}, newest checkpoint at step {steps_done(folder)}")
    if state in ("waiting", "running") and (reason := waiting_for(folder)):
        print(f"waiting: {visible(reason)}")
    return 1 if state in ("failed", "cancelled", "unhealthy") else 0


def _logs(folder: Path, rank: int, follow: bool) -> int:
    path = folder / "logs" / f"rank_{rank}.log"
    if not total_steps(folder):
        record = read_record(folder)
        if isinstance(factory.for_record(record), InProcess) and not (folder / "logs" / task.LOG).exists():
            raise ValueError(
                f"{folder}: `auricle {record.command}` ran in the foreground and printed its output on its terminal"
            )
        path = folder / "logs" / ("slurm.log" if record.launcher == "slurm" else task.LOG)
    if not path.exists() and not follow:
        raise ValueError(f"{path} does not exist (yet); there are: {', '.join(_names(folder / 'logs')) or 'no logs'}")
    for text in _growing(path, folder) if follow else [path.read_text(encoding="utf-8", errors="replace")]:
        print(visible(text, keep="\n\t\r"), end="", flush=True)
    return ExitCode.DONE


def _names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.log"))


def _growing(path: Path, folder: Path) -> Iterator[str]:
    offset, ended = 0, False
    while True:
        if path.exists():
            with path.open("rb") as file:
                file.seek(offset)
                new = file.read()
            offset += len(new)
            yield new.decode("utf-8", errors="replace")
        if ended:
            return
        ended = state_of(folder) in ENDED
        time.sleep(0.5)


def _cancel(folder: Path) -> int:
    record = read_record(folder)
    if is_elsewhere(record):
        raise ValueError(f"{folder} was started on {record.host} and can only be ended there")
    before = state_of(folder)
    factory.for_record(record).cancel(record.handle)
    had = f"had ended before ({before})" if before in ENDED else "is ended"
    print(f"{folder}: job {record.handle} {had}; its checkpoints stay")
    return ExitCode.DONE


def _requeue(folder: Path) -> int:
    record = read_record(folder)
    submitter = factory.for_record(record)
    if isinstance(submitter, ChildProcesses | InProcess):
        raise ValueError(f"{folder} ran from this machine: repeat its `auricle {record.command}` command, it continues")
    require_ended(folder)
    require_plugins(folder)
    folder = folder.absolute()
    if directory := submitted_from(folder):  # relative paths of the config refer to it
        os.chdir(directory)
    launcher = load(LAUNCHERS[record.launcher], {**record.config, "after": ""})  # the job it waited for has ended
    handle = factory.make(launcher, record.command).submit(folder)
    write_record(folder, handle, launcher, record.command)
    print(f"{folder}: job {handle}")
    return ExitCode.DONE
