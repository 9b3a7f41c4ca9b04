"""auricle export: a run as a Hugging Face model folder."""

from __future__ import annotations

import argparse
from pathlib import Path


def run(arguments: list[str]) -> int:
    """Exit code 0 once the folder is written; ConfigError for what cannot be exported."""
    parser = argparse.ArgumentParser("auricle export", description="export a run as a Hugging Face model folder")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    given = parser.parse_args(arguments)

    from pretrain.export.hugging_face import TOLERANCE, export, load_run

    error = export(*load_run(given.run), given.out)
    print(f"{given.out}: features of the loaded copy differ by {error:.1e} (allowed: {TOLERANCE:.0e})")
    return 0
