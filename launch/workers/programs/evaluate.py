"""Evaluates frozen encoders with probes and with measures that need no labels, next to baselines."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pretrain.evaluate.config import EvaluateConfig

CONFIG = EvaluateConfig


def work(config: EvaluateConfig) -> None:
    """Evaluates, prints the table, and writes it to `config.out` if that is set."""
    if config.follow:
        from launch.workers.programs.following import follow

        follow(config)
        return
    from launch.cli.tables import show
    from pretrain.evaluate import report
    from pretrain.evaluate.evaluator import evaluate

    measured = evaluate(config)
    show(report.table(measured))
    if config.baselines:
        print(report.LEGEND)
    if config.out:
        report.write(measured, Path(config.out).expanduser())


def made_from(config: EvaluateConfig) -> dict[str, str]:
    """Returns fingerprints of the checkpoints' weights and of the audio manifest."""
    if config.follow:  # may start before the first checkpoint
        return {}
    from pretrain.evaluate.manifest import find_manifest
    from pretrain.interop.fingerprint import checkpoint_fingerprint

    listed = hashlib.sha256(find_manifest(config.manifest).read_bytes()).hexdigest()
    return {"manifest": listed, **checkpoint_fingerprint(config.checkpoint)}


def made(config: EvaluateConfig) -> dict[str, str]:
    """Returns the fingerprint of the results; without `out` no result is kept."""
    file = Path(config.out).expanduser() / "results.json"
    if not config.out or not file.is_file():
        return {}
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}


def preview(config: EvaluateConfig) -> None:
    """Prints nothing: the command contains all information."""
