"""Finds the user's speech for the demo, tests and benchmarks, in the folder that AURICLE_SPEECH names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from data_pipeline.core.schema import ConfigError

SPEECH_VARIABLE: Final = "AURICLE_SPEECH"
MANIFEST_NAME: Final = "manifest.tsv"


def speech_folder() -> Path | None:
    """Returns the folder of audio that AURICLE_SPEECH names, or None if the variable is unset or empty.

    Raises:
        ConfigError: the variable names something that is not a folder.
    """
    value = os.environ.get(SPEECH_VARIABLE, "")
    if not value:
        return None
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{SPEECH_VARIABLE}={value}: not a folder; name a folder of audio, or unset the variable")
    return folder


def speech_manifest() -> Path | None:
    """Returns manifest.tsv of that folder, or None if it does not exist.

    The manifest is tab-separated with a header line: path (relative to the folder), speaker, text, label, language,
    corpus, split. Evaluation, fine-tuning and the benchmarks of quality need it.
    """
    folder = speech_folder()
    manifest = folder / MANIFEST_NAME if folder else None
    return manifest if manifest and manifest.is_file() else None
