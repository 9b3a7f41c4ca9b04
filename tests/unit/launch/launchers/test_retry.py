"""The retry policy: consecutive failures without a new checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.exit_codes import ExitCode
from launch.launchers.retry import Progress, RetryPolicy, main


def save(folder: Path, step: int) -> None:
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "latest").write_text(f"step_{step:08d}\n")


def claim(folder: Path) -> None:
    """Claims the run for another start."""
    (folder / "incarnations").mkdir(exist_ok=True)
    (folder / "incarnations" / f"{len(list((folder / 'incarnations').iterdir())) + 1:06d}").touch()


def test_only_consecutive_failures_count(tmp_path: Path) -> None:
    policy = RetryPolicy(tmp_path, retries=1)
    assert policy.end(1, policy.begin(first=True)).again
    since = policy.begin(first=False)
    save(tmp_path, 10)
    assert policy.end(1, since).again, "a new checkpoint resets the count"
    assert policy.end(1, policy.begin(first=False)).again
    last = policy.end(137, policy.begin(first=False))
    assert (last.again, last.code) == (False, 137)
    assert "2 failures in a row" in last.reason
    assert policy.end(1, policy.begin(first=False)).again, "a new start has all retries"


def test_a_first_start_resets_the_count_of_earlier_jobs(tmp_path: Path) -> None:
    policy = RetryPolicy(tmp_path, retries=1)
    assert policy.end(1, policy.begin(first=True)).again
    (tmp_path / "UNHEALTHY").write_text("loss is NaN")
    assert policy.end(1, policy.begin(first=True)).again


@pytest.mark.parametrize("code", [ExitCode.USAGE, ExitCode.UNHEALTHY, ExitCode.SUPERSEDED, ExitCode.DONE])
def test_final_exit_codes_are_not_retried(tmp_path: Path, code: ExitCode) -> None:
    policy = RetryPolicy(tmp_path, retries=9)
    decision = policy.end(code, policy.begin(first=True), warned=True)
    assert (decision.again, decision.code) == (False, code)


def test_stops_at_the_time_limit_do_not_count_as_failures(tmp_path: Path) -> None:
    policy = RetryPolicy(tmp_path, retries=0)
    for first in (True, False, False):
        assert policy.end(ExitCode.STOPPED, policy.begin(first=first), warned=True).again
    assert not policy.end(ExitCode.STOPPED, policy.begin(first=False), cancelled=True).again


def test_a_superseded_start_is_recognised_when_another_rank_was_killed(tmp_path: Path) -> None:
    policy = RetryPolicy(tmp_path, retries=9)
    since = policy.begin(first=True)
    claim(tmp_path)
    assert policy.end(137, since).again, "the only claim is from this start"
    since = policy.begin(first=False)
    claim(tmp_path)
    claim(tmp_path)
    decision = policy.end(137, since)
    assert (decision.again, decision.code) == (False, ExitCode.SUPERSEDED)


def test_an_unhealthy_run_is_not_retried_whatever_the_exit_code(tmp_path: Path) -> None:
    policy = RetryPolicy(tmp_path, retries=9)
    since = policy.begin(first=True)
    (tmp_path / "UNHEALTHY").write_bytes(b"loss is NaN \xff")
    decision = policy.end(143, since)
    assert (decision.again, decision.code) == (False, ExitCode.UNHEALTHY)
    assert "loss is NaN" in decision.reason


@pytest.mark.parametrize("content", ["", "many", "\udcff"])
def test_a_damaged_count_is_treated_as_zero(tmp_path: Path, content: str) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "failures").write_bytes(content.encode(errors="surrogateescape"))
    policy = RetryPolicy(tmp_path, retries=1)
    assert policy.end(1, policy.begin(first=False)).again


def test_the_command_for_batch_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["begin", str(tmp_path)]) == 0
    since = capsys.readouterr().out.strip()
    assert Progress.parse(since) == Progress(0, 0)
    end = ["end", str(tmp_path), "--since", since, "--retries", "1"]
    assert main([*end, "--code", "1"]) == ExitCode.AGAIN
    assert main([*end, "--code", "1", "--restart", "0", "--known", "1"]) == 1
    assert "left alone" in capsys.readouterr().out
    assert main([*end, "--code", str(ExitCode.AGAIN)]) == 1, (
        "a job that ends with the code for a retry is not restarted for ever"
    )
