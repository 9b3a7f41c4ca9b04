"""Rounds and bytes of a federated run, before it starts."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pretrain.config import Config
from pretrain.train_module import build_model


class Exchange(NamedTuple):
    """Bytes of one round for one device: the request with all weights and buffers, and the answer with the update."""

    sent: int
    received: int


class Share(NamedTuple):
    """Average work of one of several devices in a whole run.

    rounds: in which it takes part.  seconds: of audio that it computes on.  exchange: its bytes.
    """

    rounds: float
    seconds: float
    exchange: Exchange


def exchange(config: Config) -> Exchange:
    """Returns the bytes of one round, without metrics and names, about 20 kB; allocates no weights."""
    with torch.device("meta"):
        module = build_model(config)
    state = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return Exchange(state, 4 * trained)


def share(config: Config, one: Exchange, devices: int) -> Share:
    """Returns the average share of one of several devices in a run in which all answer.

    Args:
        config: the run's config.
        one: bytes of one round for one device, from `exchange`.
        devices: number of devices, all with the same probability of being drawn.
    """
    settings = config.engine.federated
    rounds = config.train.steps * min(1.0, settings.per_round / devices)
    seconds = rounds * settings.local_steps * config.data.batch_seconds / settings.per_round
    return Share(rounds, seconds, Exchange(round(rounds * one.sent), round(rounds * one.received)))
