"""Runs a command in a new session, stops it with a checkpoint, and ends all of its processes.

    python launch/launchers/process_guard.py [--run RUN_FOLDER] [--start ID] [--grace SECONDS] [--signal] -- COMMAND ...

The parent holds the other end of stdin. When stdin ends, because the parent closed it or was killed, or when SIGTERM or
SIGHUP arrives:

1. RUN_FOLDER/STOP requests a checkpoint and the end of the command, which has `grace_seconds` for that. With --signal
   the command is one rank of several: it gets SIGTERM and the same time if RUN_FOLDER/STOP exists; otherwise its peers
   are lost, and no checkpoint could be saved. This step is skipped after SIGUSR1 and without --run.
2. Every process of the session gets SIGTERM and, after KILL_SECONDS, SIGKILL.

The exit code is that of the command, or 128 + N after signal N. Uses the standard library only and imports nothing from
this project, so that it starts in milliseconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

LONGEST_GUESS = 600.0
"""Seconds that an update is assumed to take at most before one was measured."""
LEAST_GRACE = 30.0
"""Shortest grace period, in seconds."""
UPDATES_OF_GRACE = 3
"""Updates that the grace period adds: one in progress, one that sees the request, and the time to save."""
KILL_SECONDS = 10.0
"""Seconds between SIGTERM and SIGKILL."""
POLL = 0.1
RECENT_BYTES = 1 << 16
"""Bytes at the end of metrics.jsonl from which the duration of updates is measured."""


def main(arguments: list[str]) -> int:
    """Runs the command until it or stdin ends; returns its exit code."""
    parser = argparse.ArgumentParser("process_guard")
    parser.add_argument("--run", type=Path, help="run folder of the command")
    parser.add_argument("--start", default="", help="id of this start of the run, for RUN_FOLDER/STOP")
    parser.add_argument("--grace", type=float, default=0.0, help="seconds to save and end; 0 measures the updates")
    parser.add_argument("--signal", action="store_true", help="the command is one rank of several")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args(arguments)
    if os.getsid(0) != os.getpid():
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    received: set[int] = set()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda number, _: received.add(number))
    child = subprocess.Popen(given.command, stdin=subprocess.DEVNULL, preexec_fn=_default_signals)
    parent_alive = True
    while child.poll() is None and parent_alive and not received:
        ready, _, _ = select.select([0], [], [], POLL)
        parent_alive = not ready or bool(os.read(0, 4096))
    if child.poll() is None and signal.SIGUSR1 not in received and _request_save(child, given):
        deadline = time.monotonic() + grace_seconds(given.run, given.grace)
        while child.poll() is None and signal.SIGUSR1 not in received and time.monotonic() < deadline:
            time.sleep(POLL)
    _sweep(child)
    code = child.wait()
    return code if code >= 0 else 128 - code


def _request_save(child: subprocess.Popen[bytes], given: argparse.Namespace) -> bool:
    """Requests a checkpoint and the end of the command; returns whether it can still save one."""
    if given.run is None:
        return False
    request = given.run / "STOP"
    if given.signal:
        if request.exists():
            child.terminate()
        return bool(request.exists())
    with contextlib.suppress(OSError):
        request.write_text(f"{given.start}\n" if given.start else "", encoding="utf-8")
    return True


def grace_seconds(run: Path, configured: float) -> float:
    """Returns the seconds that a run has to finish its update, save a checkpoint and end.

    Args:
        run: the run folder; the end of its metrics.jsonl is read, or, before two updates are logged, the age of the
            newest start: no update has taken longer.
        configured: returned unless it is 0.
    """
    if configured:
        return configured
    longest, before = 0.0, None
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), (run / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - RECENT_BYTES))
        for line in file.read().split(b"\n")[1 if file.tell() > RECENT_BYTES else 0 :]:
            if not line:
                continue
            row = json.loads(line)
            if before and row["step"] > before["step"]:  # a resume or rollback repeats steps
                longest = max(longest, (row["time"] - before["time"]) / (row["step"] - before["step"]))
            before = row
    if not longest:
        starts = []
        with contextlib.suppress(OSError):
            starts = [file.stat().st_mtime for file in (run / "incarnations").glob("[0-9]*")]
        longest = min(max(time.time() - max(starts), 0.0), LONGEST_GUESS) if starts else 0.0
    return LEAST_GRACE + UPDATES_OF_GRACE * longest


def _default_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _sweep(child: subprocess.Popen[bytes]) -> None:
    """Ends all remaining processes of the session."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for pid in session_members(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sign)
        deadline = time.monotonic() + KILL_SECONDS
        while session_members(os.getpid()):
            child.poll()
            if time.monotonic() > deadline:
                break
            time.sleep(POLL)
        else:
            return


def session_members(leader: int) -> list[int]:
    """Returns the running processes of the session that `leader` leads, except the leader; from /proc, so on Linux."""
    members = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            # the name in parentheses may contain anything, so split after the last parenthesis
            state, _, _, session = entry.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:4]
        except OSError:
            continue
        pid = int(entry.parent.name)
        if int(session) == leader and pid != leader and state not in "ZX":
            members.append(pid)
    return members


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
