"""The config of frame labels: `auricle targets`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from data_pipeline.core.ray_tasks import RayClusterConfig
from data_pipeline.core.schema import Places, about, config, one_or_several, refuse


@config
class TargetsConfig:
    """Configuration of frame labels for shards."""

    shards: Annotated[Places, about("data set of shards, or several as [a,b]", min_length=1)]
    out: Annotated[str, about("folder for the labels", min_length=1)]
    features: Annotated[
        str,
        about(
            "mfcc; pitch, which needs no k-means; or a checkpoint (run folder or Hugging Face folder) of which a layer "
            "is used",
            min_length=1,
        ),
    ] = "mfcc"
    layer: Annotated[int, about("layer of the checkpoint; 0 is the first block's input")] = 6
    rate_hz: Annotated[
        Literal[100, 50, 25], about("labels per second of features=mfcc; below 100, of means of 2 or 4 frames")
    ] = 100
    silence_db: Annotated[
        float,
        about(
            "features=mfcc: frames this far below a recording's loudest one are one label; 0: labelled like others",
            ge=0,
            le=120,
        ),
    ] = 0.0
    classes: Annotated[int, about("number of labels", ge=2, le=65_535)] = 100
    rounds: Annotated[int, about("maximum number of rounds of Lloyd's algorithm", ge=1)] = 30
    tolerance: Annotated[float, about("stop when a round lowers the inertia by a smaller share", ge=0)] = 1e-4
    fraction: Annotated[float, about("share of the shards to which the centres are fitted", gt=0, le=1)] = 1.0
    seed: Annotated[int, about("seed of the first centres", ge=0)] = 0
    kmeans: Annotated[
        str, about("label folder whose centres are used instead of fitting, e.g. for a validation set")
    ] = ""
    ray: RayClusterConfig = dataclasses.field(default_factory=RayClusterConfig)

    def __post_init__(self) -> None:
        if self.features != "mfcc" and (self.rate_hz != 100 or self.silence_db):
            field = "rate_hz" if self.rate_hz != 100 else "silence_db"
            refuse(field, getattr(self, field), f"applies to features=mfcc, not to {self.features}; leave it out")
        object.__setattr__(self, "shards", one_or_several(self.shards))  # a config made in Python may name one as text
