"""Finds the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path


def steps_done(folder: Path) -> int:
    """Steps of the newest checkpoint."""
    latest = folder / "checkpoints" / "latest"
    name = latest.read_text(encoding="utf-8").strip() if latest.exists() else ""
    return int(name.rpartition("_")[2]) if name else 0


def find_checkpoint(given: str) -> Path:
    """The checkpoint folder meant by a run folder, a checkpoints folder or a checkpoint. Raises ValueError."""
    path = Path(given).expanduser()
    for folder in (path / "checkpoints", path):
        latest = folder / "latest"
        if latest.is_file():
            return folder / latest.read_text(encoding="utf-8").strip()
    if (path / "state.json").is_file() or (path / "config.json").is_file():
        return path
    raise ValueError(f"checkpoint={given}: no run folder, no checkpoint (state.json) and no Hugging Face folder there")
