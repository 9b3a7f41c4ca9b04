"""auricle replay: repeats a failed update on its saved batch, and reports where it fails."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.core.schema import ConfigError, load
from launch.cli.parser import Parser
from launch.exit_codes import ExitCode
from launch.runs.summary import find_run
from pretrain.checkpointing.locate import saved_steps

if TYPE_CHECKING:
    from pretrain.config import Config
    from pretrain.train_module import TrainModule


COLUMNS = ("segments", "seconds", "peak", "loss", "gradient norm", "largest gradients", "first not finite")


def run(arguments: list[str]) -> int:
    """Prints the table; returns 0. Raises ConfigError if no such batch was saved."""
    parser = Parser("auricle replay", description="repeats a failed update on its saved batch")
    parser.add_argument("run", help="run folder, or a run's name below runs/")
    parser.add_argument("step", type=int, nargs="?", help="updates done before it (default: the last one saved)")
    given = parser.parse_args(arguments)
    folder = find_run(given.run)
    kept = sorted(found for found in (folder / "health").glob("step_*") if found.name[5:].isdecimal())
    if not kept:
        raise ConfigError(f"{folder}: no batch was saved (health/step_N), since no update of the run failed")
    names = [found.name for found in kept]
    wanted = kept[-1].name if given.step is None else f"step_{given.step:08d}"
    if wanted not in names:
        raise ConfigError(f"{folder}: no batch of step {given.step} was saved; there are: {', '.join(names)}")
    show(folder, folder / "health" / wanted)
    return ExitCode.DONE


def show(run_folder: Path, folder: Path) -> None:
    """Prints loss and gradients of each micro-batch, with the weights of the newest checkpoint before the update."""
    from launch.cli.tables import show as show_table
    from launch.cli.tables import table
    from pretrain.checkpointing.run_folder import read_config
    from pretrain.config import Config
    from pretrain.monitoring.batch_dump import load_batches, replay

    config = load(Config, read_config(run_folder))
    ctx, batches, why = load_batches(folder)
    module, source = model_at(config, run_folder, ctx.step)
    print(f"{why}; {len(batches)} micro-batches, weights of {source}")
    rows = []
    for result in replay(module, ctx, batches):
        largest = ", ".join(f"{name} {norm:.2g}" for name, norm in result.largest[:3])
        keys = ", ".join(result.keys[:3]) + (" …" if len(result.keys) > 3 else "")
        figures = (f"{result.seconds:.1f}", f"{result.peak:.3g}", f"{result.loss:.4g}", f"{result.grad_norm:.3g}")
        rows.append((keys, *figures, largest, result.first_not_finite or "–"))
    show_table(table(COLUMNS, rows))


def model_at(config: Config, run_folder: Path, step: int) -> tuple[TrainModule, str]:
    """Returns the model with the newest weights of at most `step` updates, and the name of their checkpoint."""
    from pretrain.checkpointing.weights import MODEL, fill, read_weights
    from pretrain.interop.init_weights import load_initial
    from pretrain.train_module import build_model

    module = build_model(config)
    module.anticipate_int8(config.engine.fake_int8, config.train.steps)
    before = [path for saved, path in saved_steps(run_folder / "checkpoints").items() if saved <= step]
    if before:
        fill(module, read_weights(before[-1]), str(before[-1] / MODEL))
        return module, before[-1].name
    if config.init:
        load_initial(config, module)
    return module, f"step 0{f' (from {config.init})' if config.init else ''}"
