"""Runs a command once another Ray Job has succeeded, as SLURM's `afterok` does.

    python -m launch.launchers.ray_wait JOB_ID COMMAND …

It is the entrypoint of a Ray Job, so it runs inside the cluster. It occupies no core while it waits.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from launch.exit_codes import ExitCode

POLL = 2.0


def main(arguments: list[str]) -> int:
    """Replaces this process with the command; returns FAILED if the other job did not succeed."""
    job, *command = arguments
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient()
    if not succeeded(lambda: str(client.get_job_status(job)), job):
        return ExitCode.FAILED
    return os.execvp(command[0], command)


def succeeded(status: Callable[[], str], job: str) -> bool:
    """Waits for the end of a job; returns whether it succeeded."""
    while (state := status()) in ("PENDING", "RUNNING"):
        time.sleep(POLL)
    if state != "SUCCEEDED":
        print(f"{job} is {state}: the command is not started", file=sys.stderr, flush=True)
    return state == "SUCCEEDED"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
