"""Weights to start from: a Hugging Face folder, or another run."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.schema import ConfigError
from pretrain.export.hugging_face import load_hugging_face, load_run
from pretrain.types import SpeechModel


def load_initial(model: SpeechModel, path: str) -> None:
    """Fills `model` (front end and encoder) from `path`. Raises ConfigError where it does not fit.

    The objective starts anew; an EMA teacher has to be attached again afterwards.
    """
    folder = Path(path).expanduser()
    if (folder / "checkpoints").is_dir():
        theirs = load_run(folder)[1].model.state_dict()
        ours = model.state_dict()
        wrong = [name for name in ours if name not in theirs or theirs[name].shape != ours[name].shape]
        if wrong:
            raise ConfigError(f"init={path}: {wrong[0]} and {len(wrong) - 1} more weights are not there in this shape")
        left = [name for name in theirs if name not in ours]
        if left:
            raise ConfigError(
                f"init={path}: this model has no place for {left[0]} and {len(left) - 1} more of its weights"
            )
        model.load_state_dict({name: theirs[name] for name in ours})
        return
    load_hugging_face(model, folder)
