"""The config of `auricle device`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from data_pipeline.core.schema import about, config
from pretrain.interfaces.engine_configs import require_loopback


@config
class DeviceConfig:
    """A device of a federated run: where its server is, and its own audio."""

    server: Annotated[
        str, about("HOST:PORT of the run's server on the loopback, or of an SSH tunnel to it", min_length=1)
    ]
    shards: Annotated[str, about("folder of this device's shards; its audio stays here", min_length=1)]
    name: Annotated[str, about("name of this device, the same at every start; empty: that of the folder")] = ""
    targets: Annotated[dict[str, str], about("folders of frame labels of these shards, by name")] = dataclasses.field(
        default_factory=dict
    )
    poll_seconds: Annotated[
        float, about("seconds between looks for a request; 3 where hundreds of devices ask one server", ge=0.05, le=60)
    ] = 0.5
    workers: Annotated[int, about("processes that decode audio; 0: in this process", ge=0)] = 0
    device: Annotated[Literal["auto", "cpu", "cuda"], about("auto takes a GPU where there is one")] = "auto"

    def __post_init__(self) -> None:
        require_loopback(self.server)
