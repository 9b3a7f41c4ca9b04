"""Checks the inputs of jobs where the command is given, before anything is submitted or any rank starts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import FileStore
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.corpora.config import LibriSpeechCorpus, ManifestCorpus
from data_pipeline.shards.records import WILDCARDS, DoneRecord, done_records
from launch.config import EvaluateJob, PreprocessJob, PretrainJob, ProgramJob, TargetsJob
from launch.runs import metadata
from pretrain.checkpointing.locate import find_checkpoint, steps_done
from pretrain.evaluate.manifest import ALIGNMENT_REMEDY

PHONES = "phones"
EXISTING = "give one that exists here, also for a job on a cluster, or a URL"
PLANNED_HOURS = 1000.0
"""Audio that is planned before the ranks are started, in about a second; all of it, where this part fills no batch."""


def require_inputs(job: PretrainJob | ProgramJob, made: Sequence[Path] = (), prefix: str = "") -> None:
    """Checks that the local files and folders that a job reads exist; URLs are left to the job.

    Args:
        job: the config. One that waits for another job, or has other paths in a container, is not checked.
        made: files and folders that earlier jobs will write.
        prefix: is put before the names of fields in messages, such as "evaluate.".

    Raises:
        ConfigError: an input is missing; the message names its field.
        DamagedFileError: the pointer to the newest checkpoint of a run is damaged.
    """
    try:
        found = list(_inputs(job))
    except ConfigError as error:
        raise ConfigError(f"{prefix}{error}") from None
    if not job.launcher.sees_inputs:
        return
    for field, path in found:
        if _is_local(path) and not _is_below(path, made):
            _require_path(f"{prefix}{field}", path, EXISTING)
    for field, path in _checkpoints(job):
        if not _is_below(path, made):
            try:
                find_checkpoint(path)
            except ConfigError as error:
                reason = str(error).removeprefix(f"checkpoint={path}: ")
                raise ConfigError(f"{prefix}{field}={path}: {reason}") from None
    for path in _alignments(job):
        if _is_local(path) and not _is_below(path, made):
            _require_path(f"{prefix}{PHONES}", path, ALIGNMENT_REMEDY)
    if isinstance(job, PreprocessJob) and _is_local(job.out):
        _require_folder(f"{prefix}out", job.out)
    if isinstance(job, PretrainJob) and not _is_below(job.init, made):
        _require_start(job)


def require_startable(config: PretrainJob, attended: bool) -> None:
    """Checks what a run needs at its start: batches that its data can fill, and weights of its own architecture.

    Args:
        config: the run.
        attended: whether its ranks start on this machine. Elsewhere nothing is checked if the run waits for another
            job, or if its shards cannot be read from here.

    Raises:
        ConfigError: there are no shards or devices, batches cannot be filled, or `init` is of another architecture.
    """
    if config.engine.name == "federated":
        started = getattr(config.launcher, "devices", 0)
        if (started or config.engine.federated.transport == "ray") and config.launcher.sees_inputs:
            from launch.federation.ray_devices import device_folders

            device_folders(config.data.shards, max(1, started))
        _require_start(config)
    elif attended or _sees_shards(config):
        _require_shards(config)
        _require_start(config)


def _inputs(job: PretrainJob | ProgramJob) -> Iterator[tuple[str, str]]:
    """Yields field and path of each file or folder that is not a checkpoint."""
    if isinstance(job, PreprocessJob):
        corpus = job.corpus
        if not (isinstance(corpus, LibriSpeechCorpus) and corpus.download):
            yield "corpus.path", corpus.path
        if isinstance(corpus, ManifestCorpus) and corpus.labels:
            yield "corpus.labels", corpus.labels
    elif isinstance(job, TargetsJob):
        yield from (("shards", path) for path in job.shards)
        if job.kmeans:
            yield "kmeans", job.kmeans
    elif isinstance(job, EvaluateJob):
        from pretrain.evaluate.config import task_names
        from pretrain.evaluate.task_data import inputs

        yield from ((f"data.{task}", path) for task, path in inputs(job).items())
        if "asr" in task_names(job):
            yield from ((f"asr.{name}", path) for name, path in (("lm", job.asr.lm), ("words", job.asr.words)) if path)
    elif isinstance(job, PretrainJob):
        if job.engine.name != "federated":  # the audio is on the devices
            yield from (("data.shards", path) for path in job.data.shards if job.data.reader == "plan")
            augment = job.data.augment
            for name, path in (("noise", augment.noise), ("rir", augment.rir)):
                if path:
                    yield f"data.augment.{name}", path
        yield from (("data.valid", path) for path in job.data.valid)
        if job.init and not steps_done(metadata.folder_of(job)):
            yield "init", job.init
        data = job.data
        for field, folders in (
            ("targets", data.targets),
            ("valid_targets", data.valid_targets),
            ("tokens", data.tokens),
        ):
            yield from ((f"data.{field}.{name}", path) for name, path in folders.items())
        for name, head in job.heads.items():
            yield from ((f"heads.{name}.{field}", path) for field, path in head.input_files.items())


def _alignments(job: PretrainJob | ProgramJob) -> Iterator[str]:
    """Yields the tables of frame labels that an evaluation reads."""
    if isinstance(job, EvaluateJob):
        from pretrain.evaluate.task_data import alignments

        yield from alignments(job)


def _checkpoints(job: PretrainJob | ProgramJob) -> Iterator[tuple[str, str]]:
    """Yields field and path of each checkpoint whose layers are used."""
    if isinstance(job, TargetsJob):
        from pretrain.interop.fingerprint import COMPUTED

        if job.features not in COMPUTED:
            yield "features", job.features
    elif isinstance(job, EvaluateJob) and not job.follow:  # which may start before the first checkpoint
        from pretrain.evaluate.config import items

        yield from (("checkpoint", path) for path in items(job.checkpoint))
    elif isinstance(job, PretrainJob) and job.objective.teacher_run:
        yield "objective.teacher", job.objective.teacher_run


def _require_path(field: str, path: str, remedy: str) -> None:
    """Raises ConfigError if no file or folder is at a local path or matches it as a pattern."""
    place = Path(path).expanduser()
    if not place.exists() and not (WILDCARDS & set(path) and FileStore(path.rstrip("/")).matching_folders("_done")):
        raise ConfigError(f"{field}={path}: there is no such file or folder; {remedy}")


def _require_folder(field: str, path: str) -> None:
    """Raises ConfigError where a file is at a path that a folder must have, or at one above it."""
    place = Path(path).expanduser().absolute()
    for part in (place, *place.parents):
        if part.is_file():
            raise ConfigError(f"{field}={path}: {part} is a file; name a new folder, or one of earlier shards")


def _is_local(path: str) -> bool:
    return "://" not in path


def _is_below(path: str, folders: Sequence[Path]) -> bool:
    place = Path(path).expanduser().absolute()
    return any(place.is_relative_to(folder.expanduser().absolute()) for folder in folders)


def _sees_shards(config: PretrainJob) -> bool:
    """Returns whether the shards are on file systems of this machine, and finished."""
    if not config.launcher.sees_inputs or config.data.reader != "plan" or not all(map(_is_local, config.data.shards)):
        return False
    try:
        return bool(done_records(config.data.shards, config.data.tars))
    except (ValueError, OSError):
        return False


def _require_shards(config: PretrainJob) -> None:
    """Raises ConfigError if there are no shards or batches cannot be filled, ValueError if a record is damaged."""
    from data_pipeline.sampling.constraints import BatchConstraints

    BatchConstraints.of(config.data)
    if config.data.reader == "webdataset":
        from data_pipeline.loader.tar_urls import shard_urls

        shard_urls(config.data.shards)
        return
    try:
        records = done_records(config.data.shards, config.data.tars)
    except ConfigError as error:
        raise ConfigError(f"data.shards={', '.join(config.data.shards)}: {error}") from None
    some = _part(records)
    try:
        _require_plan(config, some)
    except ConfigError:
        if len(some) == len(records):
            raise
        _require_plan(config, records)


def _part(records: Sequence[DoneRecord]) -> Sequence[DoneRecord]:
    """Returns evenly spaced shards of about PLANNED_HOURS; all where there are fewer hours."""
    parts = math.ceil(sum(record.samples for record in records) / (PLANNED_HOURS * 3600 * SAMPLE_RATE))
    return records[:: max(1, parts)]


def _require_plan(config: PretrainJob, records: Sequence[DoneRecord]) -> None:
    """Raises ConfigError if the steps cannot be planned; bad shards are left to the ranks, which may skip them."""
    from data_pipeline.loader.reader import open_reader

    try:
        open_reader(config.data, config.seed, rank=0, world=1, records=records).close()
    except ConfigError:
        raise
    except (ValueError, OSError):
        return


def _require_start(config: PretrainJob) -> None:
    """Raises ConfigError if the weights of `init` are missing or of another architecture, before the first step."""
    if config.init and not steps_done(metadata.folder_of(config)):
        if _is_local(config.init):
            _require_path("init", config.init, "give a run folder, a checkpoint or a Hugging Face folder")
        from pretrain.interop.init_weights import require_same_architecture

        require_same_architecture(config)
