"""auricle finetune: fine-tunes a checkpoint for speech recognition."""

from __future__ import annotations

from launch.cli import request
from launch.config import FinetuneJob
from launch.exit_codes import ExitCode
from launch.workflows import finetuning
from launch.workflows.submit import SWITCHES


def run(arguments: list[str]) -> int:
    """Trains and evaluates; returns the exit code of the training run, 0 where it is done or queued."""
    own, training = finetuning.split(arguments)
    given = request.read("finetune", FinetuneJob, own, switches=SWITCHES)
    return ExitCode.DONE if given is None else finetuning.run(given.config, training, given.switches)
