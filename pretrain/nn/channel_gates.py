"""Channels between the convolutions of a front end: their number in each, and factors, 0 for those to be removed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from data_pipeline.core.schema import refuse
from pretrain.interfaces.models import ChannelGroup

NORM, LINEAR = "norm", "linear"
"""Names of the layer norm and the linear layer that follow the last convolution of a front end."""


def refuse_widths(field: str, widths: Sequence[int], layers: int, of: str) -> None:
    """Refuses a field with the channels of each layer where it has another number of layers, or a width below 1.

    Args:
        field: its name.
        widths: its value; empty is allowed.
        layers: number of layers.
        of: what gives their number, for the message.
    """
    if widths and (len(widths) != layers or min(widths) < 1):
        refuse(field, list(widths), f"must be {layers} numbers from 1 on, as {of} has {layers} such convolutions")


def conv_groups(
    widths: Sequence[int], rows: Sequence[tuple[str, ...]], columns: Sequence[str]
) -> tuple[ChannelGroup, ...]:
    """Returns the groups of convolutions in a row that end in a layer norm and a linear layer.

    Args:
        widths: channels of each convolution.
        rows: parameters of each with one row per channel.
        columns: weights of the second and later ones, with one column per channel of the one before.
    """
    if not widths:
        return ()
    norm = (f"{NORM}.weight", f"{NORM}.bias")
    all_rows, all_columns = [*rows[:-1], (*rows[-1], *norm)], [*columns, f"{LINEAR}.weight"]
    return tuple(
        ChannelGroup(width, own, (read,)) for width, own, read in zip(widths, all_rows, all_columns, strict=True)
    )


def gate_of(gates: tuple[Tensor, ...], number: int) -> Tensor | None:
    """Returns one of the gates, or None where there are none."""
    return gates[number] if gates else None


def gated(x_BFC: Tensor, gate_C: Tensor | None) -> Tensor:
    """Returns channels times their factors, if any."""
    return x_BFC if gate_C is None else x_BFC * gate_C.to(x_BFC.dtype)


class GatedLayerNorm(nn.LayerNorm):
    """Layer norm over the channels whose gate is not 0, as it is after the others have been removed."""

    def forward(self, x_BFC: Tensor, gate_C: Tensor | None = None) -> Tensor:
        """Normalises (B, F, C).

        Args:
            x_BFC: channels.
            gate_C: factors that multiply the result elsewhere; None: all channels count.
        """
        if gate_C is None:
            return super().forward(x_BFC)
        open_C = (gate_C > 0).float()
        n_open, exact_BFC = open_C.sum().clamp(min=1), x_BFC.float()
        centred_BFC = exact_BFC - (exact_BFC * open_C).sum(2, keepdim=True) / n_open
        variance_BF1 = (centred_BFC.square() * open_C).sum(2, keepdim=True) / n_open
        normed_BFC = centred_BFC * torch.rsqrt(variance_BF1 + self.eps) * self.weight + self.bias
        return normed_BFC.to(x_BFC.dtype)
