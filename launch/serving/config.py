"""The config of `auricle serve`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from data_pipeline.core.loopback import is_loopback
from data_pipeline.core.schema import about, config, refuse
from pretrain.recognition.config import DecodingConfig


@config
class ServeConfig:
    """A server of streaming recognition: the root of conf/serve.yaml."""

    checkpoint: Annotated[str, about("run or checkpoint with a recognising head", min_length=1)]
    head: Annotated[str, about("name of the head that writes the text; empty: the only one that can")] = ""
    host: Annotated[str, about("address to listen at; any but this machine's own needs token_file")] = "127.0.0.1"
    port: Annotated[int, about("port to listen at; 0: a free one", ge=0, le=65_535)] = 8_765
    token_file: Annotated[str, about("file with the token that clients must give, at least 16 characters")] = ""
    chunk: Annotated[int | None, about("frames per chunk, a trained length; null: the first of them", ge=1)] = None
    left: Annotated[
        int | None, about("earlier chunks attended to, a trained number (-1: all); null: the first", ge=-1)
    ] = None
    max_minutes: Annotated[float, about("longest stream with left=-1", gt=0)] = 10.0
    decoding: Annotated[DecodingConfig, about("from the model's output to text")] = dataclasses.field(
        default_factory=DecodingConfig
    )
    clients: Annotated[int, about("streams at the same time; further ones are refused", ge=1, le=10_000)] = 32
    queue_seconds: Annotated[
        float, about("audio that waits per client; a faster client is slowed down", ge=0.5, le=60)
    ] = 5.0
    queue_results: Annotated[
        int, about("results that wait for a slow client before no more of its audio is computed", ge=4)
    ] = 64
    idle_seconds: Annotated[float, about("seconds without a message after which a client is disconnected", gt=0)] = 60.0
    device: Annotated[Literal["auto", "cpu", "cuda"], about("auto takes a GPU where there is one")] = "auto"

    def __post_init__(self) -> None:
        if not self.token_file and not is_loopback(self.host):
            refuse("host", self.host, "others can reach it: set token_file=FILE with a token, or host=127.0.0.1")
