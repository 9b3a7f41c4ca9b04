"""slurm/*.sbatch run in bash with stand-ins for SLURM's commands: what reaches srun, and that no value is a command."""

from __future__ import annotations

import dataclasses
import os
import shlex
import socket
import subprocess
from pathlib import Path

import pytest

from launch.config import RayConfig, SlurmConfig
from launch.ray import RayJobs
from launch.slurm import SCRIPTS, SlurmSubmitter

HOSTILE = "x y$(touch pwned);`touch pwned`&touch pwned|'\" ${IFS} *\n#SBATCH --nodes=9"
TEXTS = [
    field.name for field in dataclasses.fields(SlurmConfig) if field.type == "str" or "Annotated[str" in field.type
]
STAND_INS = {
    "srun": 'printf "%s\\0" "$@" > "$CALLS/srun-$$"',
    "scontrol": 'case $2 in hostnames) echo n1;; node) echo "NodeAddr=127.0.0.1 NodeHostName=n1";; esac',
}
MODULE = 'module() { printf "%s\\0" "$@" > "$CALLS/module"; }; export -f module; exec bash "$@"'


def job_with_a_port() -> tuple[int, socket.socket]:
    """A job id whose rendezvous port somebody listens on, as a Ray head would."""
    for job in range(1, 2000):
        listener = socket.socket()
        try:
            listener.bind(("127.0.0.1", 20000 + job * 7 % 20000))
        except OSError:
            listener.close()
            continue
        listener.listen()
        return job, listener
    raise AssertionError("no free port")


def calls_of(tmp_path: Path, verb: str, config: SlurmConfig) -> dict[str, list[str]]:
    """Runs the verb's template as sbatch would, and returns the argument lists that srun and module were given."""
    place, run = tmp_path / "work", tmp_path / "work" / f"run {HOSTILE}".replace("/", "").replace("\n", "")
    for folder in (tmp_path / "bin", tmp_path / "calls", run / "logs"):
        folder.mkdir(parents=True)
    for name, text in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (run / ("config.json" if verb == "pretrain" else "task.json")).write_text("{}")
    command = SlurmSubmitter(config, verb).command(run)
    script = command.index(str(SlurmSubmitter(config, verb).script))
    job, listener = job_with_a_port()
    slurm = {"JOB_ID": job, "JOB_NODELIST": "n1", "NTASKS": 1, "CPUS_PER_TASK": 2, "SUBMIT_DIR": place}
    environment = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    environment |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    with listener:
        done = subprocess.run(
            ["bash", "-c", MODULE, "bash", *command[script:]], env=environment, cwd=place, timeout=30, check=False,
            capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(tmp_path.rglob("pwned"))
    return {file.name: file.read_text().split("\0")[:-1] for file in (tmp_path / "calls").iterdir()}


@pytest.mark.parametrize("container", ["none", "pyxis", "apptainer"])
@pytest.mark.parametrize("verb", list(SCRIPTS))
def test_containers_and_modules_reach_srun_word_by_word(tmp_path: Path, verb: str, container: str) -> None:
    given = {"image": f"{HOSTILE}.sqsh", "mounts": f"/data:{HOSTILE}", "python": f"/opt/{HOSTILE}/python"}
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
    expected = {"pretrain": {"launch.worker"}, "evaluate": {"launch.tasks"}}
    assert modules == expected.get(verb, {"ray.scripts.scripts", "launch.tasks"})


@pytest.mark.parametrize("name", TEXTS)
def test_every_text_of_the_config_is_one_word_of_sbatch(name: str, tmp_path: Path) -> None:
    """sbatch gets an argument list, no shell reads it; the plan that people copy is quoted."""
    more = {"container": "pyxis"} if name in ("image", "mounts") else {}
    config = SlurmConfig(**{name: HOSTILE, **more})  # type: ignore[arg-type]
    submitter = SlurmSubmitter(config)
    words = submitter.command(tmp_path)
    assert [word for word in words if HOSTILE in word and word.startswith(("--", HOSTILE))]
    shown = submitter.plan(tmp_path).split("\n\n# /")[0]
    assert shlex.split(shown) == words


@pytest.mark.parametrize("verb", list(SCRIPTS))
def test_every_text_of_the_config_is_one_word_of_a_ray_entrypoint(verb: str, tmp_path: Path) -> None:
    config = RayConfig(address=HOSTILE, dashboard=HOSTILE, after=HOSTILE)
    plan = RayJobs(config, verb).plan(tmp_path / HOSTILE.replace("/", ""))
    told = subprocess.run(
        ["bash", "-c", plan.replace("&& exec ", "&& printf '%s\\0' ", 1)], cwd=tmp_path, capture_output=True, text=True
    )
    assert told.stdout.split("\0")[:-1] == RayJobs(config, verb).command(tmp_path / HOSTILE.replace("/", ""))
    assert HOSTILE in told.stdout
    assert not list(tmp_path.rglob("pwned"))


def test_texts_are_found() -> None:
    assert {"partition", "account", "qos", "constraint", "exclude", "after", "image", "mounts", "python"} <= set(TEXTS)


def test_an_evaluation_takes_one_node_of_a_chain_that_trains_on_many(tmp_path: Path) -> None:
    words = SlurmSubmitter(SlurmConfig(nodes=8, tasks_per_node=8), "evaluate").command(tmp_path)
    assert "--nodes=1" in words
    assert "--ntasks-per-node=1" in words
