"""Decides whether a job that ended is restarted.

The policy for SLURM jobs and for runs on Ray: a failed job is restarted unless more than `retries` failures in a row
left no new checkpoint. Stops at a time limit are not failures. Wrong configs, unhealthy runs and superseded starts are
never restarted.

The batch scripts of slurm/ call it before and after their job; `begin` prints what `end` needs:

    since=$(python -m launch.launchers.retry begin RUN_FOLDER --restart 0)
    python -m launch.launchers.retry end RUN_FOLDER --since "$since" --code 1 --retries 3

`end` prints the reason for its decision. Its exit code is AGAIN if the job is to be restarted, otherwise the exit code
of the job.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.exit_codes import ExitCode
from pretrain.checkpointing.locate import steps_done
from pretrain.checkpointing.run_folder import start_files


@dataclass(frozen=True)
class Progress:
    """State of a run folder when a start begins. `str` and `parse` convert it to and from a shell variable."""

    checkpoint: int
    """Steps of the newest checkpoint; 0 without one, and for jobs that write none."""
    starts: int
    """Number of starts of the run so far."""

    @staticmethod
    def of(folder: Path) -> Progress:
        """Reads the progress from a run folder."""
        try:
            checkpoint = steps_done(folder)
        except (ValueError, OSError):
            checkpoint = 0  # damaged: the ranks will end with that error and without a new checkpoint
        return Progress(checkpoint, len(start_files(folder)) if (folder / "incarnations").is_dir() else 0)

    @staticmethod
    def parse(text: str) -> Progress:
        """Parses the result of `str`. Raises ValueError."""
        checkpoint, starts = text.split()
        return Progress(int(checkpoint), int(starts))

    def __str__(self) -> str:
        return f"{self.checkpoint} {self.starts}"


@dataclass(frozen=True)
class Decision:
    """Whether a job is restarted, the exit code it ends with otherwise, and the reason in words."""

    again: bool
    code: int
    reason: str


class RetryPolicy:
    """Counts failures in a row without a new checkpoint, in RUN_FOLDER/logs/failures.

    Args:
        folder: the run folder.
        retries: failures in a row after which the job is still restarted.
    """

    def __init__(self, folder: Path, retries: int) -> None:
        self._folder, self._retries = folder, retries
        self._count_file = folder / "logs" / "failures"

    def begin(self, first: bool) -> Progress:
        """Prepares a start of the job and returns the progress so far.

        Args:
            first: whether this is the job's first start, which resets the count of failures.
        """
        if first:
            self._count_file.unlink(missing_ok=True)
            (self._folder / "UNHEALTHY").unlink(missing_ok=True)
        return Progress.of(self._folder)

    def end(self, code: int, since: Progress, warned: bool = False, cancelled: bool = False) -> Decision:
        """Decides what follows a start that ended.

        Args:
            code: exit code of the ranks or the task, as reported by the scheduler.
            since: the result of `begin` for this start.
            warned: whether it was stopped because its time limit approached.
            cancelled: whether its scheduler ended it; a restart is then up to the scheduler.
        """
        if code == ExitCode.DONE:
            self._count_file.unlink(missing_ok=True)
            return Decision(False, code, "finished")
        now = Progress.of(self._folder)
        # a launcher reports the exit code of one rank only, so compare the number of starts as well
        if code == ExitCode.SUPERSEDED or now.starts > since.starts + 1:
            return Decision(False, ExitCode.SUPERSEDED, "superseded by a newer start: not tried again")
        failures = self._failures()
        self._count_file.unlink(missing_ok=True)  # a job submitted again after its end has all retries
        if cancelled:
            return Decision(False, code, "cancelled")
        if code == ExitCode.USAGE:
            return Decision(False, code, "the config cannot work: not tried again")
        unhealthy = self._folder / "UNHEALTHY"
        if code == ExitCode.UNHEALTHY or unhealthy.is_file():
            why = unhealthy.read_text(encoding="utf-8", errors="replace").strip() if unhealthy.is_file() else ""
            return Decision(False, ExitCode.UNHEALTHY, f"the run is unhealthy: not tried again: {why}")
        failures = 0 if warned or now.checkpoint != since.checkpoint else failures + 1
        counted = f"{failures} failures in a row without a new checkpoint, {self._retries} retries allowed"
        if failures > self._retries:
            return Decision(False, code, f"giving up after exit code {code} ({counted})")
        self._count_file.parent.mkdir(parents=True, exist_ok=True)
        self._count_file.write_text(f"{failures}\n", encoding="utf-8")
        return Decision(True, code, f"starting again after exit code {code} ({counted})")

    def _failures(self) -> int:
        try:
            return int(self._count_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return 0


def main(arguments: Sequence[str]) -> int:
    """Runs `begin` or `end`; returns the exit code."""
    parser = argparse.ArgumentParser("launch.launchers.retry")
    commands = parser.add_subparsers(dest="command", required=True)
    begin, end = commands.add_parser("begin"), commands.add_parser("end")
    for command in (begin, end):
        command.add_argument("folder", type=Path)
        command.add_argument("--restart", type=int, default=0, help="SLURM_RESTART_COUNT of this start")
    end.add_argument("--since", type=Progress.parse, required=True, help="what `begin` printed")
    end.add_argument("--code", type=int, required=True, help="exit code of the ranks or the task")
    end.add_argument("--retries", type=int, default=3)
    end.add_argument("--known", default="", help="SLURM's own count of restarts; another number: started elsewhere")
    end.add_argument("--warned", action="store_true", help="it was stopped because its time limit approached")
    end.add_argument("--cancelled", action="store_true", help="the scheduler ended it")
    given = parser.parse_args(arguments)
    if given.command == "begin":
        (given.folder / "STOP").unlink(missing_ok=True)  # of an earlier start
        print(RetryPolicy(given.folder, 0).begin(first=given.restart == 0))
        return ExitCode.DONE
    if given.known not in ("", str(given.restart)):
        # a node that lost its connection is back after SLURM has restarted its job elsewhere; that start decides
        decision = Decision(False, given.code, f"SLURM has started it again (restart {given.known}): left alone")
    else:
        decision = RetryPolicy(given.folder, given.retries).end(given.code, given.since, given.warned, given.cancelled)
    print(decision.reason)
    if decision.again:
        return ExitCode.AGAIN
    return decision.code if decision.code != ExitCode.AGAIN else ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
