"""Base classes of plug-in configs: the properties that other code may use of any plug-in.

A plug-in's `Config` derives from the base class of its kind, adds fields and overrides properties.
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
    """Frame labels that an objective reads from the data."""

    name: str
    """Key in `data.targets`."""
    rate_hz: float
    classes: int


@config
class ObjectiveConfig(PluginConfig):
    """The config of an objective."""

    @property
    def frame_labels(self) -> FrameLabels | None:
        """The frame labels that the objective needs; None if it computes its targets itself."""
        return None

    @property
    def accepts_frame_labels(self) -> bool:
        """Whether it has the fields labels, label_rate_hz and units, which name frame labels of the data."""
        return False

    @property
    def has_loss(self) -> bool:
        """Whether it has a loss of its own; without one, heads alone learn."""
        return True

    @property
    def freezes(self) -> bool:
        """Whether front end and encoder are left as they are for some updates."""
        return False

    def cautions(self, total_steps: int) -> list[str]:
        """Returns a sentence for each setting that has no effect in a run of `total_steps` steps."""
        return []


@config
class HeadConfig(PluginConfig):
    """The config of a head."""

    weight: Annotated[float, about("weight of its loss relative to the objective's", gt=0)] = 1.0

    @property
    def segment_labels(self) -> tuple[str, ...]:
        """The segment labels that the head needs, among `data.labels`."""
        return ()
