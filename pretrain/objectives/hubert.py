"""HuBERT: predict the cluster of each masked frame (arXiv 2106.07447, §II)."""

from __future__ import annotations

from typing import Literal

from data_pipeline.core.schema import config
from pretrain.interfaces.models import ModelShape
from pretrain.self_supervision.masked_prediction import MaskedUnits, MaskedUnitsConfig


@config
class Config(MaskedUnitsConfig):
    name: Literal["hubert"] = "hubert"


class HuBERT(MaskedUnits):
    """Masked unit prediction: eq. 1 with α = 1, and the logits of eq. 3."""

    exports_as = "Hubert"


def build(config: Config, shape: ModelShape) -> HuBERT:
    return HuBERT(config, shape)
