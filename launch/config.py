"""Configs of jobs: the `launcher` section, and the root config of each command."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from typing import Annotated, Literal

from data_pipeline.core.ray_tasks import refuse_foreign_address, refuse_foreign_dashboard
from data_pipeline.core.schema import PluginChoice, PluginConfig, about, base_part, config, dump, refuse
from data_pipeline.labels.config import TargetsConfig
from data_pipeline.preprocess.config import PreprocessConfig
from pretrain.adaptation.config import FinetuneConfig
from pretrain.config import Config
from pretrain.evaluate.config import EvaluateConfig


@config
class LauncherConfig(PluginConfig):
    """Base class of the config of a launcher."""

    @property
    def queued(self) -> bool:
        """Whether jobs are handed over to a queue; a later job names them in `launcher.after` to wait for them."""
        return False

    @property
    def sees_inputs(self) -> bool:
        """Whether the inputs of a job exist when it is submitted, at the same paths as on this machine."""
        return True


DEVICES = (
    "with engine.name=federated: devices to start beside the server, one for each of the first subfolders of "
    "data.shards; 0: none"
)


@config
class LocalConfig(LauncherConfig):
    """This machine, through the `deepspeed` launcher."""

    name: Annotated[Literal["local"], about("this machine")] = "local"
    processes: Annotated[int, about("ranks to start; 0: one per GPU, or one without GPUs", ge=0)] = 0
    threads: Annotated[
        int, about("CPU threads per rank; 0: OMP_NUM_THREADS, or without it the cores divided among the ranks", ge=0)
    ] = 0
    devices: Annotated[int, about(DEVICES, ge=0)] = 0
    grace_seconds: Annotated[
        float, about("time to save a checkpoint on a stop request; 0: 30 s plus three of the longest updates", ge=0)
    ] = 0.0


JOB_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z_.-]{0,99}")
"""Submission ids of Ray Jobs, which become part of a URL, and placeholders for ids in a dry run."""
SLURM_JOB_ID = re.compile(r"[1-9][0-9]{0,9}(?:_(?:0|[1-9][0-9]{0,6}))?")
"""Ids of SLURM jobs and of array tasks."""
SET_BY_LAUNCHER = {
    "nodes": "nodes", "ntasks-per-node": "tasks_per_node", "ntasks": "tasks_per_node", "cpus-per-task": "cpus_per_task",
    "time": "minutes", "signal": "warn_seconds", "gres": "gpus_per_node", "mem": "memory_gb", "partition": "partition",
    "account": "account", "qos": "qos", "constraint": "constraint", "exclude": "exclude", "dependency": "after",
    "kill-on-invalid-dep": "after", "array": "parallel", "job-name": "", "output": "", "error": "", "open-mode": "",
    "requeue": "retries", "no-requeue": "retries", "parsable": "", "wrap": "", "chdir": "", "export": "",
    "test-only": "", "wait": "", "help": "", "usage": "", "version": "",
}  # fmt: skip
"""Options of sbatch that `SlurmConfig.options` may not hold -> the launcher's field; "" without one."""
DEFAULT_CORES = 8
"""Cores per node of jobs other than pretraining, without launcher.cpus_per_task."""
STARTING_SECONDS = 120
"""Seconds until a job handles the warning signal, which SLURM may send a minute early."""


