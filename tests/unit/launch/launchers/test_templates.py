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
from launch.config import RayConfig, SlurmConfig
from launch.launchers.ray import RayJobs
from launch.launchers.slurm import SCRIPTS, SlurmSubmitter
from tests.support.paths import ROOT

HOSTILE = "x y$(touch pwned);`touch pwned`&touch pwned|'\" ${IFS} *\n#SBATCH --nodes=9"
TEXTS = [  # but for "after", which must be the id of a job
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
    "sleep": "",  # SLURM would end the script
}
MODULE = 'module() { printf "%s\\0" "$@" > "$CALLS/module"; }; export -f module; export BATCH=$$; exec bash "$@"'


def job_with_a_port(restart: int) -> tuple[int, socket.socket]:
    """A job id whose rendezvous port somebody listens on, as a Ray head would."""
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
    """What came of a batch script, and the argument lists it gave to SLURM's commands."""

    code: int
    said: str
    calls: dict[str, list[str]]

    @property
    def requeued(self) -> list[str]:
        """What it asked SLURM to start again."""
        return self.calls.get("requeue", [])


def work_folder(tmp_path: Path, verb: str, name: str = "run") -> Path:
    """A prepared run folder, and stand-ins for SLURM's commands."""
    run = tmp_path / "work" / name
    for folder in (tmp_path / "bin", tmp_path / "calls", run / "logs"):
        folder.mkdir(parents=True)
    for command, text in STAND_INS.items():
        (tmp_path / "bin" / command).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / command).chmod(0o755)
    (run / ("config.json" if verb == "pretrain" else "task.json")).write_text("{}")
    return run


def execute(tmp_path: Path, words: list[str], **variables: object) -> Ended:
    """Runs a batch script as SLURM would; `variables` are SLURM's, without SLURM_, and those of the stand-ins."""
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


def batch_words(run: Path, verb: str, config: SlurmConfig | None = None) -> list[str]:
    """The batch script and its arguments, as they are submitted."""
    submitter = SlurmSubmitter(config or SlurmConfig(python="python"), verb)
    command = submitter.command(run)
    return command[command.index(str(submitter.script)) :]


def calls_of(tmp_path: Path, verb: str, config: SlurmConfig) -> dict[str, list[str]]:
    """Runs the command's batch script to a good end; returns the argument lists that srun and module received."""
    run = work_folder(tmp_path, verb, f"run {HOSTILE}".replace("/", "").replace("\n", ""))
    python = Path(config.python)
    python.parent.mkdir(parents=True)
    python.symlink_to(tmp_path / "bin" / "python")
    ended = execute(tmp_path, batch_words(run, verb, config))
    assert ended.code == 0, ended.said
    return ended.calls


@pytest.mark.parametrize("container", ["none", "pyxis", "apptainer"])
@pytest.mark.parametrize("verb", list(SCRIPTS))
def test_containers_and_modules_reach_srun_word_by_word(tmp_path: Path, verb: str, container: str) -> None:
    given = {"image": f"{HOSTILE}.sqsh", "mounts": f"/data:{HOSTILE}", "python": f"{tmp_path}/opt/{HOSTILE}/python"}
    config = SlurmConfig(container=container, modules=(f"cuda {HOSTILE}", "gcc"), **given)  # type: ignore[arg-type]
    calls = calls_of(tmp_path, verb, config)
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
    expected = expected.get(verb, {"ray.scripts.scripts", "launch.workers.task"})
    # the decision is made inside the container, too, which pyxis can only enter through srun
    assert modules == expected | ({"launch.launchers.retry"} if container == "pyxis" else set())


@pytest.mark.parametrize("name", TEXTS)
def test_every_text_of_the_config_is_one_word_of_sbatch(name: str, tmp_path: Path) -> None:
    """sbatch gets an argument list, no shell reads it; the plan that people copy is quoted."""
    more = {"container": "pyxis", "image": "base"} if name in ("image", "mounts") else {}
    config = SlurmConfig(**{**more, name: HOSTILE})  # type: ignore[arg-type]
    submitter = SlurmSubmitter(config)
    words = submitter.command(tmp_path)
    assert [word for word in words if HOSTILE in word and word.startswith(("--", HOSTILE))]
    shown = submitter.plan(tmp_path).split("\n\n# /")[0]
    assert shlex.split(shown) == words


@pytest.mark.parametrize("verb", list(SCRIPTS))
def test_every_text_of_the_config_is_one_word_of_a_ray_entrypoint(verb: str, tmp_path: Path) -> None:
    config = RayConfig(address="ray://h:1", dashboard="http://h:2", after="raysubmit_1")
    plan = RayJobs(config, verb).plan(tmp_path / HOSTILE.replace("/", ""))
    told = subprocess.run(
        ["bash", "-c", plan.replace("&& exec ", "&& printf '%s\\0' ", 1)], cwd=tmp_path, capture_output=True, text=True
    )
    assert told.stdout.split("\0")[:-1] == RayJobs(config, verb).command(tmp_path / HOSTILE.replace("/", ""))
    assert HOSTILE in told.stdout
    assert not list(tmp_path.rglob("pwned"))


def test_texts_are_found() -> None:
    assert {"partition", "account", "qos", "constraint", "exclude", "image", "mounts", "python"} <= set(TEXTS)


