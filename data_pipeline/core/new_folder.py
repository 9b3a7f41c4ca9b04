"""Writes folders that are complete or do not exist."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.core.schema import ConfigError


@contextlib.contextmanager
def new_folder(folder: Path, purpose: str = "to export to") -> Iterator[Path]:
    """Yields an empty folder that is moved to `folder` at the end of the block; after an exception nothing is left.

    Args:
        folder: must not exist; missing parents are made.
        purpose: ends the error message "… exists; give a new folder …".

    Raises:
        ConfigError: `folder` exists.
        OSError: it cannot be written.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists; give a new folder {purpose}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "new"
        made.mkdir()
        yield made
        shutil.move(str(made), folder)
