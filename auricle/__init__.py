"""auricle in Python: `load_encoder`, `load_run`, `open_dataset`; and the `auricle` console script.

Both check that Python finds auricle's own packages. `import auricle` is light: torch is imported by the first call.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from auricle.packages import PACKAGES, explain, foreign

if TYPE_CHECKING:
    from data_pipeline.loader.reader import PlanReader
    from pretrain.checkpointing.weights import LoadedCheckpoint
    from pretrain.evaluate.frozen_encoders import FrozenEncoder

__all__ = ["load_encoder", "load_run", "open_dataset"]


def load_encoder(run_or_folder: str | Path, device: str = "cpu", plugins: Sequence[str | Path] = ()) -> FrozenEncoder:
    """Loads a pretrained encoder for inference.

    Args:
        run_or_folder: a run folder, a checkpoint, or a Hugging Face folder.
        device: device of the weights, such as "cpu" or "cuda".
        plugins: folders with plug-ins that the run uses; their code is imported.

    Returns:
        The encoder; its `encode` takes (T,) audio at 16 kHz and returns all layers, (L, F, D).

    Raises:
        ConfigError: there is no such encoder, or it needs plug-ins that are not available.
        ValueError: the checkpoint is damaged.
    """
    _prepare(plugins)
    from pretrain.evaluate.frozen_encoders import open_encoder

    return open_encoder(str(run_or_folder), device)


def load_run(run: str | Path, plugins: Sequence[str | Path] = ()) -> LoadedCheckpoint:
    """Loads the whole model of a run with its config, on the CPU.

    Args:
        run: a run folder, of which the newest checkpoint is taken, or a checkpoint.
        plugins: folders with plug-ins that the run uses; their code is imported.

    Returns:
        (module, config, step): front end, encoder, objective and heads; the typed config; the number of updates.

    Raises:
        ConfigError: there is no checkpoint, or it needs plug-ins that are not available.
        ValueError: the checkpoint is damaged.
    """
    _prepare(plugins)
    from pretrain.interop.hf_export import load_run as load

    return load(Path(run).expanduser())


def open_dataset(shards: str | Path | Sequence[str | Path], seed: int = 0, **settings: Any) -> PlanReader:
    """Opens shards for reading in the batches and the order of a training.

    Args:
        shards: a folder of shards, several, or a pattern such as "shards/*".
        seed: seed of the order.
        settings: other fields of the `data` section, such as `batch_seconds=60`, `micro_batches=1`, `labels=["text"]`.

    Returns:
        The reader. Each item of its `steps()` has `batches`, each with `wave_BT` (B, T) at 16 kHz and `lengths_B`.

    Raises:
        ConfigError: a field is wrong.
        ValueError: there are no complete shards.
    """
    _prepare()
    from data_pipeline.core.schema import load
    from data_pipeline.loader.reader import open_reader
    from data_pipeline.sampling.config import DataConfig

    places = [str(place) for place in ([shards] if isinstance(shards, (str, Path)) else shards)]
    return open_reader(load(DataConfig, {"shards": places, **settings}), seed, rank=0, world=1)


def _prepare(plugins: Sequence[str | Path] = ()) -> None:
    """Makes plug-ins available. Raises ImportError where other packages hide those of auricle."""
    for name in PACKAGES:
        if found := foreign(name):
            raise ImportError(explain(name, found))
    if plugins:
        from pretrain import registry

        registry.allow(plugins)


def main() -> int:
    """Runs the command line of this process; returns its exit code, 1 where other packages hide those of auricle."""
    for name in PACKAGES:
        if found := foreign(name):
            print(explain(name, found), file=sys.stderr)
            return 1
    from launch.main import main as run

    return run()
