"""Trains, cuts and exports the models of the compression proof; what an earlier call finished in the folder stays."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.prove.common import auricle, succeeds
from pretrain.checkpointing.locate import steps_done

BLOCKS, BEST, STUDENT_BLOCKS = 4, 2, 1
"""Blocks of the teacher, its layer that teaches, blocks of the students."""
NARROW = {"narrow": [2, 512], "slim": [1, 128]}
"""Heads and inner channels of the block of smaller students."""
SIZES = {"frontend": ("widths",), "encoder": ("layers", "widths", "final_norm")}
"""Fields in which a cut run differs."""
SPARSITY = 0.5
"""Share of the weights of heads and channels that the pruned student loses."""


@dataclass(frozen=True)
class Model:
    """One row before INT8.  layer: of the run.  learned: whether it was trained after the teacher."""

    name: str
    run: Path
    layer: int = -1
    learned: bool = False


@dataclass
class Exports:
    """Graphs by row.  notes: why a row has none."""

    folders: dict[str, Path] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Updates:
    """Updates of each training."""

    distilled: int
    pruning: int
    pruned: int
    units: int

    @classmethod
    def scaled(cls, units: int) -> Updates:
        """Returns lengths of all trainings from that of the student of units, whose updates are the cheapest."""
        return cls(distilled=max(1, units // 6), pruning=max(1, units // 4), pruned=max(1, units // 8), units=units)


def train(name: str, updates: int, runs: Path, shards: Path, *overrides: str, seed: int = 0) -> Path:
    """Trains a run, or continues an interrupted one; one that has all updates stays. Returns its folder."""
    run = runs / f"{name}_{updates}_{seed}"
    if steps_done(run) < updates:
        processes = min(2, int(os.environ.get("OMP_NUM_THREADS", "2")))  # OMP_NUM_THREADS=1: on one core
        auricle(
            "pretrain", *overrides, f"data.shards={shards}", f"runs={runs}", f"launcher.processes={processes}",
            "health.on_collapse=warn", f"seed={seed}", f"train.steps={updates}", "train.checkpoint_every=100",
            f"schedule.warmup_steps={max(1, updates // 20)}", f"name={run.name}", "train.media_every=0",
        )  # fmt: skip
    return run


def cut(run: Path, out: Path, *options: str) -> bool:
    """Cuts a run unless `out` is there; returns whether it could be cut."""
    return out.exists() or succeeds("compress", str(run), str(out), *options)


def widths_of(run: Path) -> list[str]:
    """Returns the overrides of a cut run's front end and encoder."""
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    fields = [(part, name) for part, names in SIZES.items() for name in names if name in config[part]]
    return [f"{part}.{name}={json.dumps(config[part][name], separators=(',', ':'))}" for part, name in fields]


def parts_of(teacher: Path, work: Path, shards: Path) -> tuple[Path, Path, Path]:
    """Returns the teacher cut after layer BEST and after the students' blocks, and the units of layer BEST."""
    best, truncated, units = work / "best", work / "truncated", work / "units"
    cut(teacher, best, "--blocks", str(BEST))
    cut(teacher, truncated, "--blocks", str(STUDENT_BLOCKS))
    if not (units / "checksums.json").exists():
        auricle(
            "targets", f"shards={shards}", f"out={units}", f"features={teacher}", f"layer={BEST}", "rounds=8",
            "fraction=0.3",
        )  # fmt: skip
    return best, truncated, units


def narrowed(truncated: Path, name: str, work: Path) -> Path:
    """Returns the truncated teacher with the most important heads and inner channels of its block, as in NARROW."""
    widths, out = work / f"{name}.json", work / name
    widths.write_text(json.dumps([NARROW[name]] * STUDENT_BLOCKS) + "\n", encoding="utf-8")
    cut(truncated, out, "--widths", str(widths))
    return out


