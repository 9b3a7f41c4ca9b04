"""Sweeps: a failed run does not stop the remaining runs, and is reported in the exit code and the summary."""

from __future__ import annotations

import pytest

from data_pipeline.core.schema import ConfigError
from launch.exit_codes import ExitCode
from launch.workflows import sweep

LINE = ["+experiment=best_rq_tiny", "data.shards=shards", "name=swept", "--multirun"]


@pytest.mark.parametrize(
    "failure",
    [ExitCode.FAILED, ExitCode.UNHEALTHY, ConfigError("seed: wrong"), OSError("disk full"), ValueError("[/b]")],
)
def test_a_failed_run_does_not_end_the_sweep(failure: ExitCode | Exception, capsys: pytest.CaptureFixture[str]) -> None:
    ran = []

    def one(line: list[str]) -> int:
        ran.append(line[-1])
        if "seed=2" not in line:
            return ExitCode.DONE
        if isinstance(failure, Exception):
            raise failure
        return failure

    assert sweep.run([*LINE, "seed=1,2,3"], one) == ExitCode.FAILED
    assert ran == ["name=swept_0", "name=swept_1", "name=swept_2"]
    said = capsys.readouterr().err
    assert "failed: swept_1" in said
    assert "1 of 3 runs" in said
    assert "swept_0" not in said


def test_every_failed_run_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.run([*LINE, "seed=range(4)"], lambda line: ExitCode.USAGE) == ExitCode.FAILED
    said = capsys.readouterr().err
    assert all(f"failed: swept_{number} (exit code 2)" in said for number in range(4))


def test_ctrl_c_ends_the_sweep() -> None:
    ran = []

    def one(line: list[str]) -> int:
        ran.append(line)
        return ExitCode.INTERRUPTED

    assert sweep.run([*LINE, "seed=1,2"], one) == ExitCode.INTERRUPTED
    assert len(ran) == 1


def test_a_sweep_without_failures_exits_with_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.run([*LINE, "seed=1,2", "optimizer.lr=1e-4,3e-4"], lambda line: ExitCode.DONE) == ExitCode.DONE
    assert capsys.readouterr().out.count("swept_") == 4
