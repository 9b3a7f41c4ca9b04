"""Runs one preprocessing job as its own process: `python -m tests.support.faults.preprocess_job CONFIG.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from data_pipeline.core.schema import load
from data_pipeline.preprocess.config import PreprocessConfig
from data_pipeline.preprocess.job import preprocess


def main() -> int:
    """Returns the job's exit code; its summary goes to standard output."""
    config = load(PreprocessConfig, json.loads(Path(sys.argv[1]).read_text()))
    try:
        summary = preprocess(config, progress=False)
    except OSError as error:
        print(error, file=sys.stderr)
        return 3
    print(json.dumps({"problem": summary.problem, "units_done": summary.units_done, "files": summary.files}))
    return summary.exit_code


if __name__ == "__main__":
    sys.exit(main())
