"""Preprocesses small corpora in this process."""

from __future__ import annotations

from data_pipeline.core.storage import FileStore
from data_pipeline.corpora.discovery import discover
from data_pipeline.preprocess.config import PreprocessConfig
from data_pipeline.preprocess.unit_worker import process_unit
from data_pipeline.preprocess.work_plan import freeze_plan


def preprocess_here(config: PreprocessConfig) -> None:
    """Runs a preprocessing job in this process, without Ray."""
    store = FileStore(config.out)
    for unit in freeze_plan(store, discover(config.corpus).recordings, config).work_units():
        process_unit(unit, config)
