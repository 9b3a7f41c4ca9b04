"""Converts raw audio to shards."""

from __future__ import annotations

import hashlib
import shlex

from data_pipeline.preprocess.config import PreprocessConfig
from launch.cli.tables import show_rows
from launch.config import LocalConfig, PreprocessJob

CONFIG = PreprocessConfig


def work(config: PreprocessConfig) -> None:
    """Writes the missing shards. Raises OSError if one could not be written."""
    from data_pipeline.preprocess.job import preprocess

    summary = preprocess(config)
    show_rows(summary.rows())
    for line in next_commands(config):  # never wrapped, since users copy them
        print(f"next  {line}")
    if summary.problem:
        raise OSError(summary.problem)


def next_commands(config: PreprocessConfig) -> list[str]:
    """Returns commands that go on with the shards, or with those for training of a split."""
    from data_pipeline.preprocess.work_plan import set_roots

    shards = shlex.quote(set_roots(config)[0])
    return [f"auricle shards stats {shards}", f"auricle pretrain +experiment=best_rq_tiny data.shards={shards}"]


def made_from(config: PreprocessConfig) -> dict[str, str]:
    """Returns {}: the data set itself records which recordings it contains."""
    return {}


def made(config: PreprocessConfig) -> dict[str, str]:
    """Returns the fingerprint of the data set if it covers the whole corpus and all checksums match; otherwise {}."""
    from data_pipeline.preprocess.job import plan_units
    from data_pipeline.preprocess.verify import verify
    from data_pipeline.preprocess.work_plan import set_roots
    from data_pipeline.shards.records import finished_units

    forecast = plan_units(config)
    roots = [root for root in set_roots(config) if finished_units(root)]  # a split without speakers has no folder
    if forecast.units_done < forecast.units or any(fault for root in roots for fault in verify(root, decode=False)):
        return {}
    return {root: hashlib.sha256(b"".join(r.to_json() for r in finished_units(root))).hexdigest() for root in roots}


def preview(config: PreprocessJob) -> None:
    """Prints the work plan of a job on this machine."""
    if isinstance(config.launcher, LocalConfig):
        from data_pipeline.preprocess.job import plan_units

        show_rows(plan_units(config).rows())
