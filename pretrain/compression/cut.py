"""Cuts a trained model to fewer blocks, heads and channels; the result is the model of an ordinary run.

Four ways to choose the parts that are kept: the first blocks (equal to the layers before the cut), given widths (the
heads and channels with the largest weights), a subnet of a supernet (equal to the supernet set to it), or the gates
that structured pruning has closed (equal to the gated model; soft gates become part of the weights).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_pipeline.core.schema import ConfigError, dump, load
from pretrain.checkpointing.weights import LoadedCheckpoint
from pretrain.config import Config
from pretrain.interfaces.frames import BlockGates, ModelGates
from pretrain.interfaces.objectives import Pruning
from pretrain.interfaces.subnets import Subnet
from pretrain.nn.block_stack import BlockStack
from pretrain.nn.importance import importance
from pretrain.nn.stack_config import StackConfig
from pretrain.train_module import TrainModule, build_model

MOST_OFF = 0.02
"""Largest difference between the share of weights that gates were to remove and the share that they do."""


class CutModel(NamedTuple):
    """A smaller model.  made: names of objective and head weights that have random values."""

    config: Config
    module: TrainModule
    made: list[str]


def cut_blocks(found: LoadedCheckpoint, blocks: int) -> CutModel:
    """Keeps the first `blocks` blocks; the last layer then equals that layer of the whole model.

    Raises:
        ConfigError: the model has fewer blocks, or a U-shape, whose halves cannot be cut apart; or gates of pruning.
    """
    _require_no_gates(found, f"--blocks {blocks}")
    stack = _stack(found)
    if not 1 <= blocks <= stack.layers:
        raise ConfigError(f"--blocks {blocks}: this model has 1 to {stack.layers} blocks to keep")
    if stack.half_rate_blocks:
        raise ConfigError(
            f"--blocks {blocks}: encoder.half_rate_blocks={stack.half_rate_blocks} join and split frames in the middle "
            "of the stack; only --widths can cut such a model"
        )
    fields: dict[str, object] = {"layers": blocks, "widths": [list(pair) for pair in stack.widths[:blocks]]}
    if blocks < stack.layers:
        fields |= stack.without_last_blocks
    return _rebuilt(found, fields, found.module.model.state_dict())


def cut_widths(found: LoadedCheckpoint, widths: Sequence[Sequence[int]]) -> CutModel:
    """Keeps the most important heads and inner channels of each block (see `importance`).

    Args:
        found: the run to cut.
        widths: heads and inner channels of each block.

    Raises:
        ConfigError: another number of blocks, or a width above the block's; or gates of pruning.
    """
    _require_no_gates(found, "--widths")
    stack = _stack(found)
    if len(widths) != stack.layers:
        raise ConfigError(f"--widths: {len(widths)} pairs, and this model has {stack.layers} blocks; give one for each")
    for number, (pair, has) in enumerate(zip(widths, stack.block_widths, strict=True)):
        if len(pair) != 2 or not 1 <= pair[0] <= has.heads or not 1 <= pair[1] <= has.ffn_dim:
            limits = f"1 to {has.heads} heads and 1 to {has.ffn_dim} inner channels"
            raise ConfigError(f"--widths: block {number} has {limits} to keep, not {list(pair)}")
    encoder = found.module.model.encoder
    assert isinstance(encoder, BlockStack)
    scores = importance(encoder)
    gates = tuple(
        BlockGates(_largest(score.heads_H, heads), tuple(_largest(part, ffn_dim) for part in score.channels))
        for score, (heads, ffn_dim) in zip(scores, widths, strict=True)
    )
    return cut_gates(found, ModelGates(blocks=gates))


def cut_subnet(found: LoadedCheckpoint, subnet: Subnet) -> CutModel:
    """Cuts a supernet to one of its subnets: the first blocks, and the first heads and inner channels of each.

    Raises:
        ConfigError: the run is no supernet, or the subnet is not among those that it trains.
    """
    space = found.module.objective.space()
    if space is None:
        raise ConfigError(f"objective.name={found.config.objective.name}: this run is no supernet (objective.elastic)")
    if not space.holds(subnet):
        raise ConfigError(
            f"--widths {[list(pair) for pair in subnet]}: this supernet trains {list(space.blocks)} blocks, each with "
            f"{list(space.heads)} heads and {list(space.ffn)} inner channels"
        )
    if len(subnet) < space.layers:
        made = cut_blocks(found, len(subnet))
        found = LoadedCheckpoint(made.module, made.config, found.step)
    return cut_gates(found, ModelGates(blocks=space.gates(subnet, torch.device("cpu"))))


def cut_pruned(found: LoadedCheckpoint) -> CutModel:
    """Removes the heads and channels whose gates are closed, and multiplies the weights by the gates.

    Raises:
        ConfigError: the run has no gates, or they remove another share of the weights than they were to.
    """
    pruning = found.module.objective.pruning()
    if pruning is None:
        raise ConfigError(
            f"objective.name={found.config.objective.name}: this run has no gates of structured pruning; give --blocks "
            "or --widths, or train with +experiment=prune_tiny"
        )
    require_closed(pruning)
    return cut_gates(found, pruning.gates)


def _require_no_gates(found: LoadedCheckpoint, option: str) -> None:
    """Raises ConfigError where structured pruning has learned what to remove, which the option would ignore."""
    if found.module.objective.pruning() is not None:
        raise ConfigError(
            f"{option}: this run has gates of structured pruning; cut it without --blocks and --widths first, then cut "
            "the result"
        )


def require_closed(pruning: Pruning) -> None:
    """Raises ConfigError unless the gates remove the share of the weights that they were to remove."""
    if abs(pruning.found - pruning.asked) > MOST_OFF:
        raise ConfigError(
            f"objective.sparsity={pruning.asked:.0%} was requested, but the closed gates remove {pruning.found:.1%} of "
            f"the weights; they must agree to {MOST_OFF:.0%}: train longer (train.steps)"
        )


def cut_gates(found: LoadedCheckpoint, gates: ModelGates) -> CutModel:
    """Removes what has a gate of 0 and multiplies the weights after it by the other gates.

    Each part keeps at least one head or channel. Where a block has several feed-forward parts, all keep as many
    channels as the widest; the spare ones have weight 0.
    """
    stack, model = _stack(found), found.module.model
    assert isinstance(model.encoder, BlockStack)
    state, sizes, widths = dict(model.state_dict()), list[int](), list[list[int]]()
    for group, gate_C in zip(model.frontend.channel_groups() if gates.frontend else (), gates.frontend, strict=True):
        channels_K = _open(gate_C)
        state |= _narrow_channels(state, "frontend.", group.rows, group.columns, channels_K, gate_C)
        sizes.append(len(channels_K))
    frontend = model.frontend.narrowed(sizes) if sizes else {}
    for number, (gate, width) in enumerate(zip(gates.blocks, stack.block_widths, strict=True)):
        heads_K = _open(gate.heads_H)
        n_channels = max(len(_open(part)) for part in gate.channels)
        prefix = f"encoder.blocks.{number}."
        state |= _narrow_attention(state, f"{prefix}attention.", heads_K, gate.heads_H, width.head_dim)
        for (inner, outer), part in zip(model.encoder.feed_forwards, gate.channels, strict=True):
            channels_K = part.topk(n_channels).indices.sort().values
            rows, columns = (f"{inner}.weight", f"{inner}.bias"), (f"{outer}.weight",)
            state |= _narrow_channels(state, prefix, rows, columns, channels_K, part)
        widths.append([len(heads_K), n_channels])
    return _rebuilt(found, {"widths": widths}, state, frontend)


def _stack(found: LoadedCheckpoint) -> StackConfig:
    if not isinstance(found.config.encoder, StackConfig):
        raise ConfigError(f"encoder.name={found.config.encoder.name}: only stacks of blocks can be cut")
    return found.config.encoder


def _largest(score_N: Tensor, n: int) -> Tensor:
    """Returns 1 for the n largest scores and 0 for all other scores."""
    return torch.zeros_like(score_N).index_fill(0, score_N.topk(n).indices, 1.0)


def _open(gate_N: Tensor) -> Tensor:
    """Returns the indices of the gates that are not closed, or of the first one where all are."""
    kept = gate_N.nonzero()[:, 0]
    return kept if len(kept) else kept.new_zeros(1)


def _narrow_attention(
    state: Mapping[str, Tensor], prefix: str, heads_K: Tensor, gate_H: Tensor, head_dim: int
) -> dict[str, Tensor]:
    weight, bias = state[f"{prefix}qkv.weight"], state[f"{prefix}qkv.bias"]
    out = state[f"{prefix}out.weight"].view(weight.shape[1], -1, head_dim)
    return {
        f"{prefix}qkv.weight": weight.view(3, -1, head_dim, weight.shape[1])[:, heads_K].flatten(0, 2),
        f"{prefix}qkv.bias": bias.view(3, -1, head_dim)[:, heads_K].flatten(),
        f"{prefix}out.weight": (out * gate_H[:, None])[:, heads_K].flatten(1),
    }


def _narrow_channels(
    state: Mapping[str, Tensor],
    prefix: str,
    rows: Sequence[str],
    columns: Sequence[str],
    channels_K: Tensor,
    gate_C: Tensor,
) -> dict[str, Tensor]:
    """Returns the weights around some channels: rows of those that are kept, and columns times their gates."""
    found = {f"{prefix}{name}": state[f"{prefix}{name}"][channels_K] for name in rows}
    for name in columns:
        weight = state[f"{prefix}{name}"]
        factors = gate_C.view(-1, *[1] * (weight.dim() - 2))  # along the second axis
        found[f"{prefix}{name}"] = (weight * factors)[:, channels_K]
    return found


def _rebuilt(
    found: LoadedCheckpoint,
    encoder: Mapping[str, object],
    state: Mapping[str, Tensor],
    frontend: Mapping[str, object] | None = None,
) -> CutModel:
    """Builds the smaller model; objective and heads keep their weights where all fit, and are new otherwise.

    Args:
        found: the run that is cut.
        encoder, frontend: fields of their configs that change.
        state: weights of the smaller model.
    """
    values = dump(found.config)
    values["encoder"] |= encoder
    values["frontend"] |= frontend or {}
    closed: dict[str, object] = {"sparsity": 0.0, "elastic": {}}  # the gates are part of the weights now
    if "elastic" in values["objective"] and not found.config.objective.teacher_run:
        closed["layers"] = []  # those of a teacher with the blocks of this model
    values["objective"] |= {name: value for name, value in closed.items() if name in values["objective"]}
    config = load(Config, values)
    try:
        module = build_model(config)
    except ValueError as error:
        raise ConfigError(f"the cut model does not fit its objective: {error}") from error
    own = module.model.state_dict()
    module.model.load_state_dict({name: weight for name, weight in state.items() if name in own})
    module.objective.attach(module.model)
    parts = [("objective.", found.module.objective, module.objective), ("heads.", found.module.heads, module.heads)]
    return CutModel(config, module, [name for prefix, old, new in parts for name in _moved(prefix, old, new)])


def _moved(prefix: str, old: nn.Module, new: nn.Module) -> list[str]:
    """Copies the weights of `old` where names and shapes agree; returns the names of the parameters that did not."""
    theirs, ours = old.state_dict(), new.state_dict()
    fitting = {n: w for n, w in theirs.items() if n in ours and ours[n].shape == w.shape}
    teachers = {name for name in ours if name.startswith("teacher.")}
    new.load_state_dict({name: weight for name, weight in fitting.items() if name not in teachers}, strict=False)
    return [f"{prefix}{name}" for name in ours if name not in fitting and name not in teachers]


def renamed(config: Config, name: str, runs: str) -> Config:
    """Returns the config under a run's new name; `init` is empty, since the weights are in its own checkpoint."""
    return dataclasses.replace(config, name=name, runs=runs, init="")
