"""`auricle jobs` on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from data_pipeline.core.schema import ConfigError
from launch import main
from launch.commands import compare
from launch.config import LocalConfig, RayConfig, SlurmConfig
from launch.exit_codes import ExitCode
from launch.launchers.slurm import SlurmError, SlurmSubmitter
from launch.launchers.status import mark_stopped, require_ended, state_of
from launch.runs.job_record import read_record, write_record
from launch.runs.summary import summarise


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a run folder after two of five steps."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "mine"
    (folder / "logs").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"train": {"steps": 5}}))
    row = {"step": 2, "loss/total": 1.25, "opt/lr": 0.1, "perf/audio_seconds_per_second": 7.0}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "logs" / "rank_0.log").write_text("hello from rank 0\n")
    return folder


def note(folder: Path, process: subprocess.Popen[bytes]) -> None:
    write_record(folder, f"{process.pid}:{psutil.Process(process.pid).create_time()}", LocalConfig(processes=2))


def test_a_running_job_is_listed_followed_and_cancelled(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    note(folder, process)
    assert main.main(["jobs", "list"]) == 0
    assert "running" in capsys.readouterr().out
    assert main.main(["jobs", "status", "mine"]) == 0
    said = capsys.readouterr().out
    assert "running, step 2/5" in said
    assert "1.2500" in said
    assert main.main(["jobs", "requeue", "mine"]) == ExitCode.FAILED
    assert main.main(["jobs", "cancel", str(folder)]) == 0
    process.wait(timeout=10)
    assert main.main(["jobs", "status", "mine"]) == ExitCode.FAILED
    assert main.main(["jobs", "logs", "mine", "-f"]) == 0
    assert "hello from rank 0" in capsys.readouterr().out


def test_a_missing_subcommand_is_answered_with_all(capsys: pytest.CaptureFixture[str]) -> None:
    for command, first in (("jobs", "list|status|"), ("shards", "stats|inspect|")):
        assert main.main([command]) == ExitCode.USAGE
        assert f"required: {first}" in capsys.readouterr().err


def test_runs_and_jobs_show_one_state(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"train": {"steps": 5}, "objective": {"name": "hubert"}}
    (folder / "config.json").write_text(json.dumps(config))

    def shown() -> set[str]:
        words = {"running", "failed", "stopped", "unhealthy", "done"}
        found = set()
        for command in (["runs"], ["jobs", "list"]):
            assert main.main(command) == 0
            found.add(" ".join(words & {*capsys.readouterr().out.split()}))
        return found

    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    note(folder, process)
    assert shown() == {"running"}
    process.kill()
    process.wait()
    assert shown() == {"failed"}
    mark_stopped(folder, True)
    assert shown() == {"stopped"}
    mark_stopped(folder, False)
    (folder / "UNHEALTHY").write_text("loss is NaN")
    assert shown() == {"unhealthy"}


def test_another_process_with_the_same_id_is_not_the_job(folder: Path) -> None:
    write_record(folder, f"{os.getpid()}:1.0", LocalConfig())
    assert main.main(["jobs", "status", "mine"]) == ExitCode.FAILED
    assert main.main(["jobs", "cancel", "mine"]) == 0, "and this process must not be killed"


def test_the_state_of_a_job_is_read_without_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job has two ranks, on the CPU or on GPUs that this shell does not see."""
    monkeypatch.setattr("launch.launchers.local.gpu_count", lambda: 1)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    note(folder, process)
    assert state_of(folder) == "running"
    with pytest.raises(ConfigError, match="is running"):
        require_ended(folder)
    assert main.main(["jobs", "cancel", "mine"]) == 0
    process.wait(timeout=10)