def longer_teacher(teacher: Path, updates: int, work: Path, shards: Path) -> list[Model]:
    """Trains the teacher on, on its own labels; returns its front end and first block.

    The control of the students: a lead over the truncated teacher that comes from longer training shows here, too.

    Args:
        teacher: the run.
        updates: further ones, as many as the student of units has.
        work: folder of the runs.
        shards: unlabelled speech.
    """
    targets = json.loads((teacher / "config.json").read_text(encoding="utf-8"))["data"]["targets"]
    labels = ", ".join(f"{name}: {place}" for name, place in targets.items())
    overrides = ["+experiment=quality_hubert", f"init={teacher}", f"data.targets={{{labels}}}"]
    run = train("longer_teacher", updates, work, shards, *overrides)
    return [Model(f"teacher trained longer, after block {layer}", run, layer) for layer in range(STUDENT_BLOCKS + 1)]


def students(
    teacher: Path, updates: Updates, work: Path, shards: Path, seed: int
) -> tuple[list[Model], dict[str, str]]:
    """Trains the learned models with one seed. Returns them, and a note on each that could not be cut.

    Layer BEST of the teacher teaches, as the last layer of a run cut after it: later layers know less of phones. The
    student's input is masked, so that it must learn to use the context.
    """
    best, truncated, units = parts_of(teacher, work, shards)
    distil = ["+experiment=distil_tiny", f"objective.teacher={best}", f"objective.layers=[[{BEST}]]"]
    masked = ["objective.mask_prob=0.65"]
    distilled = train(
        "distilled", updates.distilled, work, shards, *distil, *masked, f"init={truncated}", *widths_of(truncated),
        seed=seed,
    )  # fmt: skip
    labels = ["objective.labels=units", "objective.label_rate_hz=50", f"data.targets={{units: {units}}}"]
    overrides = ["+experiment=quality_hubert", f"init={truncated}", *widths_of(truncated), *labels]
    dice = train("units_of_teacher", updates.units, work, shards, *overrides, seed=seed)
    found = [
        Model("distilled, 1 block", distilled, learned=True),
        Model("teacher's units, 1 block", dice, learned=True),
    ]
    for name in NARROW:
        narrow = narrowed(truncated, name, work)
        overrides = ["+experiment=quality_hubert", f"init={narrow}", *widths_of(narrow), *labels]
        run = train(f"units_of_teacher_{name}", updates.units, work, shards, *overrides, seed=seed)
        found.append(Model(f"teacher's units, 1 {name} block", run, learned=True))
    found.append(Model("teacher's units, front end", dice, 0, learned=True))
    overrides = [
        "+experiment=prune_tiny", f"objective.teacher={best}", f"objective.layers=[[0],[{BEST}]]", f"init={best}",
        f"objective.sparsity={SPARSITY}", f"objective.sparsity_steps={max(1, updates.pruning // 10)}",
        "optimizer.lr=1.0e-3",
    ]  # fmt: skip
    pruned = train("pruning", updates.pruning, work, shards, *overrides, *widths_of(best), seed=seed)
    smaller = work / f"{pruned.name}_cut"
    if not cut(pruned, smaller):
        return found, {"pruned, 2 blocks": "not cut: its closed gates are off the target (see auricle compress)"}
    overrides = [*distil, f"init={smaller}", *widths_of(smaller)]
    final = train("pruned", updates.pruned, work, shards, *overrides, seed=seed)
    return [*found, Model("pruned, 2 blocks", final, learned=True)], {}


def exported(models: list[Model], out: Path, shards: Path) -> Exports:
    """Exports each model in fp32 and INT8, unless it is there."""
    found = Exports()
    for model in models:
        for kind, options in (("fp32", []), ("INT8", ["--int8", "dynamic", "--shards", str(shards)])):
            row, folder = f"{model.name}, {kind}", out / f"{model.run.name}_{model.layer}_{kind.lower()}"
            line = ["export", str(model.run), str(folder), "--to", "onnx", "--layer", str(model.layer), *options]
            if folder.exists() or succeeds(*line):
                found.folders[row] = folder
            else:
                found.notes[row] = "not exported: see the message of auricle export"
    return found
