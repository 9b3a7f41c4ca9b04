"""Base classes of plug-in configs: what the rest of a config, and the programs that read it, may ask of any plug-in.

A plug-in's `Config` derives from its kind's base, adds its own fields and overrides what differs.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

from data_pipeline.core.schema import PluginConfig, about, config


@config
class FrontendConfig(PluginConfig):
    """The config of a front end."""

    @property
    def packable(self) -> bool:
        """Whether utterances can be computed end to end in one row (`engine.packed`)."""
        return True


@config
class EncoderConfig(PluginConfig):
    """The config of an encoder."""

    dim: Annotated[int, about("channels", ge=1)] = 768
    layers: Annotated[int, about("blocks", ge=1)] = 12


class FrameLabels(NamedTuple):
    """Frame labels that an objective takes from the data."""

    name: str
    """Among `data.targets`."""
    rate_hz: float
    classes: int


@config
class ObjectiveConfig(PluginConfig):
    """The config of an objective."""

    @property
    def frame_labels(self) -> FrameLabels | None:
        """The frame labels that it needs; None: it finds its targets itself."""
        return None

    def cautions(self, total_steps: int) -> list[str]:
        """Returns settings that have no effect in a run of so many steps, one sentence each."""
        return []


@config
class HeadConfig(PluginConfig):
    """The config of a further task."""

    weight: Annotated[float, about("weight beside the objective", gt=0)] = 1.0

    @property
    def segment_labels(self) -> tuple[str, ...]:
        """The per-segment labels that it needs, among `data.labels`."""
        return ()
