"""Reads a stored checkpoint: its state.json, its tensors, and whether it is intact."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.core.atomic_files import sha256_of
from data_pipeline.core.json_object import read_object
from pretrain.checkpointing.locate import remedy
from pretrain.checkpointing.resume import is_prolongation

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors")
"""The tensor files of a checkpoint."""


def read_state(folder: Path) -> dict[str, Any]:
    """Reads state.json of a checkpoint; all other code reads it through this function.

    Args:
        folder: a checkpoint, such as RUN/checkpoints/step_00000100.

    Returns:
        Its fields, each of the right form: format, step (updates), cursor, health, loss_scale, prolonged, config
        (nested plain values) and sha256 (by file name); base (of tuned weights) may be missing.

    Raises:
        ValueError: the file is missing, has another format version, or a value in it has the wrong form; the message
            has the remedy.
    """
    try:
        return _read_state(folder)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy(folder.parent)}") from error.__cause__


def _read_state(folder: Path) -> dict[str, Any]:
    file = folder / "state.json"
    try:
        values = read_object(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: not a complete auricle checkpoint ({file.name}: {error})") from error
    if values.get("format") != FORMAT:
        found = str(values.get("format"))[:40]
        raise ValueError(f"{folder}: checkpoint format {found!r}, this version reads {FORMAT}")
    for name, wanted, is_right in _STATE:
        if not is_right(values.get(name)):
            raise ValueError(f"{file}: {name} must be {wanted}, and is {json.dumps(values.get(name))[:40]}")
    if values.get("base") is None and any(name not in values["sha256"] for name in FILES):
        raise ValueError(f"{file}: sha256 must have the checksums of {' and '.join(FILES)}")
    return values


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_cursor(value: Any) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, dict)
        and value.keys() == {"plan_hash", "epoch", "step"}
        and isinstance(value["plan_hash"], str)
        and _is_count(value["epoch"])
        and _is_count(value["step"])
    )


def _is_digests(value: Any) -> bool:
    return isinstance(value, dict) and FILES[0] in value and all(isinstance(digest, str) for digest in value.values())


def _is_base(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict)
        and value.keys() == {"checkpoint", "sha256"}
        and all(isinstance(part, str) for part in value.values())
    )


def _is_optional_object(value: Any) -> bool:
    return value is None or isinstance(value, dict)


_STATE: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("step", "a number of steps, 0 or more", _is_count),
    ("cursor", "null, or an object with plan_hash, epoch and step", _is_cursor),
    ("config", "an object", lambda value: isinstance(value, dict)),
    ("sha256", f"an object with the checksums of {' and '.join(FILES)}", _is_digests),
    ("health", "an object", _is_optional_object),
    ("loss_scale", "an object", _is_optional_object),
    ("tokens", "an object", _is_optional_object),
    ("engine", "an object", _is_optional_object),
    ("base", "null, or an object with checkpoint and sha256", _is_base),
    ("prolonged", "null, or an object with step and rate", is_prolongation),
)
"""Fields of state.json: name, description of the valid form, check."""


def damage(folder: Path) -> str:
    """Reads a whole checkpoint and compares checksums; returns a description of the damage, "" if it is intact."""
    try:
        digests = _read_state(folder)["sha256"]
        for name in FILES:
            with safe_open(folder / name, framework="pt"):
                pass
            if digests[name] != sha256_of(folder / name):
                return f"checksum mismatch in {folder / name}"
    except (OSError, ValueError, SafetensorError) as error:
        return f"{folder} cannot be read ({error})"
    return ""


class Tensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by the engine's names, each read on access."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        for kind in ("model", "optimizer"):
            path = folder / f"{kind}.safetensors"
            if not path.exists():
                raise KeyError(f"{path.name} is missing")
            self._files[kind] = safe_open(path, framework="pt")

    def __getitem__(self, name: str) -> Tensor:
        kind, _, rest = name.partition("/")
        file, key = (self._files["model"], rest) if kind == "model" else (self._files["optimizer"], name)
        tensor: Tensor = file.get_tensor(key)
        return tensor

    def __iter__(self) -> Iterator[str]:
        yield from (f"model/{key}" for key in self._files["model"].keys())  # noqa: SIM118
        yield from self._files["optimizer"].keys()

    def __len__(self) -> int:
        return sum(1 for _ in self)
