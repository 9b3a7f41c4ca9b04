"""Runs engine cases inside one set of ranks: `python -m tests.support.engine_cases CASES.json OUT.json`.

Each case is one engine over the same synthetic global steps; rank 0 writes losses, norms and a digest of all weights
and moments per case. tests/distributed starts it and compares the results.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from data_pipeline.core.schema import load
from data_pipeline.core.types import Batch, Cursor
from pretrain.checkpointing import checkpoint
from pretrain.checkpointing.checkpoint import TrainState
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.config import Config
from pretrain.engines import distributed as ranks
from pretrain.engines import make_engine
from pretrain.engines.distributed import DistributedContext
from pretrain.interfaces.frames import StepContext
from pretrain.lr_schedule import learning_rate
from pretrain.train_module import build_model
from tests.support.contract_cases import TEXTS, labelled
from tests.support.synthetic_reader import synthetic_batch


def run_case(case: dict[str, Any], world: DistributedContext) -> dict[str, Any]:
    """Runs one engine for `steps` global steps, with an optional load before and save after."""
    config = load(Config, case["config"])
    before = held_bytes() if case.get("memory") else {}
    engine = make_engine(config, build_model(config), world)
    parameters = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in engine.module.parameters())
    held = 0

    def look(part: str) -> None:
        nonlocal held
        if part == "backward pass" and case.get("memory"):
            held = max(held, sum(size for place, size in held_bytes().items() if place not in before))

    engine.on_phase = look
    if case.get("scale"):
        engine.scale.value = case["scale"]
    state = TrainState()
    if case.get("load"):
        folder = RunFolder(case["load"])
        state = checkpoint.load_latest(folder, engine, config)
    losses: list[float | None] = []
    norms: list[float] = []
    held_out: list[float] = []
    for step in range(state.step, case["steps"]):
        mine = range(world.rank, config.data.micro_batches, world.size)
        lr = learning_rate(config.optimizer, config.schedule, config.train.steps, step)
        batches, skip_above = [synthetic_batch(step, j) for j in mine], 0.0 if step == case.get("skip_at") else math.inf
        if "labelled" in case:
            with_text = [] if step == case.get("unlabelled_at") else case["labelled"]
            batches = [
                labelled(batch, texts_of(batch) if batch.micro_batch in with_text else ("",) * len(batch.keys))
                for batch in batches
            ]
        if len(batches) * world.size < config.data.micro_batches:
            batches.append(batches[0].emptied(config.data.micro_batches + world.rank))
        if step == case.get("broken_at") and world.rank == world.size - 1:
            batches[-1].wave_BT[0, 5000] = math.nan
        try:
            result = engine.step(batches, StepContext(config.seed, step), lr, None, skip_above)
        except FloatingPointError:
            losses.append(None)
            continue
        losses.append(result.loss)
        norms.append(result.grad_norm)
        if case.get("held_out"):
            valid = [synthetic_batch(100, j) for j in range(case["held_out"])]
            own = valid[world.rank :: world.size]
            filled = own + valid[:1] * (-(-len(valid) // world.size) - len(own))
            held_out.append(engine.measure(filled, len(own), StepContext(0, 0)).loss)
    if case.get("save"):
        folder = RunFolder(case["save"])
        if world.rank == 0:
            folder.claim()
            time.sleep(case.get("save_seconds", 0.0))
        with checkpoint.Saver(folder, engine, config) as saver:
            saver.save(TrainState(case["steps"], Cursor("toy", 0, case["steps"])))
    digest = hashlib.sha256()
    for name, tensor in engine.tensors():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    found = {"losses": losses, "norms": norms, "digest": digest.hexdigest(), "scale": engine.scale.value}
    return found | {"held_out": held_out, "held": held, "parameters": parameters}


def texts_of(batch: Batch) -> tuple[str, ...]:
    """Returns one of two texts for each row."""
    return tuple(TEXTS[row % 2] for row in range(len(batch.keys)))


def held_bytes() -> dict[int, int]:
    """Returns address and size of the storage of every live tensor, gradients included."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu":
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return found


def main(cases: str, out: str) -> None:
    """Runs all cases in turn on this process's ranks."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    world = ranks.join("cpu", 2)
    gc.freeze()  # DeepSpeed collects garbage for each engine: without the objects of all imported modules
    results = {name: run_case(case, world) for name, case in json.loads(Path(cases).read_text()).items()}
    if world.rank == 0:
        Path(out).write_text(json.dumps(results))
    ranks.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # as launch.workers.rank does: gloo's threads sometimes abort an interpreter that is shutting down
