"""auricle compress: cuts a run to a smaller one, which trains on, exports and is evaluated like any other."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.core.atomic_files import sha256_of, write_atomically, write_json
from data_pipeline.core.schema import ConfigError, diff, dump
from launch.cli.compose import to_yaml
from launch.cli.parser import Parser
from launch.exit_codes import ExitCode

if TYPE_CHECKING:
    from pretrain.compression.cut import CutModel


def run(arguments: list[str]) -> int:
    """Writes the smaller run; returns 0. Raises ConfigError where the run cannot be cut this way."""
    parser = Parser(
        "auricle compress",
        description="cuts a run to a smaller run: the first blocks, narrower blocks, or what pruning left",
    )
    parser.add_argument("run", help="run folder, or a run's name below runs/")
    parser.add_argument("out", type=Path, help="run folder to write; must not exist")
    parser.add_argument("--blocks", type=int, help="number of blocks to keep, counted from the first")
    parser.add_argument(
        "--widths",
        type=Path,
        help="JSON file with [[heads, ffn_dim], …], a pair per block: keep the heads and inner channels with the "
        "largest weights. Without --blocks and --widths: remove what structured pruning has closed",
    )
    given = parser.parse_args(arguments)

    from launch.runs.metadata import write_surroundings
    from launch.runs.summary import find_run
    from pretrain.checkpointing.initial import write_initial
    from pretrain.checkpointing.locate import find_checkpoint
    from pretrain.checkpointing.weights import MODEL, load_checkpoint
    from pretrain.compression.cut import renamed

    if given.out.exists():
        raise ConfigError(f"{given.out} exists; give a new folder for the smaller run")
    path = Path(given.run).expanduser()
    checkpoint = find_checkpoint(str(path if path.exists() else find_run(given.run)))
    if not (checkpoint / "state.json").is_file():
        raise ConfigError(f"{checkpoint}: only runs of auricle can be cut; start one with init={checkpoint}")
    found = load_checkpoint(checkpoint)
    cut = _cut(found, given.blocks, given.widths)
    config = renamed(cut.config, given.out.name, str(given.out.parent))
    before, after = (sum(w.numel() for w in m.model.parameters()) for m in (found.module, cut.module))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.out.parent) as name:
        folder = Path(name) / "run"
        (folder / "logs").mkdir(parents=True)
        write_json(folder / "config.json", dump(config))
        write_atomically(folder / "config.yaml", to_yaml(dump(config)))
        write_surroundings(folder, {})
        origin = {"checkpoint": str(checkpoint), "sha256": sha256_of(checkpoint / MODEL), "step": found.step}
        write_json(folder / "compressed.json", {"from": origin, "weights": [before, after], "new": cut.made})
        write_initial(folder, cut.module, config)
        shutil.move(str(folder), given.out)
    changed = diff(dump(found.config.encoder), dump(config.encoder))
    print(f"{given.out}: {after / 1e6:.2f} of {before / 1e6:.2f} million weights of front end and encoder are kept")
    overrides = " ".join(f"encoder.{path}={json.dumps(value, separators=(',', ':'))}" for path, _, value in changed)
    print(f"to train on from these weights: init={given.out} {overrides}")
    if cut.made:
        print(f"new, with random values: {', '.join(cut.made[:4])}{' …' if len(cut.made) > 4 else ''}")
    return ExitCode.DONE


def _cut(found: Any, blocks: int | None, widths: Path | None) -> CutModel:
    from pretrain.compression import cut

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
    return cut.cut_widths(found, pairs)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(part) is int for part in value)
