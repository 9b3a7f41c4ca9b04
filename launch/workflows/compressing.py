"""auricle compress: writes a run with fewer blocks or narrower ones, which trains on like any other."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core.atomic_files import sha256_of, write_atomically, write_json
from data_pipeline.core.new_folder import new_folder
from data_pipeline.core.schema import ConfigError, diff, dump
from launch.cli.compose import to_yaml
from launch.runs.metadata import write_surroundings
from launch.runs.summary import find_run
from pretrain.checkpointing.initial import write_initial
from pretrain.checkpointing.locate import find_checkpoint
from pretrain.checkpointing.token_sets import saved_tokens
from pretrain.checkpointing.weights import MODEL, LoadedCheckpoint, load_checkpoint, merged
from pretrain.compression import cut
from pretrain.config import Config


@dataclass(frozen=True)
class Compressed:
    """A smaller run.

    before, after: weights of front end and encoder.  overrides: the fields of its model that changed, as `init=`
    needs them.  new: weights with random values.
    """

    before: int
    after: int
    overrides: str
    new: tuple[str, ...]


def compress(run: str, out: Path, blocks: int | None = None, widths: Path | None = None) -> Compressed:
    """Cuts a run to a smaller one.

    Args:
        run: a run folder, a checkpoint, or a run's name below runs/.
        out: run folder to write; must not exist.
        blocks: blocks to keep, counted from the first.
        widths: JSON file with [[heads, ffn_dim], …], a pair per block. Without blocks and widths: removes what
            structured pruning has closed.

    Raises:
        ConfigError: the run cannot be cut this way, or `out` exists.
    """
    with new_folder(out, "for the smaller run") as folder:
        path = Path(run).expanduser()
        checkpoint = find_checkpoint(str(path if path.exists() else find_run(run)))
        if not (checkpoint / "state.json").is_file():
            raise ConfigError(f"{checkpoint}: only runs of auricle can be cut; start one with init={checkpoint}")
        found = merged(load_checkpoint(checkpoint))
        if found.config.tune.name in ("prompt", "adapter"):
            raise ConfigError(
                f"tune.name={found.config.tune.name}: such a run cannot be cut; cut its base, then tune it"
            )
        made = _cut(found, blocks, widths)
        config = cut.renamed(made.config, out.name, str(out.parent))
        before, after = (sum(w.numel() for w in m.model.parameters()) for m in (found.module, made.module))
        (folder / "logs").mkdir()
        write_json(folder / "config.json", dump(config))
        write_atomically(folder / "config.yaml", to_yaml(dump(config)))
        write_surroundings(folder, {})
        origin = {"checkpoint": str(checkpoint), "sha256": sha256_of(checkpoint / MODEL), "step": found.step}
        write_json(folder / "compressed.json", {"from": origin, "weights": [before, after], "new": made.made})
        write_initial(folder, made.module, config, saved_tokens(checkpoint))
    return Compressed(before, after, changed_fields(found.config, out), tuple(made.made))


def changed_fields(config: Config, smaller: Path) -> str:
    """Returns the fields of front end and encoder in which a smaller run differs, as overrides of `auricle pretrain`.

    Args:
        config: that of the run which was cut.
        smaller: the folder of the smaller run.
    """
    before, after = dump(config), json.loads((smaller / "config.json").read_text(encoding="utf-8"))
    return " ".join(
        f"{part}.{path}={json.dumps(value, separators=(',', ':'))}"
        for part in ("frontend", "encoder")
        for path, _, value in diff(before[part], after[part])
    )


def _cut(found: LoadedCheckpoint, blocks: int | None, widths: Path | None) -> cut.CutModel:
    if blocks is not None and widths is not None:
        raise ConfigError("--blocks and --widths: give one of them; --widths cuts a run that --blocks wrote further")
    if blocks is not None:
        return cut.cut_blocks(found, blocks)
    if widths is None:
        return cut.cut_pruned(found)
    try:
        pairs = json.loads(widths.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--widths {widths}: cannot be read as JSON ({error})") from None
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise ConfigError(f"--widths {widths}: must hold [[heads, ffn_dim], …], two whole numbers for each block")
    if found.module.objective.space() is not None:
        return cut.cut_subnet(found, tuple((heads, ffn_dim) for heads, ffn_dim in pairs))
    return cut.cut_widths(found, pairs)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(part) is int for part in value)