@config
class SlurmConfig(LauncherConfig):
    """A SLURM cluster (slurm/*.sbatch). Pretraining starts one task per rank, preprocess and targets one Ray node per
    node, evaluate one process."""

    name: Annotated[Literal["slurm"], about("a SLURM cluster, from one of its login nodes")] = "slurm"
    nodes: Annotated[int, about("nodes", ge=1)] = 1
    elastic: Annotated[
        bool, about("pretraining starts, and restarts after a lost node, on as many of `nodes` as are free")
    ] = False
    tasks_per_node: Annotated[int, about("ranks per node; 0: one per GPU, or one without GPUs", ge=0)] = 0
    devices: Annotated[int, about(DEVICES, ge=0)] = 0
    gpus_per_node: Annotated[int, about("GPUs per node; 0: train on CPUs", ge=0)] = 0
    cpus_per_task: Annotated[
        int,
        about(
            "cores per rank, including its decoding processes; 0: data.workers + 1 for a run, and 8 for each "
            "node of other jobs",
            ge=0,
        ),
    ] = 0
    memory_gb: Annotated[int, about("memory per node in GiB; 0: the cluster's default", ge=0)] = 0
    minutes: Annotated[
        int, about("time limit; then all jobs but evaluations are requeued and continue until they are done", ge=3)
    ] = 240
    warn_seconds: Annotated[
        int, about("a run stops with a checkpoint this long before the limit; SLURM may do it a minute earlier", ge=30)
    ] = 300
    retries: Annotated[
        int, about("restarts after crashes in a row without a new checkpoint, before giving up", ge=0)
    ] = 3
    parallel: Annotated[int, about("runs of a sweep (--multirun) at a time; 0: as many as fit", ge=0)] = 0
    partition: Annotated[str, about("partition; empty: the cluster's default")] = ""
    account: Annotated[str, about("account to charge")] = ""
    qos: Annotated[str, about("quality of service")] = ""
    constraint: Annotated[str, about("features that the nodes must have")] = ""
    exclude: Annotated[str, about("nodes to exclude")] = ""
    options: Annotated[
        dict[str, str],
        about(
            "further options of sbatch by their long names, such as {nice: 100, licenses: a, exclusive: ''}; '' gives "
            "one without a value"
        ),
    ] = dataclasses.field(default_factory=dict)
    after: Annotated[str, about("id of a job that must succeed first; this one is cancelled if it fails")] = ""
    modules: Annotated[tuple[str, ...], about("environment modules to load")] = ()
    container: Annotated[Literal["none", "pyxis", "apptainer"], about("run the ranks in a container")] = "none"
    image: Annotated[str, about("the container's image")] = ""
    mounts: Annotated[str, about("folders to mount in it, in the container runtime's syntax")] = ""
    python: Annotated[str, about("Python interpreter with auricle on the nodes; empty: the current one")] = ""

    @property
    def queued(self) -> bool:
        """Always True."""
        return True

    @property
    def sees_inputs(self) -> bool:
        """Whether the job waits for no other one and runs without a container."""
        return not self.after and self.container == "none"

    def with_cores(self, workers: int) -> SlurmConfig:
        """Returns this config with cores per rank: as given, or one for the rank and one per decoding process."""
        return dataclasses.replace(self, cpus_per_task=self.cpus_per_task or workers + 1)

    @property
    def ranks_per_node(self) -> int:
        """Tasks of a pretraining run on each node."""
        return self.tasks_per_node or max(1, self.gpus_per_node)

    def __post_init__(self) -> None:
        """Refuses unused GPUs, ranks that would share one, a container without an image, and too short a time limit."""
        if self.gpus_per_node and self.ranks_per_node != self.gpus_per_node:
            limit = f"one rank takes one GPU, and gpus_per_node={self.gpus_per_node}; leave it out, or make them equal"
            refuse("tasks_per_node", self.tasks_per_node, limit)
        if self.after and not JOB_ID.fullmatch(self.after):  # `pipeline --dry-run` uses placeholders for ids
            refuse("after", self.after, "the id of a SLURM job, such as 1234 or 1234_5")
        for name in self.options:
            if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
                refuse("options", name, "the long name of an option of sbatch without dashes before it, such as nice")
            if name in SET_BY_LAUNCHER:
                refuse("options", name, f"set by auricle; use launcher.{SET_BY_LAUNCHER[name] or 'the other fields'}")
        if self.container != "none" and not self.image:
            refuse("image", "", f"container={self.container} needs an image")
        if 60 * self.minutes < self.warn_seconds + STARTING_SECONDS:
            most = 60 * self.minutes - STARTING_SECONDS
            limit = f"at most {most} with minutes={self.minutes}: a start takes up to {STARTING_SECONDS} s"
            refuse("warn_seconds", self.warn_seconds, limit)


@config
class RayConfig(LauncherConfig):
    """A Ray cluster: one worker per rank; continues with fewer ranks when nodes are lost."""

    name: Annotated[Literal["ray"], about("a Ray cluster")] = "ray"
    address: Annotated[str, about("address of the cluster, or auto; empty: start Ray on this machine")] = ""
    dashboard: Annotated[
        str, about("http address of the cluster's dashboard: submit the run as a Ray Job; empty drives it from here")
    ] = ""
    workers: Annotated[
        int, about("maximum number of ranks; 0: as many as are useful, up to data.micro_batches", ge=0)
    ] = 0
    min_workers: Annotated[int, about("minimum number of ranks; with fewer the run waits", ge=1)] = 1
    gpus_per_worker: Annotated[int, about("GPUs per rank; 0: train on CPUs", ge=0, le=1)] = 0
    cpus_per_worker: Annotated[int, about("cores per rank", ge=1)] = 1
    retries: Annotated[int, about("failures in a row without a new checkpoint before giving up", ge=0)] = 3
    grace_seconds: Annotated[
        float, about("time to save a checkpoint on a stop request; 0: 30 s plus three of the longest updates", ge=0)
    ] = 0.0
    wait_minutes: Annotated[
        float, about("how long to wait until the cluster can hold the ranks; Ray on this machine cannot grow", gt=0)
    ] = 30.0
    answer_seconds: Annotated[float, about("time in which the cluster must answer", gt=0)] = 20.0
    after: Annotated[str, about("id of a Ray Job that must succeed first; needs launcher.dashboard")] = ""

    @property
    def queued(self) -> bool:
        """Whether runs are Ray Jobs, with a dashboard; otherwise they are driven from this process."""
        return bool(self.dashboard)

    @property
    def sees_inputs(self) -> bool:
        """Whether the job waits for no other one."""
        return not self.after

    def __post_init__(self) -> None:
        """Refuses addresses for which Ray would import a module, and malformed Ray Job ids."""
        refuse_foreign_address("address", self.address)
        refuse_foreign_dashboard("dashboard", self.dashboard)
        if self.after and not JOB_ID.fullmatch(self.after):
            refuse("after", self.after, "the id of a Ray Job, such as raysubmit_1a2b3c")


