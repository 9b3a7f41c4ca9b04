"""auricle jobs: lists, watches, cancels and restarts runs, wherever they were sent."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data_pipeline.core.schema import load
from launch.cli.parser import Parser
from launch.config import LAUNCHERS
from launch.launchers import factory
from launch.launchers.in_process import Foreground
from launch.launchers.processes import ChildProcesses
from launch.launchers.status import is_elsewhere, require_ended, state_of, total_steps
from launch.runs.follow import Follower, describe
from launch.runs.job_record import FILE_NAME, read_record, write_record
from launch.workers import task
from pretrain.checkpointing.locate import steps_done

ENDED = ("done", "failed", "cancelled")


def run(arguments: list[str]) -> int:
    """Exit code 0, or that of the state for `status` (0 unless failed or cancelled)."""
    parser = Parser("auricle jobs", description="runs on this machine, SLURM or Ray")
    verbs = parser.add_subparsers(dest="verb", required=True)
    listing = verbs.add_parser("list", help="all runs below a folder")
    listing.add_argument("--runs", type=Path, default=Path("runs"), help="default: runs")
    for name, text in (
        ("status", "state and progress of a run"),
        ("logs", "what its ranks said"),
        ("cancel", "end it"),
        ("requeue", "start it again; it continues from its newest checkpoint"),
    ):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("run", help="run folder, or a run's name below runs/")
        if name == "logs":
            verb.add_argument("-f", "--follow", action="store_true", help="go on until the run ends")
            verb.add_argument("--rank", type=int, default=0, help="default: 0")
    given = parser.parse_args(arguments)
    if given.verb == "list":
        return _list(given.runs)
    folder = _folder(given.run)
    if given.verb == "logs":
        return _logs(folder, given.rank, given.follow)
    return {"status": _status, "cancel": _cancel, "requeue": _requeue}[given.verb](folder)


def _folder(name: str) -> Path:
    """Raises ValueError naming the runs there are."""
    for folder in (Path(name).expanduser(), Path("runs") / name):
        if (folder / FILE_NAME).is_file():
            return folder
    known = sorted(note.parent.name for note in Path("runs").glob(f"*/{FILE_NAME}"))
    raise ValueError(f"{name}: no run of that name or folder; below runs/ there are: {', '.join(known) or 'none'}")


def _list(runs: Path) -> int:
    from rich.console import Console
    from rich.table import Table

    table = Table("run", "verb", "where", "job", "state", "step", "of", "submitted", box=None, pad_edge=False)
    for note_file in sorted(runs.glob(f"*/{FILE_NAME}")):
        folder = note_file.parent
        try:
            table.add_row(*_row(folder))
        except (ValueError, KeyError) as error:  # of one run: the others are listed all the same
            table.add_row(folder.name, *"–––", "unreadable", *"–––")
            print(f"{folder}: {error}", file=sys.stderr)
    Console().print(table)
    return 0


def _row(folder: Path) -> tuple[str, ...]:
    note, row = read_record(folder), Follower(folder).read()
    step = str(row["step"] if row else 0) if total_steps(folder) else "–"
    handle = note.handle.partition(":")[0]
    steps = str(total_steps(folder) or "–")
    return folder.name, note.command, note.launcher, handle, state_of(folder), step, steps, note.submitted


def _status(folder: Path) -> int:
    state, row = state_of(folder), Follower(folder).read()
    if not total_steps(folder):
        print(f"{folder}: {read_record(folder).command} {state}")
        return 1 if state in ("failed", "cancelled") else 0
    progress = f"step {row['step']}/{total_steps(folder)}, {describe(row)}" if row else "no step done yet"
    print(f"{folder}: {state}, {progress}, newest checkpoint at step {steps_done(folder)}")
    return 1 if state in ("failed", "cancelled") else 0


def _logs(folder: Path, rank: int, follow: bool) -> int:
    path = folder / "logs" / f"rank_{rank}.log"
    if not total_steps(folder):
        note = read_record(folder)
        if isinstance(factory.for_record(note), Foreground) and not (folder / "logs" / task.LOG).exists():
            raise ValueError(
                f"{folder}: `auricle {note.command}` ran in the foreground: what it said is on its terminal"
            )
        path = folder / "logs" / ("slurm.log" if note.launcher == "slurm" else task.LOG)
    if not path.exists() and not follow:
        raise ValueError(f"{path} does not exist (yet); there are: {', '.join(_names(folder / 'logs')) or 'no logs'}")
    for text in _growing(path, folder) if follow else [path.read_text(encoding="utf-8", errors="replace")]:
        print(text, end="", flush=True)
    return 0


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
    note = read_record(folder)
    if is_elsewhere(note):
        raise ValueError(f"{folder} was started on {note.host}, and only there it can be ended")
    before = state_of(folder)
    factory.for_record(note).cancel(note.handle)
    had = f"had ended before ({before})" if before in ENDED else "is ended"
    print(f"{folder}: job {note.handle} {had}; its checkpoints stay")
    return 0


def _requeue(folder: Path) -> int:
    note = read_record(folder)
    submitter = factory.for_record(note)
    if isinstance(submitter, ChildProcesses | Foreground):
        raise ValueError(
            f"{folder} ran from this machine: give its `auricle {note.command}` command again, it continues"
        )
    require_ended(folder)
    folder = folder.absolute()
    described = folder / "environment.json"
    if described.exists():  # relative paths of the config count from where the run was given
        os.chdir(json.loads(described.read_text(encoding="utf-8"))["directory"])
    launcher = replace(load(LAUNCHERS[note.launcher], note.config), after="")  # what it waited for has ended
    handle = factory.make(launcher, note.command).submit(folder)
    write_record(folder, handle, launcher, note.command)
    print(f"{folder}: job {handle}")
    return 0
