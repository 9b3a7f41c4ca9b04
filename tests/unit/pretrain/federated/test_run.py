"""A federated run in the training loop: resume, metrics, held-out loss, bad configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.core.jsonl import read_rows
from data_pipeline.core.schema import ConfigError, dump, load
from pretrain.config import Config
from pretrain.federated.config import DeviceConfig
from pretrain.federated.device import Device
from pretrain.federated.messages import MODEL, RoundRequest, decode
from pretrain.train_module import build_model
from tests.support.federation import run, settings, synthetic_devices
from tests.support.tiny_shards import sounds, write_shards


@pytest.mark.parametrize(
    "rule", [{"rule": "gradient"}, {"rule": "fedadam"}, {"secure": True, "min_devices": 3}], ids=str
)
def test_a_resumed_server_has_the_same_bits(rule: dict[str, Any], tmp_path: Path) -> None:
    config = settings({"per_round": 3, **rule}, train={"steps": 5, "checkpoint_every": 2, "media_every": 0})
    whole = run(tmp_path / "whole", config, synthetic_devices(config, 5))
    for stop_after in (1, 2, None):  # each start has new processes of server and devices
        parts = run(tmp_path / "parts", config, synthetic_devices(config, 5), stop_after)
    for (name, mine), (_, other) in zip(parts.tensors(), whole.tensors(), strict=True):
        assert torch.equal(mine, other), name
    rows = read_rows(tmp_path / "parts" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(row["federated/devices"] == 3 for row in rows)
    assert all(row["federated/bytes_sent"] > 3 * 4 * sum(p.numel() for p in whole.module.parameters()) for row in rows)
    assert all(row["data/audio_seconds"] > 0 for row in rows)


def test_a_real_device_answers_from_its_shards_whatever_was_asked_before(tmp_path: Path) -> None:
    write_shards(tmp_path / "phone", [sounds([1.0] * 12)])
    data = {"shards": "devices", "batch_seconds": 8.0, "micro_batches": 4, "min_seconds": 0.5, "max_seconds": 2.0}
    config = settings({"per_round": 2}, data=data)
    state = {MODEL + name: tensor for name, tensor in build_model(config).state_dict().items()}

    def ask(step: int) -> bytes:
        counts_K = torch.ones(1, dtype=torch.float64)
        request = RoundRequest(
            run="run", kind="gradient", step=step, attempt=0, seed=0, tensors=state, counts_K=counts_K
        )
        return request.encoded()

    own = DeviceConfig(server="127.0.0.1:9092", shards=str(tmp_path / "phone"))
    first, second = Device(dump(config), own), Device(dump(config), own)
    assert first.name == "phone"
    in_order = [decode(first.answer(ask(step)))[0] for step in range(5)]
    for step in (4, 0, 3):
        again = decode(second.answer(ask(step)))[0]
        assert again.keys() == in_order[step].keys()
        assert all(torch.equal(again[name], in_order[step][name]) for name in again)
    assert len({float(answer["loss"]) for answer in in_order}) == 5
    for device in (first, second):
        device.close()


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"federated": {"min_devices": 9, "per_round": 8}}, r"min_devices.*9.*per_round=8"),
        ({"federated": {"local_steps": 3}}, r"local_steps.*3.*fedavg"),
        ({"precision": "fp16"}, r"precision.*fp16.*fp32 or bf16"),
    ],
)
def test_settings_that_do_not_fit_are_refused(engine: dict[str, Any], message: str) -> None:
    parts = {"data": {"shards": "devices"}, "frontend": {"name": "log_mel"}, "encoder": {"name": "transformer"}}
    with pytest.raises(ConfigError, match=message):
        load(Config, {**parts, "objective": {"name": "best_rq"}, "engine": {"name": "federated", **engine}})