LAUNCHERS: dict[str, type[LauncherConfig]] = {"local": LocalConfig, "ray": RayConfig, "slurm": SlurmConfig}


def _launcher_names() -> list[str]:
    return sorted(LAUNCHERS)


def _launcher_type(name: str) -> type[LauncherConfig]:
    if name not in LAUNCHERS:
        raise ValueError(f"there is no launcher {name!r}; there are: {', '.join(sorted(LAUNCHERS))}")
    return LAUNCHERS[name]


Launcher = Annotated[LauncherConfig, PluginChoice("launcher", _launcher_names, _launcher_type)]
RUNS = "folder that holds the run folders"
TASK_NAME = (
    "name of the run folder; empty: the command and the last part of the path of its output (evaluate: of the "
    "checkpoint, and a hash of the settings)"
)


@config
class ProgramJob:
    """Base class of jobs that are a single program: run folder and launcher."""

    runs: Annotated[str, about(RUNS, min_length=1)] = "runs"
    name: Annotated[str, about(TASK_NAME)] = ""
    launcher: Launcher = dataclasses.field(default_factory=LocalConfig)

    @property
    def main_path(self) -> str:
        """The path whose last part names the run folder if `name` is empty."""
        raise NotImplementedError

    @property
    def distinction(self) -> str:
        """Addition to the folder's name where jobs of different configs share the main path."""
        return ""


@config
class PreprocessJob(ProgramJob, PreprocessConfig):
    """A preprocessing job and where it runs: the root of conf/preprocess.yaml."""

    @property
    def main_path(self) -> str:
        """The shards."""
        return self.out


@config
class TargetsJob(ProgramJob, TargetsConfig):
    """A labelling job and where it runs: the root of conf/targets.yaml."""

    @property
    def main_path(self) -> str:
        """The labels."""
        return self.out


@config
class EvaluateJob(ProgramJob, EvaluateConfig):
    """An evaluation and where it runs: the root of conf/evaluate.yaml."""

    @property
    def main_path(self) -> str:
        """The checkpoint: results need no folder."""
        return self.checkpoint

    @property
    def distinction(self) -> str:
        """A hash of the evaluation, so that two evaluations of a checkpoint have a folder each."""
        text = json.dumps(dump(base_part(EvaluateConfig, self)), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:6]


@config
class FinetuneJob(FinetuneConfig):
    """A fine-tuning and where it runs: the root of conf/finetune.yaml."""

    launcher: Launcher = dataclasses.field(default_factory=LocalConfig)


ProgramConfig = PreprocessConfig | TargetsConfig | EvaluateConfig
"""Configs of jobs that are a single program, without where they run."""
JOB_TYPES: dict[str, type[ProgramJob]] = {"preprocess": PreprocessJob, "targets": TargetsJob, "evaluate": EvaluateJob}
"""Configs of jobs that are a single program, by command."""


@config
class Iteration:
    """One iteration of a chain (launch/workflows/iterations.py): frame labels of all shards, and a training on them."""

    steps: Annotated[int, about("optimizer steps of its training", ge=1)]
    classes: Annotated[int, about("number of labels", ge=2, le=65_535)] = 100
    features: Annotated[
        str,
        about(
            "features that are clustered: mfcc, or a checkpoint; empty: mfcc, then the model of the iteration before"
        ),
    ] = ""
    layer: Annotated[int, about("layer of the checkpoint", ge=0)] = 6
    rate_hz: Annotated[float, about("frame rate of the checkpoint in Hz; 0: that of the model to be trained", ge=0)] = (
        0.0
    )
    fraction: Annotated[float, about("share of the shards to which k-means is fitted", gt=0, le=1)] = 0.1
    overrides: Annotated[tuple[str, ...], about("overrides of this training, as on the command line")] = ()


@config
class PretrainJob(Config):
    """A pretraining run and where it runs: the root of conf/pretrain.yaml."""

    chain: Annotated[dict[str, Iteration], about("iterations by name, in order; each run is named NAME-ITERATION")] = (
        dataclasses.field(default_factory=dict)
    )
    link: Annotated[str, about("run only this link of the chain: ITERATION or ITERATION-labels; empty: all")] = ""
    launcher: Launcher = dataclasses.field(default_factory=LocalConfig)