def test_a_job_is_requeued_in_its_submission_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths in the config, and that of the run folder, are resolved against it."""
    (folder / "environment.json").write_text(json.dumps({"directory": str(folder.parent.parent)}))
    write_record(folder, "17", SlurmConfig())
    script = f"pwd > {folder}/where; echo 18"
    commands(folder, monkeypatch, scontrol="echo 'Invalid job id specified' >&2; exit 1", sbatch=script)
    (folder.parent / "elsewhere").mkdir()
    monkeypatch.chdir(folder.parent / "elsewhere")
    assert main.main(["jobs", "requeue", "../mine"]) == 0
    assert (folder / "where").read_text().strip() == str(folder.parent.parent)
    assert read_record(folder).handle == "18"


def test_a_job_with_plug_ins_is_requeued_only_with_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = folder.parent / "own"
    (own / "objectives").mkdir(parents=True)
    plugin = own / "objectives" / "mine.py"
    plugin.write_text("raise SystemExit('the plug-in was run')\n")
    used = {"plugins": [{"kind": "objectives", "name": "mine", "file": str(plugin), "sha256": ""}]}
    (folder / "environment.json").write_text(json.dumps(used))
    write_record(folder, "17", SlurmConfig())
    script = f"echo $AURICLE_PLUGINS > {folder}/given; echo 18"
    commands(folder, monkeypatch, scontrol="echo 'Invalid job id specified' >&2; exit 1", sbatch=script)
    monkeypatch.setenv("AURICLE_PLUGINS", "")
    assert main.main(["jobs", "requeue", "mine"]) == ExitCode.USAGE
    assert f"add plugins={own}" in capsys.readouterr().err
    assert read_record(folder).handle == "17"
    assert main.main(["jobs", "requeue", "mine", f"plugins={own}"]) == 0
    assert (folder / "given").read_text().strip() == str(own)


def test_a_run_with_all_its_steps_is_done(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(folder, "1:1.0", LocalConfig())
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "latest").write_text("step_00000005\n")
    assert main.main(["jobs", "status", "mine"]) == 0
    assert "done" in capsys.readouterr().out


def test_unknown_runs_missing_logs_and_damaged_records_are_reported(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(folder, "1:1.0", LocalConfig())
    assert main.main(["jobs", "status", "minee"]) == ExitCode.USAGE
    said = capsys.readouterr().err
    assert "did you mean mine?" in said
    assert "below runs/ there are: mine" in said
    assert main.main(["jobs", "logs", "mine", "--rank", "3"]) == ExitCode.FAILED
    assert "rank_0.log" in capsys.readouterr().err
    (folder / "job.json").write_text("{")
    with pytest.raises(ValueError, match=r"job\.json: cannot be read"):
        read_record(folder)


def commands(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Puts stand-ins for SLURM commands at the front of PATH."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, script in scripts.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")


def test_a_job_is_unknown_while_slurm_does_not_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(folder, "17", SlurmConfig())
    commands(folder, monkeypatch, scontrol="echo 'Unable to contact slurm controller' >&2; exit 1", sacct="exit 1")
    assert state_of(folder) == "unknown"
    with pytest.raises(SlurmError, match="Unable to contact"):
        SlurmSubmitter(SlurmConfig()).status("17")
    assert main.main(["jobs", "list"]) == 0
    assert "unknown" in capsys.readouterr().out
    commands(folder, monkeypatch, scontrol="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert state_of(folder) == "failed", "SLURM no longer knows the job"


def test_a_job_is_unknown_while_the_ray_dashboard_is_down(folder: Path) -> None:
    write_record(folder, "raysubmit_1", RayConfig(dashboard="http://127.0.0.1:9"))
    assert state_of(folder) == "unknown"


def test_a_broken_job_record_does_not_hide_other_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(folder, "1:1.0", LocalConfig())
    (folder.parent / "broken").mkdir()
    (folder.parent / "broken" / "job.json").write_text("{")
    assert main.main(["jobs", "list"]) == 0
    said = capsys.readouterr()
    assert "unreadable" in said.out
    assert "mine" in said.out
    assert "broken/job.json" in said.err


def test_logs_of_a_foreground_job_are_reported_to_be_on_its_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "config.json").unlink()
    write_record(folder, "1:1.0", LocalConfig(), "preprocess")
    assert main.main(["jobs", "logs", "mine"]) == ExitCode.FAILED
    assert "ran in the foreground and printed its output on its terminal" in capsys.readouterr().err


@pytest.mark.parametrize(("state", "word"), [("PENDING", "waiting"), ("RUNNING", "running")])
def test_a_queued_or_running_job_is_not_submitted_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state: str, word: str
) -> None:
    write_record(folder, "17", SlurmConfig())
    queued = folder / "queued"
    commands(folder, monkeypatch, scontrol=f"echo JobId=17 JobState={state}", sbatch=f"touch {queued}; echo 18")
    with pytest.raises(ConfigError, match=f"slurm job 17 is {word}; `auricle jobs cancel .* ends it; name=NAME gives"):
        require_ended(folder)
    best_rq = ("objective=best_rq", "frontend=log_mel", "encoder=transformer_tiny", "data.shards=s", "launcher=slurm")
    assert main.main(["pretrain", *best_rq, "name=mine", f"runs={folder.parent}"]) == ExitCode.USAGE
    chain = ["pipeline", "preprocess.corpus=path", f"preprocess.corpus.path={folder}", "launcher=slurm"]
    chain += [f"folder={folder}", "steps=[preprocess,pretrain]"]
    (folder / "runs" / "run").mkdir(parents=True)
    write_record(folder / "runs" / "run", "17", SlurmConfig())
    assert main.main([*chain, *[f"pretrain.{line}" for line in best_rq[:3]]]) == ExitCode.USAGE
    assert capsys.readouterr().err.count("job 17 is") == 2
    assert not queued.exists()


def test_a_second_task_array_or_chain_is_refused_before_submission(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    queued = folder / "queued"
    commands(folder, monkeypatch, scontrol="echo JobId=17 JobState=RUNNING", sbatch=f"touch {queued}; echo 18")
    runs = folder.parent
    for name in ("preprocess_s", "sweep_0", "hubert-it1"):
        (runs / name).mkdir()
        write_record(runs / name, "17", SlurmConfig())
    slurm = ("launcher=slurm", f"runs={runs}")
    sweep = ("objective=best_rq", "frontend=log_mel", "encoder=transformer_tiny", "data.shards=s", "seed=1,2")
    assert main.main(["preprocess", "corpus=path", "corpus.path=c", "out=s", *slurm]) == ExitCode.USAGE
    assert main.main(["pretrain", *sweep, "name=sweep", "--multirun", *slurm]) == ExitCode.USAGE
    assert main.main(["pretrain", "+experiment=hubert_base", "name=hubert", "data.shards=s", *slurm]) == ExitCode.USAGE
    assert capsys.readouterr().err.count("job 17 is running") == 3
    assert not queued.exists()


def test_the_state_of_a_job_on_another_machine_follows_from_its_recent_files(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_record(folder, f"{os.getpid() + 1}:1.0", LocalConfig())
    values = json.loads((folder / "job.json").read_text())
    (folder / "job.json").write_text(json.dumps(values | {"host": "elsewhere"}))
    assert state_of(folder) == "running", "the run has just written a row"
    with pytest.raises(ConfigError, match=r"is running on elsewhere; .* on elsewhere ends it; if it died there"):
        require_ended(folder)
    assert main.main(["jobs", "cancel", "mine"]) == ExitCode.FAILED
    assert "was started on elsewhere and can only be ended there" in capsys.readouterr().err
    os.utime(folder / "metrics.jsonl", (1.0, 1.0))
    assert state_of(folder) == "unknown"
    require_ended(folder)


def test_cancelling_an_ended_job_reports_that_it_had_ended(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_record(folder, "1:1.0", LocalConfig())
    assert main.main(["jobs", "cancel", "mine"]) == 0
    assert "had ended before (failed)" in capsys.readouterr().out


def test_every_list_shows_the_same_state_of_a_killed_run(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_record(folder, "1:1.0", LocalConfig())  # of a process that ended
    assert summarise(folder).state == "running", "its last row is recent"
    monkeypatch.setattr(compare, "plot", lambda *_: None)
    for command in (["jobs", "list"], ["runs"], ["compare", str(folder), str(folder)]):
        assert main.main(command) == 0
        said = capsys.readouterr().out
        assert "failed" in said, command
        assert "running" not in said, command


def test_ids_and_names_are_shown_whole(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.cli.tables.PIPED_WIDTH", 80)
    monkeypatch.setattr(compare, "plot", lambda *_: None)
    long = str(folder.rename(folder.parent / ("Z" * 70)))
    write_record(Path(long), "Q" * 70, LocalConfig())
    assert main.main(["jobs", "list"]) == 0
    said = capsys.readouterr().out
    assert (said.count("Q"), said.count("Z"), "…" in said) == (70, 70, False)
    assert main.main(["compare", long, long]) == 0
    said = capsys.readouterr().out
    assert said.count("Z") == 2 * 2 * 70, "two runs in the headings of two tables"
    assert "…" not in said
