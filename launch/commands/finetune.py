"""auricle finetune: fine-tunes a checkpoint for speech recognition or classes, whole or by a few weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from launch.cli import request
from launch.config import FinetuneJob
from launch.exit_codes import ExitCode
from launch.workflows.submit import SWITCHES
from pretrain.config import Config


def run(arguments: list[str]) -> int:
    """Trains and evaluates; returns the exit code of the training run, 0 where it is done or queued."""
    own, training = split(arguments)
    given = request.read("finetune", FinetuneJob, own, switches=SWITCHES)
    if given is None:
        return ExitCode.DONE
    from launch.workflows import finetuning

    return finetuning.run(given.config, training, given.switches)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns a command line's own arguments, and those that are fields of the training run."""
    own = {field.name for field in dataclasses.fields(FinetuneJob)}
    training = {field.name for field in dataclasses.fields(Config)}

    def is_training(argument: str) -> bool:
        name, dot, _ = argument.lstrip("+").partition("=")[0].partition(".")
        return name in training and (name not in own or (bool(dot) and name != "launcher"))

    return [a for a in arguments if not is_training(a)], [a for a in arguments if is_training(a)]
