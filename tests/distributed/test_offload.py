"""Offloading to a disk says what it lacks."""

from __future__ import annotations

import pytest

from data_pipeline.schema import load
from pretrain.config import EngineConfig
from pretrain.engines import deepspeed


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"zero_stage": 2, "offload_folder": "/x"}, "zero_stage=3, and it is 2"),
        ({"zero_stage": 3}, "engine.offload_folder must name"),
        ({"zero_stage": 3, "offload_folder": "/x"}, "install libaio-dev"),
    ],
)
def test_what_nvme_offload_lacks_is_said(
    settings: dict[str, object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", lambda *_, **__: False)
    with pytest.raises(ValueError, match=words):
        deepspeed._require_nvme(load(EngineConfig, {"offload": "nvme", **settings}))
