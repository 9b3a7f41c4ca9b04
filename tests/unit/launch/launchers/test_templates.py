"""slurm/*.sbatch run in bash with stand-ins for SLURM's commands: arguments of srun, retries, hostile values."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.core.schema import ConfigError, load
from launch.cli import request
from launch.config import PretrainJob, RayConfig, SlurmConfig
from launch.launchers import factory
from launch.launchers.ray import RayJobs
from launch.launchers.slurm import SCRIPTS, SlurmSubmitter
from tests.support.paths import ROOT

HOSTILE = "x y$(touch pwned);`touch pwned`&touch pwned|'\" ${IFS} *\n#SBATCH --nodes=9"
TEXTS = [  # all but "after", which must be a job id
    field.name
    for field in dataclasses.fields(SlurmConfig)
    if (field.type == "str" or "Annotated[str" in field.type) and field.name != "after"
]
STAND_INS = {
    "srun": """printf "%s\\0" "$@" > "$CALLS/srun-$$"
        case "$*" in
        *launch.launchers.retry*) while [ "$1" != -m ]; do shift; done; exec python "$@";;
        *launch.workers.*) eval "${SLURM_MEANWHILE:-}"; exit "${SLURM_RANKS_END:-0}";; esac""",
    "scontrol": """case "$*" in
        *hostnames*) echo n1;;
        *"show node"*) echo "NodeAddr=127.0.0.1 NodeHostName=n1";;
        *"show job"*) echo "JobId=1 Restarts=${SLURM_KNOWN_RESTARTS-${SLURM_RESTART_COUNT:-0}} BatchFlag=1";;
        requeue*) printf "%s\\0" "$@" > "$CALLS/requeue";;
    esac""",
    "apptainer": 'while [ "$1" != -m ]; do shift; done; exec python "$@"',
    "python": f'PYTHONPATH={ROOT} exec {sys.executable} "$@"',
    "sleep": "",  # SLURM ends the script
}
MODULE = 'module() { printf "%s\\0" "$@" > "$CALLS/module"; }; export -f module; export BATCH=$$; exec bash "$@"'


def job_with_a_port(restart: int) -> tuple[int, socket.socket]:
    """Yields a job id whose rendezvous port is in use, as by a Ray head."""
    for job in range(1, 2000):
        listener = socket.socket()
        try:
            listener.bind(("127.0.0.1", 20000 + (job * 7 + restart) % 20000))
        except OSError:
            listener.close()
            continue
        listener.listen()
        return job, listener
    raise AssertionError("no free port")


@dataclasses.dataclass
class Ended:
    """The result of a batch script, and the argument lists it passed to SLURM's commands."""

    code: int
    said: str
    calls: dict[str, list[str]]

    @property
    def requeued(self) -> list[str]:
        """Arguments of the requeue command, empty if the script did not requeue."""
        return self.calls.get("requeue", [])


def work_folder(tmp_path: Path, command: str, name: str = "run") -> Path:
    """Prepares a run folder and stand-ins for SLURM's commands."""
    run = tmp_path / "work" / name
    for folder in (tmp_path / "bin", tmp_path / "calls", run / "logs"):
        folder.mkdir(parents=True)
    for stand_in, text in STAND_INS.items():
        (tmp_path / "bin" / stand_in).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / stand_in).chmod(0o755)
    (run / ("config.json" if command == "pretrain" else "task.json")).write_text("{}")
    return run


