"""auricle pretrain: shards in, a checkpoint out."""

from __future__ import annotations

from data_pipeline.core.schema import ConfigError
from data_pipeline.sampling.constraints import BatchConstraints
from data_pipeline.shards.records import done_records
from launch.cli import request as job
from launch.commands import targets
from launch.config import PretrainJob
from launch.launchers import factory
from launch.launchers.processes import ChildProcesses
from launch.launchers.status import require_ended
from launch.runs import metadata
from launch.runs.job_record import write_note
from launch.workflows import iterations, sweep
from launch.workflows.attended_run import attend
from launch.workflows.submit import DRY_RUN, PREPARE, SWITCHES, tell


def run(arguments: list[str]) -> int:
    """Exit code: 0 all steps are done or the job is queued, 1 a rank failed, 2 bad config, 3 unhealthy, 4 superseded by
    a newer start, 130 stopped.
    """
    if sweep.MULTIRUN in arguments:
        return sweep.run(arguments, run)
    request = job.read("pretrain", PretrainJob, arguments, switches=(*SWITCHES, sweep.MULTIRUN))
    if request is None:
        return 0
    config = request.config
    if config.chain:
        return iterations.run(config, arguments, {"targets": targets.run, "pretrain": run})
    if config.link:
        raise ConfigError(f"link={config.link}: this run has no chain")
    submitter = factory.for_job(config)
    if DRY_RUN in request.switches:
        print(submitter.plan(metadata.folder_of(config)))
        return 0
    if PREPARE not in request.switches:
        require_ended(metadata.folder_of(config))
    if isinstance(submitter, ChildProcesses):
        BatchConstraints.of(config.data)
        _require_shards(config.data.shards)
    folder = metadata.prepare(config)
    if PREPARE in request.switches:
        print(folder)
        return 0
    if isinstance(submitter, ChildProcesses):
        return attend(submitter, folder, config.train.steps, config.launcher)
    handle = submitter.submit(folder)
    write_note(folder, handle, config.launcher)
    tell(handle, folder, config.launcher.name)
    return 0


def _require_shards(root: str) -> None:
    """Says so at once, before any rank is started, where there is nothing to read."""
    try:
        done_records(root)
    except ValueError as error:
        raise ConfigError(f"data.shards={root}: {error}") from None
