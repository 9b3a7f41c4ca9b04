"""Starts a pretraining run, a chain of iterations, or a sweep of runs, here or on a cluster."""

from __future__ import annotations

from data_pipeline.core.schema import ConfigError
from launch.cli import request
from launch.cli.request import MULTIRUN
from launch.config import PretrainJob
from launch.exit_codes import ExitCode
from launch.launchers import factory
from launch.launchers.processes import ChildProcesses
from launch.launchers.status import require_ended
from launch.runs import metadata
from launch.runs.job_record import write_record
from launch.workflows import inputs, iterations, submit, sweep
from launch.workflows.attended_run import run_attended
from launch.workflows.submit import DRY_RUN, PREPARE, SWITCHES, report_queued


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
    inputs.require_startable(config, attended=isinstance(submitter, ChildProcesses))
    folder = metadata.prepare(config)
    if PREPARE in switches:
        print(folder)
        return ExitCode.DONE
    if isinstance(submitter, ChildProcesses):
        return run_attended(submitter, folder, config.train.steps, config.launcher)
    handle = submitter.submit(folder)
    write_record(folder, handle, factory.launcher_of(config))
    report_queued(handle, folder, config.launcher.name)
    return ExitCode.DONE
