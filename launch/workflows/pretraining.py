"""Starts a pretraining run, a chain of iterations, or a sweep of runs, here or on a cluster."""

from __future__ import annotations

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from launch.cli import request
from launch.cli.request import MULTIRUN
from launch.config import PretrainJob
from launch.exit_codes import ExitCode
from launch.launchers import factory
from launch.launchers.processes import ChildProcesses
from launch.launchers.status import require_ended
from launch.runs import metadata
from launch.runs.job_record import write_record
from launch.workflows import iterations, submit, sweep
from launch.workflows.attended_run import attend
from launch.workflows.submit import DRY_RUN, PREPARE, SWITCHES, report_queued
from pretrain.checkpointing.locate import steps_done

PLANNED_HOURS = 1000.0
"""Corpora of up to this size are planned before the ranks are started, which takes about a second."""


def run(arguments: list[str]) -> int:
    """Runs one command line of `auricle pretrain`.

    Returns:
        0: all steps are done or the job is queued, 1: a rank failed, 2: wrong config, 3: unhealthy, 4: superseded by a
        newer start, 130: stopped.

    Raises:
        ConfigError: the command line or the config is wrong.
    """
    if MULTIRUN in arguments:
        return sweep.run(arguments, run)
    given = request.read("pretrain", PretrainJob, arguments, switches=(*SWITCHES, MULTIRUN))
    if given is None:
        return ExitCode.DONE
    config = given.config
    if config.chain:
        commands = {"targets": lambda line: submit.run("targets", line), "pretrain": run}
        return iterations.run(config, arguments, commands)
    if config.link:
        raise ConfigError(f"link={config.link}: this run has no chain of iterations")
    return start(config, given.switches)


def start(config: PretrainJob, switches: frozenset[str] = frozenset()) -> int:
    """Shows, prepares or starts one run; returns the exit code, see `run`."""
    request.print_cautions(config)
    submitter = factory.for_job(config)
    if DRY_RUN in switches:
        print(submitter.plan(metadata.folder_of(config)))
        return ExitCode.DONE
    if PREPARE not in switches:
        require_ended(metadata.folder_of(config))
    if isinstance(submitter, ChildProcesses):
        _require_shards(config)
        _require_start(config)
    folder = metadata.prepare(config)
    if PREPARE in switches:
        print(folder)
        return ExitCode.DONE
    if isinstance(submitter, ChildProcesses):
        return attend(submitter, folder, config.train.steps, config.launcher)
    handle = submitter.submit(folder)
    write_record(folder, handle, config.launcher)
    report_queued(handle, folder, config.launcher.name)
    return ExitCode.DONE


def _require_shards(config: PretrainJob) -> None:
    """Raises ConfigError, before any rank is started, if there are no shards or batches cannot be filled."""
    from data_pipeline.sampling.constraints import BatchConstraints
    from data_pipeline.shards.records import done_records

    BatchConstraints.of(config.data)
    if config.data.reader == "webdataset":
        from data_pipeline.loader.streaming import shard_urls

        shard_urls(config.data.shards)
        return
    try:
        records = done_records(config.data.shards)
    except ValueError as error:
        raise ConfigError(f"data.shards={', '.join(config.data.shards)}: {error}") from None
    if sum(record.samples for record in records) <= PLANNED_HOURS * 3600 * SAMPLE_RATE:
        _require_plan(config)


def _require_plan(config: PretrainJob) -> None:
    """Raises ConfigError if the steps cannot be planned; bad shards are left to the ranks, which may skip them."""
    from data_pipeline.loader.reader import open_reader

    try:
        open_reader(config.data, config.seed, rank=0, world=1).close()
    except ConfigError:
        raise
    except (ValueError, OSError):
        return


def _require_start(config: PretrainJob) -> None:
    """Raises ConfigError if the weights of `init` are of another architecture and the run has no checkpoint yet."""
    if config.init and not steps_done(metadata.folder_of(config)):
        from pretrain.interop.init_weights import require_same_architecture

        require_same_architecture(config)
