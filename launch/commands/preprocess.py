"""auricle preprocess: raw audio in, shards out."""

from __future__ import annotations

import hashlib

from data_pipeline.preprocess.config import PreprocessConfig
from launch.cli.tables import show_rows
from launch.config import LocalConfig, PreprocessJob
from launch.workflows import submit

KIND = PreprocessConfig


def run(arguments: list[str]) -> int:
    """Exit code 0 where all is written (or the job is queued), 1 where something could not be, 2 for a bad config."""
    return submit.run("preprocess", PreprocessJob, arguments, _forecast)


def _forecast(config: PreprocessJob) -> None:
    """What a job on this machine would do."""
    if isinstance(config.launcher, LocalConfig):
        from data_pipeline.preprocess.job import plan_units

        show_rows(plan_units(config).rows())


def work(config: PreprocessConfig) -> None:
    """Writes what is missing. Raises OSError where something could not be written."""
    from data_pipeline.preprocess.job import preprocess

    summary = preprocess(config)
    show_rows(summary.rows())
    if summary.problem:
        raise OSError(summary.problem)


def made_from(config: PreprocessConfig) -> dict[str, str]:
    """Nothing: which recordings are in, the plan in the data set knows."""
    return {}


def made(config: PreprocessConfig) -> dict[str, str]:
    """The data set, where nothing of the corpus is missing and every byte is as it was written."""
    from data_pipeline.preprocess.job import plan_units
    from data_pipeline.preprocess.verify import verify
    from data_pipeline.preprocess.work_plan import set_roots
    from data_pipeline.shards.records import finished_units

    forecast, roots = plan_units(config), set_roots(config)
    if forecast.units_done < forecast.units or any(fault for root in roots for fault in verify(root, decode=False)):
        return {}
    return {root: hashlib.sha256(b"".join(r.to_json() for r in finished_units(root))).hexdigest() for root in roots}
