"""The predicted latency of subnets: fitted to whole subnets, checked on those left out, refused where it is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.schema import ConfigError, load
from pretrain.checkpointing.weights import LoadedCheckpoint
from pretrain.compression.cut import cut_subnet
from pretrain.compression.latency import LatencyModel, measured_subnets, megabytes
from pretrain.config import Config
from pretrain.interfaces.subnets import ElasticConfig, Space, Subnet
from pretrain.train_module import build_model
from tests.support.contract_cases import small

SPACE = Space(ElasticConfig(blocks=(2, 3, 4), heads=(1, 2, 4), ffn=(16, 32, 64)), 4, 4, 64, 1)


def true_latency(subnet: Subnet) -> float:
    """Milliseconds: what precedes the blocks, the blocks, and what their sum does not show."""
    return 12.0 + sum(1.28 * (2.0 + heads + ffn / 16) for heads, ffn in subnet) + 0.3 * len(subnet) ** 1.1


def table(noise: float = 0.01, count: int = 40, threads: int = 1) -> dict[str, Any]:
    rng = keyed_rng(0, "noise")
    rows = [[h, f, 9.0, 9.0, 2.0 + h + f / 16] for h in SPACE.heads for f in SPACE.ffn]
    timed = [
        [[list(pair) for pair in subnet], 99.0, 99.0, true_latency(subnet) * (1 + noise * rng.standard_normal())]
        for subnet in measured_subnets(SPACE, count)
    ]
    return {"threads": threads, "seconds": 10.0, "rows": rows, "subnets": timed}


def test_subnets_that_were_not_measured_are_predicted() -> None:
    found = LatencyModel(table(), SPACE)
    found.require_accurate()
    assert 0.005 < found.error < 0.02
    rng = keyed_rng(7, "unseen")
    unseen = [SPACE.draw(rng) for _ in range(200)]
    errors = [abs(found.milliseconds(subnet) / true_latency(subnet) - 1) for subnet in unseen]
    assert np.mean(errors) < 0.01
    sums = [abs(sum(2.0 + h + f / 16 for h, f in s) / true_latency(s) - 1) for s in unseen]
    assert np.mean(sums) > 0.3, "sums of blocks mislead"
    assert found.real_time_factor(unseen[0]) == pytest.approx(found.milliseconds(unseen[0]) / 10_000)


def test_a_table_that_predicts_badly_or_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mean error of \d+\.\d% \(allowed: 5%\); measure again"):
        LatencyModel(table(noise=0.3), SPACE).require_accurate()
    with pytest.raises(ConfigError, match="has 4 whole subnets, and 8 or more are needed"):
        LatencyModel(table(count=4), SPACE)
    with pytest.raises(ConfigError, match="has no block of 4 heads and 64 inner channels"):
        LatencyModel(table() | {"rows": table()["rows"][:-1]}, SPACE)
    with pytest.raises(ConfigError, match=r"\[\[3, 16\]\] is no subnet of this run"):
        LatencyModel(table() | {"subnets": [[[[3, 16]], 1.0, 1.0, 1.0]]}, SPACE)
    with pytest.raises(ConfigError, match="make it by: auricle bench --table"):
        LatencyModel({"threads": 1, "rows": []}, SPACE)
    with_threads = LatencyModel(table(threads=2), SPACE)
    assert with_threads.milliseconds(SPACE.smallest) == pytest.approx(99.0, rel=0.01), "the wall clock counts"


@pytest.mark.parametrize("encoder", ["transformer", "conformer"])
def test_megabytes_are_those_of_the_cut_model(encoder: str) -> None:
    values = {"data": {"shards": "none", "micro_batches": 4}, "frontend": {"name": "log_mel"}}
    elastic = {"blocks": [1, 2, 3], "heads": [1, 2], "ffn": [16, 64]}
    values |= {"encoder": small("encoders", encoder, layers=3), "objective": {"name": "distil", "elastic": elastic}}
    config = load(Config, values)
    found = LoadedCheckpoint(build_model(config), config, 0)
    for subnet in (((1, 16),), ((2, 16), (1, 64)), ((2, 64),) * 3):
        weights = sum(weight.numel() for weight in cut_subnet(found, subnet).module.model.parameters())
        assert megabytes(found, subnet) == pytest.approx(4e-6 * weights, rel=1e-9)