def test_an_evaluation_takes_one_node_of_a_chain_that_trains_on_many(tmp_path: Path) -> None:
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
def test_what_does_not_fit_together_is_refused(given: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        load(SlurmConfig, given)


@pytest.mark.parametrize("verb", list(SCRIPTS))
def test_crashes_in_a_row_end_a_job_and_the_next_job_has_all_its_tries(verb: str, tmp_path: Path) -> None:
    run = work_folder(tmp_path, verb)
    words = batch_words(run, verb, SlurmConfig(python="python", retries=1))
    for _ in range(2):  # two jobs of one run folder
        assert execute(tmp_path, words, RANKS_END=1, RESTART_COUNT=0).requeued
        ended = execute(tmp_path, words, RANKS_END=1, RESTART_COUNT=1)
        assert not ended.requeued
        assert "giving up" in ended.said
    assert execute(tmp_path, words, RANKS_END=1, RESTART_COUNT=2).requeued, "somebody has started it once more"
    assert execute(tmp_path, words, RANKS_END=0, RESTART_COUNT=3).code == 0
    assert execute(tmp_path, words, RANKS_END=1, RESTART_COUNT=4).requeued, "it had come to a good end"
    words = batch_words(run, verb, SlurmConfig(python="python", retries=0))
    assert not execute(tmp_path, words, RANKS_END=1, RESTART_COUNT=0).requeued


@pytest.mark.parametrize("verb", ["pretrain", "preprocess"])
def test_ends_at_the_time_limit_are_no_failures(verb: str, tmp_path: Path) -> None:
    words = batch_words(work_folder(tmp_path, verb), verb, SlurmConfig(python="python", retries=1))
    assert execute(tmp_path, words, RANKS_END=1, RESTART_COUNT=0).requeued
    for restart in range(1, 4):
        warned = {"MEANWHILE": "kill -USR1 $BATCH; /bin/sleep 0.3", "RANKS_END": 85}
        ended = execute(tmp_path, words, RESTART_COUNT=restart, **warned)
        assert "time is nearly up" in ended.said
        assert ended.requeued, ended.said
    assert execute(tmp_path, words, RANKS_END=1, RESTART_COUNT=4).requeued, "the crash before them does not count"


@pytest.mark.parametrize("verb", list(SCRIPTS))
def test_a_job_that_slurm_has_started_again_elsewhere_is_left_alone(verb: str, tmp_path: Path) -> None:
    words = batch_words(work_folder(tmp_path, verb), verb)
    ended = execute(tmp_path, words, RANKS_END=1, RESTART_COUNT=1, KNOWN_RESTARTS=2)
    assert not ended.requeued
    assert ended.code == 1
    assert "left alone" in ended.said
    assert execute(tmp_path, words, RANKS_END=1, RESTART_COUNT=1, KNOWN_RESTARTS="").requeued, "SLURM does not say"


def test_a_superseded_run_is_not_tried_again(tmp_path: Path) -> None:
    run = work_folder(tmp_path, "pretrain")
    words = batch_words(run, "pretrain")
    claim = "claim() {{ mkdir -p {0}; touch {0}/$(ls {0} | wc -l); }}; ".format(shlex.quote(str(run / "incarnations")))
    assert execute(tmp_path, words, RANKS_END=137, MEANWHILE=claim + "claim").requeued, "nobody but this start"
    # srun returns the highest code: that of the ranks which the superseded one has taken along
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
        assert f"run folder {index} is asked for" in ended.said
        assert not ended.calls


@pytest.mark.parametrize("verb", list(SCRIPTS))
def test_the_commands_in_the_heads_of_the_scripts_work(verb: str, tmp_path: Path) -> None:
    """Their options are the script's own, and what follows them is found."""
    script = SlurmSubmitter(SlurmConfig(), verb).script
    lines = script.read_text().replace("\\\n#", "").splitlines()
    given = [line.split(script.name, 1)[1] for line in lines if line.startswith("#   sbatch")]
    assert len(given) == (2 if verb == "pretrain" else 1)
    for line in given:
        run = work_folder(tmp_path / str(len(line)), verb)
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
def test_variables_that_slurm_may_leave_unset(tmp_path: Path, unset: dict[str, object], said: str) -> None:
    """Which ones are set depends on the options of sbatch and on SLURM's version."""
    run = work_folder(tmp_path, "pretrain")
    ended = execute(tmp_path, batch_words(run, "pretrain"), **unset)
    assert "unbound variable" not in ended.said
    assert said in ended.said
    ranks = [call for name, call in ended.calls.items() if name.startswith("srun")]
    assert [f"--ntasks={said.split()[0]}" in call for call in ranks] == (
        [] if unset.get("JOB_ID", 1) is None else [True]
    )


@pytest.mark.parametrize("verb", list(SCRIPTS))
def test_no_run_folder_is_named(verb: str, tmp_path: Path) -> None:
    run = work_folder(tmp_path, verb)
    script = batch_words(run, verb)[0]
    for words, said in (
        ([script], "no argument|0 are given"),
        ([script, "elsewhere"], "elsewhere is not a run folder"),
    ):
        ended = execute(tmp_path, words)
        assert ended.code == 2
        assert re.search(said, ended.said)
        assert not ended.calls
