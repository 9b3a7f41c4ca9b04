"""`auricle jobs` on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from launch import app
from launch.config import LocalConfig
from launch.submit import read_note, write_note


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder after two of five steps."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "mine"
    (folder / "logs").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"train": {"steps": 5}}))
    row = {"step": 2, "loss/total": 1.25, "opt/lr": 0.1, "perf/audio_seconds_per_second": 7.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "logs" / "rank_0.log").write_text("hello from rank 0\n")
    return folder


def note(folder: Path, process: subprocess.Popen[bytes]) -> None:
    write_note(folder, f"{process.pid}:{psutil.Process(process.pid).create_time()}", LocalConfig(processes=2))


def test_a_running_job_is_listed_followed_and_cancelled(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    note(folder, process)
    assert app.main(["jobs", "list"]) == 0
    assert "running" in capsys.readouterr().out
    assert app.main(["jobs", "status", "mine"]) == 0
    said = capsys.readouterr().out
    assert "running, step 2/5" in said
    assert "1.2500" in said
    assert app.main(["jobs", "requeue", "mine"]) == app.FAILED
    assert app.main(["jobs", "cancel", str(folder)]) == 0
    process.wait(timeout=10)
    assert app.main(["jobs", "status", "mine"]) == app.FAILED
    assert app.main(["jobs", "logs", "mine", "-f"]) == 0
    assert "hello from rank 0" in capsys.readouterr().out


def test_another_process_with_the_same_id_is_not_the_job(folder: Path) -> None:
    write_note(folder, f"{os.getpid()}:1.0", LocalConfig())
    assert app.main(["jobs", "status", "mine"]) == app.FAILED
    assert app.main(["jobs", "cancel", "mine"]) == 0, "and this very process lives on"


def test_all_steps_done_is_done(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_note(folder, "1:1.0", LocalConfig())
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "latest").write_text("step_00000005\n")
    assert app.main(["jobs", "status", "mine"]) == 0
    assert "done" in capsys.readouterr().out


def test_what_is_wrong_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_note(folder, "1:1.0", LocalConfig())
    assert app.main(["jobs", "status", "yours"]) == app.FAILED
    assert "below runs/ there are: mine" in capsys.readouterr().err
    assert app.main(["jobs", "logs", "mine", "--rank", "3"]) == app.FAILED
    assert "rank_0.log" in capsys.readouterr().err
    (folder / "job.json").write_text("{")
    with pytest.raises(ValueError, match="no run was submitted"):
        read_note(folder)
