"""Reads Hugging Face model folders: config.json, preprocessor_config.json and safetensors weights.

Nothing in a folder is executed: pickles are never opened, and `auto_map`, which names Python files, is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.core.json_object import DamagedFileError, read_optional
from data_pipeline.core.schema import ConfigError

CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
DOWNLOAD = "download the whole model again"
CONVERT = (
    'python -c "import torch, safetensors.torch as s; s.save_file({{name: weight.clone() for name, weight in '
    "torch.load('{0}/pytorch_model.bin', weights_only=True).items()}}, '{0}/model.safetensors')\""
)


def read_config(folder: Path) -> dict[str, Any]:
    """Reads config.json, the architecture.

    Raises:
        ConfigError: the file is missing, or its model_type is not a string.
        DamagedFileError: it is not a JSON object.
    """
    values = read_optional(folder / CONFIG, DOWNLOAD)
    if values is None:
        raise ConfigError(f"{folder / CONFIG}, which describes the architecture, is missing; {DOWNLOAD}")
    if not isinstance(values.get("model_type"), str):
        raise ConfigError(
            f"{folder / CONFIG}: model_type must be a string such as wav2vec2, not {values.get('model_type')!r}; "
            f"{DOWNLOAD}"
        )
    return values


def read_processor(folder: Path) -> dict[str, Any]:
    """Reads preprocessor_config.json; returns {} if there is none.

    Raises:
        ConfigError: its do_normalize is neither true nor false.
        DamagedFileError: the file is not a JSON object.
    """
    values = read_optional(folder / PROCESSOR, DOWNLOAD) or {}
    if not isinstance(values.get("do_normalize", False), bool):
        raise ConfigError(f"{folder / PROCESSOR}: do_normalize must be true or false, not {values['do_normalize']!r}")
    return values


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a model's weights, one or several.

    Raises:
        ConfigError: there are no safetensors files, or the index names a file that is missing or outside of `folder`.
        DamagedFileError: the index is not a JSON object.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = read_optional(folder / INDEX, DOWNLOAD)
    if index is None and (folder / "pytorch_model.bin").is_file():
        raise ConfigError(
            f"{folder} has no {WEIGHTS}, and a pickle is never opened; if you trust it, convert it: "
            + CONVERT.format(folder)
        )
    if index is None:
        raise ConfigError(f"{folder} is not a run folder, and has no {WEIGHTS}; {DOWNLOAD}")
    placed = index.get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ConfigError(f"{folder / INDEX}: weight_map must be an object of weight names and files; {DOWNLOAD}")
    names = {name if isinstance(name, str) else repr(name) for name in placed.values()}
    for name in sorted(names):
        if not name.endswith(".safetensors") or name != Path(name).name or "\\" in name:
            raise ConfigError(
                f"{folder / INDEX}: weight_map names {name!r}; only *.safetensors files in this folder are read"
            )
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: {INDEX} names {name}, which is missing; download it as well")
    return [folder / name for name in sorted(names)]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Reads all weights of a folder: name -> tensor.

    Raises:
        ConfigError: as in `weight_files`, or two files contain the same weight.
        DamagedFileError: as in `weight_files`, or a file is damaged.
    """
    weights: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            found = load_file(file)
        except (OSError, SafetensorError) as error:
            raise DamagedFileError(f"{file}: cannot be read ({error}); {DOWNLOAD}") from None
        if twice := sorted(weights.keys() & found.keys()):
            raise ConfigError(f"{file}: contains {twice[0]}, which another file of {folder} contains too; {DOWNLOAD}")
        weights |= found
    return weights


def require_weights(missing: Mapping[str, str], folder: Path) -> None:
    """Raises ConfigError if weights of the encoder are unusable. `missing`: name of the weight -> problem."""
    if missing:
        name, problem = next(iter(sorted(missing.items())))
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ConfigError(f"{folder}: the encoder's weight {name} {problem}{more}; {DOWNLOAD}")