def execute(tmp_path: Path, words: list[str], **variables: object) -> Ended:
    """Runs a batch script as SLURM does; `variables` are SLURM's without the prefix SLURM_, and the stand-ins'."""
    place, calls = tmp_path / "work", tmp_path / "calls"
    for file in calls.iterdir():
        file.unlink()
    job, listener = job_with_a_port(int(str(variables.get("RESTART_COUNT", 0))))
    slurm = {"JOB_ID": job, "JOB_NODELIST": "n1", "NTASKS": 1, "CPUS_PER_TASK": 2, "SUBMIT_DIR": place, **variables}
    environment = {f"SLURM_{name}": str(value) for name, value in slurm.items() if value is not None}
    environment |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(calls)}
    with listener:
        done = subprocess.run(
            ["bash", "-c", MODULE, "bash", *words], env=environment, cwd=place, timeout=30, check=False,
            capture_output=True, text=True,
        )  # fmt: skip
    assert not list(tmp_path.rglob("pwned"))
    found = {file.name: file.read_text().split("\0")[:-1] for file in calls.iterdir()}
    return Ended(done.returncode, done.stdout + done.stderr, found)


def batch_words(run: Path, command: str, config: SlurmConfig | None = None) -> list[str]:
    """Returns the batch script and its arguments as submitted."""
    submitter = SlurmSubmitter(config or SlurmConfig(python="python"), command)
    arguments = submitter.command(run)
    return arguments[arguments.index(str(submitter.script)) :]


def calls_of(tmp_path: Path, command: str, config: SlurmConfig) -> dict[str, list[str]]:
    """Runs the command's batch script successfully; returns the argument lists of srun and module."""
    run = work_folder(tmp_path, command, f"run {HOSTILE}".replace("/", "").replace("\n", ""))
    python = Path(config.python)
    python.parent.mkdir(parents=True)
    python.symlink_to(tmp_path / "bin" / "python")
    ended = execute(tmp_path, batch_words(run, command, config))
    assert ended.code == 0, ended.said
    return ended.calls


@pytest.mark.parametrize("container", ["none", "pyxis", "apptainer"])
@pytest.mark.parametrize("command", list(SCRIPTS))
def test_containers_and_modules_are_separate_arguments_of_srun(tmp_path: Path, command: str, container: str) -> None:
    given = {"image": f"{HOSTILE}.sqsh", "mounts": f"/data:{HOSTILE}", "python": f"{tmp_path}/opt/{HOSTILE}/python"}
    config = SlurmConfig(container=container, modules=(f"cuda {HOSTILE}", "gcc"), **given)  # type: ignore[arg-type]
    calls = calls_of(tmp_path, command, config)
    assert calls.pop("module") == ["load", f"cuda {HOSTILE}", "gcc"]
    work = str(tmp_path / "work")
    for words in calls.values():
        python = words.index(given["python"])
        assert words[python + 1] == "-m"
        if container == "pyxis":
            assert f"--container-image={given['image']}" in words[:python]
            assert f"--container-mounts={given['mounts']}" in words[:python]
            assert f"--container-workdir={work}" in words[:python]
        elif container == "apptainer":
            begin = words.index("apptainer")
            bound = ["apptainer", "exec", "--nv", "--bind", given["mounts"], "--pwd", work, given["image"]]
            assert words[begin:python] == bound
        else:
            assert not any(word.startswith("--container") or word == "apptainer" for word in words)
    modules = {words[words.index(given["python"]) + 2] for words in calls.values()}
    expected = {"pretrain": {"launch.workers.rank"}, "evaluate": {"launch.workers.task"}}
    expected = expected.get(command, {"ray.scripts.scripts", "launch.workers.task"})
    # the retry decision is also made inside the container, which pyxis can only enter through srun
    assert modules == expected | ({"launch.launchers.retry"} if container == "pyxis" else set())


