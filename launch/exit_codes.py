"""Exit codes of `auricle` and of the processes that it starts."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes for shells, schedulers and the launcher that started the process."""

    DONE = 0
    """The work is done, or queued."""
    FAILED = 1
    """The work failed; a restart may succeed."""
    USAGE = 2
    """The command or the config is wrong; a restart would fail in the same way."""
    UNHEALTHY = 3
    """Health checks stopped the run (RUN/UNHEALTHY has the reason); a restart would end in the same way."""
    SUPERSEDED = 4
    """A newer start of the run took over; a restart would supersede that one."""
    LOST = 70
    """An attempt on a Ray cluster lost a worker or a node; a restart may succeed."""
    AGAIN = 75
    """`launch.launchers.retry end`: the job is to be restarted (EX_TEMPFAIL); no rank ends with it."""
    STOPPED = 85
    """A rank stopped on request with a checkpoint; the same command continues."""
    INTERRUPTED = 130
    """Stopped with Ctrl-C."""


NEVER_RETRY = frozenset({ExitCode.USAGE, ExitCode.UNHEALTHY, ExitCode.SUPERSEDED})
"""Exit codes of a rank after which a launcher does not restart it."""
