"""Rounds and bytes of a federated run, before it starts."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pretrain.config import Config
from pretrain.federated.base_weights import split
from pretrain.train_module import build_model


class Exchange(NamedTuple):
    """Bytes for one device.

    sent: a request, with the weights that learn.  received: the answer, with their update.
    once: weights and buffers that do not learn, sent in the first round of a device.
    """

    sent: int
    received: int
    once: int = 0


class Share(NamedTuple):
    """Average work of one of several devices in a whole run.

    rounds: in which it takes part.  seconds: of audio that it computes on.  exchange: its bytes, with
    those sent once among those sent.
    """

    rounds: float
    seconds: float
    exchange: Exchange


def exchange(config: Config) -> Exchange:
    """Returns the bytes of one round, without metrics and names, about 20 kB; allocates no weights.

    Under secure aggregation all weights travel in every round, and masked values as int64.
    """
    with torch.device("meta"):
        module = build_model(config)
    learned = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    sent, once = (
        sum(tensor.numel() * tensor.element_size() for tensor in part.values())
        for part in split(module.state_dict(), learned)
    )
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    if config.engine.federated.secure:
        return Exchange(sent + once, 8 * trained)
    return Exchange(sent, 4 * trained, once)


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
    once = round(min(1.0, rounds) * one.once)
    return Share(rounds, seconds, Exchange(round(rounds * one.sent) + once, round(rounds * one.received), once))
