"""The default objective: low frame rate, cheap targets first, then targets from the model itself.

Targets are PCA-whitened BEST-RQ codes at first and, after `relabel_step` updates, k-means units of a middle layer (as
in HuBERT's second iteration, arXiv 2106.07447, but within the same run). The loss is a plain softmax at a middle layer
and at the last (as in Fast-HuBERT, arXiv 2309.13860). The parts are published, their combination is not;
docs/findings.md has the measurements.
"""

from __future__ import annotations

from typing import Annotated, Literal

from data_pipeline.core.schema import about, config
from pretrain.interfaces.models import ModelShape
from pretrain.self_supervision.masked_prediction import MaskedUnits, MaskedUnitsConfig


@config
class Config(MaskedUnitsConfig):
    name: Literal["efficient"] = "efficient"
    features: Annotated[
        Literal["mfcc", "log_mel", "best_rq"], about("the first units; best_rq: random codes of PCA-whitened log-mel")
    ] = "best_rq"
    units: Annotated[int, about("number of the first units", ge=2)] = 2048
    relabel_units: Annotated[int, about("number of units after the relabelling; 0: unchanged", ge=0)] = 1000
    mask_span: Annotated[int, about("encoder frames per masked span", ge=1)] = 5
    projection_dim: Annotated[int, about("dimensions of HuBERT's cosine logits; 0: plain softmax", ge=0)] = 0
    penalty_weight: Annotated[float, about("weight of the mean square of a stem's output", ge=0)] = 0.0


class Efficient(MaskedUnits):
    """Masked unit prediction with the defaults above."""


def build(config: Config, shape: ModelShape) -> Efficient:
    return Efficient(config, shape)