def test_devices_are_a_step_of_their_own_beside_the_server(tmp_path: Path) -> None:
    run = work_folder(tmp_path, "pretrain")
    words = batch_words(run, "pretrain", SlurmConfig(python="python", devices=3))
    ended = execute(tmp_path, words, NTASKS=4, NTASKS_PER_NODE=4)
    assert ended.code == 0, ended.said
    steps = {words[words.index("-m") + 1]: words for words in ended.calls.values()}
    assert set(steps) == {"launch.workers.rank", "launch.workers.device"}
    assert {"--ntasks=1", "--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= set(steps["launch.workers.rank"])
    assert {"--ntasks=3", "--nodes=1", "--overlap", "--wait=0"} <= set(steps["launch.workers.device"])
    assert steps["launch.workers.device"][-1] == steps["launch.workers.rank"][-1] == str(run)


@pytest.mark.parametrize("name", TEXTS)
def test_every_text_of_the_config_is_one_argument_of_sbatch(name: str, tmp_path: Path) -> None:
    """sbatch receives an argument list without a shell; the printed plan is shell-quoted."""
    more = {"container": "pyxis", "image": "base"} if name in ("image", "mounts") else {}
    config = SlurmConfig(**{**more, name: HOSTILE})  # type: ignore[arg-type]
    submitter = SlurmSubmitter(config)
    words = submitter.command(tmp_path)
    assert [word for word in words if HOSTILE in word and word.startswith(("--", HOSTILE))]
    shown = submitter.plan(tmp_path).split("\n\n# /")[0]
    assert shlex.split(shown) == words


@pytest.mark.parametrize("command", list(SCRIPTS))
def test_every_text_of_the_config_is_one_argument_of_a_ray_entrypoint(command: str, tmp_path: Path) -> None:
    config = RayConfig(address="ray://h:1", dashboard="http://h:2", after="raysubmit_1")
    plan = RayJobs(config, command).plan(tmp_path / HOSTILE.replace("/", ""))
    printed = subprocess.run(
        ["bash", "-c", plan.replace("&& exec ", "&& printf '%s\\0' ", 1)], cwd=tmp_path, capture_output=True, text=True
    )
    assert printed.stdout.split("\0")[:-1] == RayJobs(config, command).command(tmp_path / HOSTILE.replace("/", ""))
    assert HOSTILE in printed.stdout
    assert not list(tmp_path.rglob("pwned"))


def test_all_text_fields_of_the_config_are_tested() -> None:
    assert {"partition", "account", "qos", "constraint", "exclude", "image", "mounts", "python"} <= set(TEXTS)


def test_further_options_of_sbatch_are_single_arguments_and_cannot_replace_ours(tmp_path: Path) -> None:
    config = SlurmConfig(options={"comment": HOSTILE, "exclusive": ""})
    words = SlurmSubmitter(config).command(tmp_path)
    assert f"--comment={HOSTILE}" in words
    assert "--exclusive" in words
    assert shlex.split(shlex.join(words)) == words
    for name in ("wrap", "output", "nodes", "--nice", "a b", "x;y", ""):
        with pytest.raises(ValueError, match="options"):
            SlurmConfig(options={name: "1"})


def test_a_rank_gets_a_core_and_one_for_each_worker() -> None:
    run = ["objective=best_rq", "frontend=log_mel", "encoder=transformer_tiny", "data.shards=s", "launcher=slurm"]

    def cores(*more: str) -> str:
        submitter = factory.for_job(request.config_of("pretrain", PretrainJob, [*run, *more]))
        assert isinstance(submitter, SlurmSubmitter)
        return next(word for word in submitter.command(Path("runs/a")) if "cpus-per-task" in word)

    assert cores("data.workers=5") == "--cpus-per-task=6"
    assert cores("data.workers=5", "launcher.cpus_per_task=2") == "--cpus-per-task=2"
    assert "--cpus-per-task=8" in SlurmSubmitter(SlurmConfig(), "preprocess").command(Path("runs/a"))


def test_evaluation_uses_one_node_where_training_uses_many(tmp_path: Path) -> None:
    words = SlurmSubmitter(SlurmConfig(nodes=8, gpus_per_node=8), "evaluate").command(tmp_path)
    assert {"--nodes=1", "--ntasks-per-node=1", "--gres=gpu:1"} <= set(words)


@pytest.mark.parametrize(("gpus", "tasks", "ranks"), [(8, 0, 8), (8, 8, 8), (0, 0, 1), (0, 4, 4)])
def test_each_gpu_gets_a_rank(gpus: int, tasks: int, ranks: int, tmp_path: Path) -> None:
    submitter = SlurmSubmitter(SlurmConfig(nodes=2, gpus_per_node=gpus, tasks_per_node=tasks))
    assert submitter.processes == 2 * ranks
    words = submitter.command(tmp_path)
    assert f"--ntasks-per-node={ranks}" in words
    assert (f"--gres=gpu:{gpus}" in words) == bool(gpus)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"gpus_per_node": 8, "tasks_per_node": 1}, "tasks_per_node"),
        ({"container": "pyxis"}, "image"),
        ({"minutes": 5}, "warn_seconds"),
    ],
)
def test_inconsistent_slurm_settings_are_refused(given: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        load(SlurmConfig, given)


@pytest.mark.parametrize("command", list(SCRIPTS))
def test_consecutive_crashes_end_a_job_and_the_next_job_has_all_retries(command: str, tmp_path: Path) -> None:
    run = work_folder(tmp_path, command)
    words = batch_words(run, command, SlurmConfig(python="python", retries=1))
    for _ in range(2):  # two jobs of one run folder
        assert execute(tmp_path, words, RANKS_END=1, RESTART_COUNT=0).requeued
        ended = execute(tmp_path, words, RANKS_END=1, RESTART_COUNT=1)
        assert not ended.requeued
        assert "giving up" in ended.said
    assert execute(tmp_path, words, RANKS_END=1, RESTART_COUNT=2).requeued, "a manual restart has all retries"
    assert execute(tmp_path, words, RANKS_END=0, RESTART_COUNT=3).code == 0
    assert execute(tmp_path, words, RANKS_END=1, RESTART_COUNT=4).requeued, "the count was reset by a success"
    words = batch_words(run, command, SlurmConfig(python="python", retries=0))
    assert not execute(tmp_path, words, RANKS_END=1, RESTART_COUNT=0).requeued


@pytest.mark.parametrize("command", ["pretrain", "preprocess"])
def test_stops_at_the_time_limit_do_not_count_as_failures(command: str, tmp_path: Path) -> None:
    words = batch_words(work_folder(tmp_path, command), command, SlurmConfig(python="python", retries=1))
    assert execute(tmp_path, words, RANKS_END=1, RESTART_COUNT=0).requeued
    for restart in range(1, 4):
        warned = {"MEANWHILE": "kill -USR1 $BATCH; /bin/sleep 0.3", "RANKS_END": 85}
        ended = execute(tmp_path, words, RESTART_COUNT=restart, **warned)
        assert "the time limit is near" in ended.said
        assert ended.requeued, ended.said
    assert execute(tmp_path, words, RANKS_END=1, RESTART_COUNT=4).requeued, "the crash before the stops does not count"


@pytest.mark.parametrize("command", list(SCRIPTS))
def test_a_job_that_slurm_has_restarted_elsewhere_is_not_requeued(command: str, tmp_path: Path) -> None:
    words = batch_words(work_folder(tmp_path, command), command)
    ended = execute(tmp_path, words, RANKS_END=1, RESTART_COUNT=1, KNOWN_RESTARTS=2)
    assert not ended.requeued
    assert ended.code == 1
    assert "left alone" in ended.said
    assert execute(tmp_path, words, RANKS_END=1, RESTART_COUNT=1, KNOWN_RESTARTS="").requeued, (
        "SLURM does not report the restart count"
    )


def test_a_superseded_run_is_not_retried(tmp_path: Path) -> None:
    run = work_folder(tmp_path, "pretrain")
    words = batch_words(run, "pretrain")
    claim = "claim() {{ mkdir -p {0}; touch {0}/$(ls {0} | wc -l); }}; ".format(shlex.quote(str(run / "incarnations")))
    assert execute(tmp_path, words, RANKS_END=137, MEANWHILE=claim + "claim").requeued, (
        "the only claim is from this start"
    )
    # srun returns the highest code, here that of the ranks killed after the superseded rank ended
    for code, meanwhile in ((4, "claim"), (137, "claim; claim")):
        ended = execute(tmp_path, words, RANKS_END=code, MEANWHILE=claim + meanwhile)
        assert not ended.requeued
        assert ended.code == 4
        assert "superseded by a newer start" in ended.said


def test_an_array_trains_each_run_once_and_requeues_only_its_task(tmp_path: Path) -> None:
    runs = [work_folder(tmp_path / name, "pretrain", name) for name in ("a", "b")]
    script, *options = batch_words(runs[0], "pretrain")
    words = [script, *options[:-1], "--", *map(str, runs)]
    array = {"ARRAY_JOB_ID": 7, "ARRAY_TASK_ID": 1}
    ended = execute(tmp_path / "a", words, **array, RANKS_END=1)
    assert [call[-1] for name, call in ended.calls.items() if name.startswith("srun")] == [str(runs[1])]
    assert ended.requeued == ["requeue", "7_1"]
    for index, given in ((2, words), (0, [script])):
        ended = execute(tmp_path / "a", given, ARRAY_TASK_ID=index)
        assert ended.code == 2
        assert f"array task {index} (counted from 0) has no run folder" in ended.said
        assert not ended.calls


@pytest.mark.parametrize("command", list(SCRIPTS))
def test_the_example_commands_in_the_script_headers_work(command: str, tmp_path: Path) -> None:
    """Each example runs the script successfully with its options and run folders."""
    script = SlurmSubmitter(SlurmConfig(), command).script
    lines = script.read_text().replace("\\\n#", "").splitlines()
    given = [line.split(script.name, 1)[1] for line in lines if line.startswith("#   sbatch")]
    assert len(given) == (2 if command == "pretrain" else 1)
    for line in given:
        run = work_folder(tmp_path / str(len(line)), command)
        words = ["run" if word == "RUN" or word.startswith("runs/") else word for word in shlex.split(line)]
        words = ["python" if word.endswith("/python") else word for word in words]
        ended = execute(run.parent.parent, [str(script), *words], ARRAY_TASK_ID=3 if "RUN" in line else 0)
        assert ended.code == 0, ended.said


@pytest.mark.parametrize(
    ("unset", "said"),
    [
        ({"NTASKS": None, "JOB_NUM_NODES": 2, "NTASKS_PER_NODE": 4}, "8 ranks on n1"),
        ({"NTASKS": None}, "1 ranks on n1"),
        ({"JOB_NODELIST": None, "CPUS_PER_TASK": None}, "1 ranks on"),
        ({"SUBMIT_DIR": None}, "1 ranks on n1"),
        ({"JOB_ID": None}, "submit this script with sbatch"),
    ],
)
def test_scripts_run_without_optional_slurm_variables(tmp_path: Path, unset: dict[str, object], said: str) -> None:
    """Which variables SLURM sets depends on the options of sbatch and on its version."""
    run = work_folder(tmp_path, "pretrain")
    ended = execute(tmp_path, batch_words(run, "pretrain"), **unset)
    assert "unbound variable" not in ended.said
    assert said in ended.said
    ranks = [call for name, call in ended.calls.items() if name.startswith("srun")]
    assert [f"--ntasks={said.split()[0]}" in call for call in ranks] == (
        [] if unset.get("JOB_ID", 1) is None else [True]
    )


@pytest.mark.parametrize("command", list(SCRIPTS))
def test_a_missing_run_folder_argument_is_a_usage_error(command: str, tmp_path: Path) -> None:
    run = work_folder(tmp_path, command)
    script = batch_words(run, command)[0]
    for words, said in (
        ([script], "no argument|0 are given"),
        ([script, "elsewhere"], "elsewhere is not a run folder"),
    ):
        ended = execute(tmp_path, words)
        assert ended.code == 2
        assert re.search(said, ended.said)
        assert not ended.calls
