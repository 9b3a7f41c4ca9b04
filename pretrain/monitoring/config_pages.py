"""Pages of TensorBoard on a run's config: its differences from the defaults, and from runs beside it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from data_pipeline.core.json_object import read_object
from data_pipeline.core.schema import ABSENT, diff, dump, flatten, load
from data_pipeline.core.text import markdown_block, markdown_text, visible
from pretrain import registry
from pretrain.config import Config

NOT_COMPARED = ("name", "runs", "device", "data.shards", "data.valid", "data.cache", "data.keys_log", "launcher")
"""Fields that say where a run is, not what it does."""
MOST_SIBLINGS = 200
"""Run folders beside a run that it is compared with, the newest ones."""


def config_page(config: Config) -> str:
    """Returns the text page of a run: a table of the fields that are not at their default, then all fields."""
    rows = [
        f"| {markdown_text(path)} | {markdown_text(_text(default))} | **{markdown_text(_text(value))}** |"
        for path, default, value in differences(config)
    ]
    head = ["| field | default | this run |", "|---|---|---|"]
    table = "\n".join([*head, *rows]) if rows else "Every field has its default."
    whole = markdown_block(json.dumps(dump(config), indent=2), "json")
    return f"## Differences from the defaults\n\n{table}\n\n## All fields\n\n{whole}"


def differences(config: Config) -> list[tuple[str, Any, Any]]:
    """Returns (path, default, value) of each field that is not at the default of its plug-in or section."""
    values = dump(config)
    plain: dict[str, Any] = {"data": {"shards": values["data"]["shards"]}}
    for section in ("frontend", "encoder", "objective"):
        plain[section] = {"name": values[section]["name"]}
    plain["heads"] = {name: _required(head) for name, head in values["heads"].items()}
    return diff(dump(load(Config, plain)), values)


def compared_fields(config: Config, run_folder: Path) -> dict[str, bool | int | float | str]:
    """Returns the fields for the page that compares runs: those that differ from the defaults or from runs beside it.

    Args:
        config: the run's config.
        run_folder: its folder; other runs are in the folder that holds it.
    """
    values = flatten(dump(config))
    chosen = {path for path, _, _ in differences(config)}
    found = sorted(run_folder.parent.glob("*/config.json"), key=lambda file: -file.stat().st_mtime)
    for file in [file for file in found if file.parent != run_folder][:MOST_SIBLINGS]:
        try:
            other = dump(load(Config, read_object(file)))
        except (OSError, ValueError):  # not a run of this version
            continue
        chosen |= {path for path, _, _ in diff(other, dump(config))}
    chosen = {path for path in chosen if path in values and not path.startswith(NOT_COMPARED)}
    return {path: _scalar(values[path]) for path in sorted({*chosen, "objective.name"})}


def _text(value: Any) -> str:
    if value is ABSENT:
        return "–"
    return value if isinstance(value, str) else json.dumps(value)


def _scalar(value: Any) -> bool | int | float | str:
    """Returns a number as it is, all else as text."""
    return value if isinstance(value, bool | int | float) else visible(_text(value))


def _required(head: dict[str, Any]) -> dict[str, Any]:
    """Returns the name of a head and its fields that have no default."""
    fields = dataclasses.fields(registry.config_type("heads", head["name"]))
    needed = [field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING]
    return {name: head[name] for name in ["name", *needed]}
