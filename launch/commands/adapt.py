"""auricle adapt: adapts a checkpoint to a few labelled clips."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from launch.cli.parser import Parser
from launch.exit_codes import ExitCode
from pretrain.adaptation.config import Tune


def run(arguments: list[str]) -> int:
    """Writes the adapted run, and prints the classes of further recordings; returns the run's exit code."""
    parser = Parser(
        "auricle adapt",
        description="adapts a checkpoint to the classes of a folder of a few labelled clips, FOLDER/CLASS/CLIP.wav",
    )
    parser.add_argument("folder", type=Path, help="a subfolder with clips for each class")
    parser.add_argument("checkpoint", help="run, checkpoint or Hugging Face folder to start from")
    parser.add_argument("--out", type=Path, help="run folder to write (runs/adapt_ and the folder's name)")
    parser.add_argument("--tune", choices=get_args(Tune), default="lora", help="what learns (default: lora)")
    parser.add_argument("--steps", type=int, default=60, help="updates (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="keys every random draw (default: 0)")
    parser.add_argument("--files", nargs="*", default=[], help="recordings to classify with the adapted run")
    given = parser.parse_args(arguments)

    from launch.workflows import adapting

    out = given.out or Path("runs") / f"adapt_{given.folder.resolve().name}"
    code = adapting.adapt(given.folder, given.checkpoint, out, given.tune, given.steps, given.seed)
    if code == ExitCode.DONE:
        for file, found in adapting.classify(out, given.files):
            print(f"{file}\t{found.label}\t{found.probability:.3f}")
    return code
