"""Evaluates frozen encoders with probes and with measures that need no labels, next to baselines."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pretrain.evaluate.config import EvaluateConfig

CONFIG = EvaluateConfig


def work(config: EvaluateConfig) -> None:
    """Evaluates, prints the table, and writes it to `config.out` if that is set."""
    if config.follow:
        from launch.workers.programs.following import follow_checkpoints

        follow_checkpoints(config)
        return
    from launch.cli.tables import show
    from pretrain.evaluate import page, report
    from pretrain.evaluate.config import items
    from pretrain.evaluate.evaluator import evaluate
    from pretrain.evaluate.rows import Detail

    details: list[Detail] = []
    measured = evaluate(config, details=details)
    show(report.table(measured))
    if config.baselines:
        print(report.LEGEND)
    if config.out:
        out = Path(config.out).expanduser()
        report.write(measured, out)
        curves = [curve for given in items(config.checkpoint) for curve in page.read_curves(Path(given).expanduser())]
        page.write_page(measured, details, curves, out / "report.html")


def made_from(config: EvaluateConfig) -> dict[str, str]:
    """Returns fingerprints of the checkpoints' weights and of the tasks' data."""
    if config.follow:  # may start before the first checkpoint
        return {}
    from pretrain.evaluate.task_data import data_fingerprint, inputs
    from pretrain.interop.fingerprint import checkpoint_fingerprint

    data = {f"data of {name}": data_fingerprint(Path(given).expanduser()) for name, given in inputs(config).items()}
    return {**data, **checkpoint_fingerprint(config.checkpoint)}


def made(config: EvaluateConfig) -> dict[str, str]:
    """Returns the fingerprint of the results; without `out` no result is kept."""
    file = Path(config.out).expanduser() / "results.json"
    if not config.out or not file.is_file():
        return {}
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}


def preview(config: EvaluateConfig) -> None:
    """Prints nothing: the command contains all information."""
