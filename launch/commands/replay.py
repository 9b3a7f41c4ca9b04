"""auricle replay: runs the kept batch of an update that went wrong again, and says where it breaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.core.schema import load
from launch.cli.parser import Parser

if TYPE_CHECKING:
    from pretrain.config import Config
    from pretrain.train_module import TrainModule


def run(arguments: list[str]) -> int:
    """Exit code 0 where the batch was run again. Raises ValueError where nothing was kept."""
    parser = Parser("auricle replay", description="the batch of an update that went wrong, run again")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("step", type=int, nargs="?", help="updates done before it (default: the last one kept)")
    given = parser.parse_args(arguments)
    kept = sorted((given.run / "health").glob("step_*"))
    if not kept:
        raise ValueError(f"{given.run}: no batch was kept there (RUN/health/step_N); nothing seems to have gone wrong")
    names = [folder.name for folder in kept]
    wanted = kept[-1].name if given.step is None else f"step_{given.step:08d}"
    if wanted not in names:
        raise ValueError(f"{given.run}: no batch of step {given.step} was kept; there are: {', '.join(names)}")
    show(given.run, given.run / "health" / wanted)
    return 0


def show(run_folder: Path, folder: Path) -> None:
    """Prints what each micro-batch does to the weights of the newest checkpoint before it."""
    from rich.table import Table

    from launch.cli.tables import show as show_table
    from pretrain.config import Config
    from pretrain.monitoring.batch_dump import load_batches, replay

    config = load(Config, json.loads((run_folder / "config.json").read_text(encoding="utf-8")))
    ctx, batches, why = load_batches(folder)
    module, whose = model_at(config, run_folder, ctx.step)
    print(f"{why}; {len(batches)} micro-batches, weights of {whose}")
    table = Table(
        "segments", "seconds", "peak", "loss", "gradient norm", "largest gradients", "first not finite", box=None
    )
    for result in replay(module, ctx, batches):
        largest = ", ".join(f"{name} {norm:.2g}" for name, norm in result.largest[:3])
        keys = ", ".join(result.keys[:3]) + (" …" if len(result.keys) > 3 else "")
        row = (f"{result.seconds:.1f}", f"{result.peak:.3g}", f"{result.loss:.4g}", f"{result.grad_norm:.3g}")
        table.add_row(keys, *row, largest, result.first_not_finite or "–")
    show_table(table)


def model_at(config: Config, run_folder: Path, step: int) -> tuple[TrainModule, str]:
    """The model with the newest weights of at most `step` updates, and whose they are."""
    from pretrain.checkpointing.locate import saved_steps
    from pretrain.checkpointing.weights import MODEL, fill, read_weights
    from pretrain.interop.init_weights import load_initial
    from pretrain.train_module import build_model

    module = build_model(config)
    before = [path for saved, path in saved_steps(run_folder / "checkpoints").items() if saved <= step]
    if before:
        fill(module, read_weights(before[-1]), str(before[-1] / MODEL))
        return module, before[-1].name
    if config.init:
        load_initial(config, module)
    return module, f"step 0{f', which are those of {config.init}' * bool(config.init)}"
