"""Saves the batches of a failed update as safetensors and JSON, and repeats their computation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data_pipeline.core.atomic_files import remove, write_json
from data_pipeline.core.json_object import DamagedFileError, read_object
from data_pipeline.core.types import Batch, Images
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.checkpointing.tensor_files import save_tensors
from pretrain.interfaces.frames import StepContext
from pretrain.nn.dropout import seed_dropout
from pretrain.train_module import TrainModule

MAX_KEPT = 20
"""Gradient spikes saved per run, and as many non-finite updates; more would fill the disk over time."""


def save_batches(
    run: RunFolder, rank: int, ctx: StepContext, batches: Sequence[Batch], why: str, limit: int = MAX_KEPT
) -> Path | None:
    """Writes RUN/health/step_N/rank_R.safetensors and .json.

    Args:
        run: the run folder.
        rank: this rank.
        ctx: seed and step, from which `replay` draws the same masks.
        batches: this rank's micro-batches.
        why: the reason, one sentence.
        limit: maximum number of saved updates.

    Returns:
        The folder; None if `limit` updates are saved already, or if it cannot be written.

    Raises:
        StaleIncarnationError: a newer start of the run exists.
    """
    run.require_current()
    folder = run.path / "health" / f"step_{ctx.step:08d}"
    if not folder.exists() and len(list(folder.parent.glob("step_*"))) >= limit:
        return None
    tensors: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        tensors |= {f"{i}/wave_BT": batch.wave_BT, f"{i}/lengths_B": batch.lengths_B}
        tensors |= {f"{i}/targets/{name}": target for name, target in batch.targets.items()}
        tensors |= {f"{i}/tokens/{name}": ids for name, ids in batch.tokens.items()}
        tensors |= {f"{i}/pixels/{name}": images.pixels_BCHW for name, images in batch.images.items()}
        tensors |= {f"{i}/present/{name}": images.present_B for name, images in batch.images.items()}
        if batch.sources_BST is not None:
            tensors[f"{i}/sources_BST"] = batch.sources_BST
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    described = [{"keys": b.keys, "micro_batch": b.micro_batch, "labels": dict(b.labels)} for b in batches]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(contiguous, folder / f"rank_{rank}.safetensors")
        write_json(folder / f"rank_{rank}.json", {"seed": ctx.seed, "step": ctx.step, "why": why, "batches": described})
    except OSError:  # a full disk: monitoring never ends training
        remove(folder)
        return None
    return folder


def load_batches(folder: Path) -> tuple[StepContext, list[Batch], str]:
    """Returns the batches of all ranks, in order, and the reason.

    Raises:
        ValueError: there are none.
        DamagedFileError: a file is damaged.
    """
    batches: list[Batch] = []
    found = (StepContext(0, 0), "")
    for path in sorted(folder.glob("rank_*.json")):
        try:
            values, tensors = read_object(path), load_file(path.with_suffix(".safetensors"))
            found = (StepContext(int(values["seed"]), int(values["step"])), str(values["why"]))
            batches += [_batch(f"{i}/", described, tensors) for i, described in enumerate(values["batches"])]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise DamagedFileError(
                f"{path}: it or its .safetensors is damaged ({error}); replay the kept batches of another step"
            ) from None
    if not batches:
        raise ValueError(f"{folder} holds no kept batches")
    batches.sort(key=lambda batch: batch.micro_batch)
    return found[0], batches, found[1]


def _batch(prefix: str, described: dict[str, Any], tensors: dict[str, Tensor]) -> Batch:
    pixels, present = (_below(f"{prefix}{kind}/", tensors) for kind in ("pixels", "present"))
    return Batch(
        tensors[f"{prefix}wave_BT"],
        tensors[f"{prefix}lengths_B"],
        tuple(described["keys"]),
        int(described["micro_batch"]),
        targets=_below(f"{prefix}targets/", tensors),
        labels={name: tuple(texts) for name, texts in described["labels"].items()},
        tokens=_below(f"{prefix}tokens/", tensors),
        images={name: Images(pixels[name], present[name]) for name in pixels},
        sources_BST=tensors.get(f"{prefix}sources_BST"),
    )


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class Replayed:
    """Result of repeating a micro-batch: loss, gradient norm, largest gradients, and the first non-finite module."""

    keys: tuple[str, ...]
    seconds: float
    peak: float
    loss: float
    grad_norm: float
    largest: tuple[tuple[str, float], ...]
    first_not_finite: str


def replay(module: TrainModule, ctx: StepContext, batches: Sequence[Batch]) -> list[Replayed]:
    """Computes loss and gradients of each micro-batch separately, with the random draws of the failed update.

    Args:
        module: the model before the update.
        ctx: seed and step of the update.
        batches: its micro-batches.
    """
    module.train()
    results = []
    for batch in batches:
        broken: list[str] = []
        hooks = [
            part.register_forward_hook(_note_not_finite(name, broken)) for name, part in module.named_modules() if name
        ]
        plan = module.prepare(batch, ctx)
        seed_dropout(ctx, batch.micro_batch, batch.wave_BT.device)
        module.zero_grad()
        loss, _ = module(batch, plan, plan.counts_K, ctx)
        loss.backward()
        for hook in hooks:
            hook.remove()
        norms = {name: float(p.grad.norm()) for name, p in module.named_parameters() if p.grad is not None}
        total = float(torch.tensor(list(norms.values())).norm())
        largest = tuple(sorted(norms.items(), key=lambda item: -item[1] if item[1] == item[1] else float("-inf"))[:5])
        first = "the audio itself" if not bool(torch.isfinite(batch.wave_BT).all()) else next(iter(broken), "")
        seconds, peak = float(batch.lengths_B.sum()) / 16_000, float(batch.wave_BT.abs().max())
        results.append(
            Replayed(
                batch.keys,
                seconds=seconds,
                peak=peak,
                loss=float(loss.detach()),
                grad_norm=total,
                largest=largest,
                first_not_finite=first,
            )
        )
    return results


def _note_not_finite(name: str, broken: list[str]) -> Any:
    def hook(module: nn.Module, arguments: object, output: object) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                broken.append(name)

    return hook
