"""The estimate of bytes is that of the messages of a run."""

from __future__ import annotations

from typing import Any

import pytest

from launch.exit_codes import ExitCode
from launch.main import main
from pretrain.federated.estimate import exchange, share
from pretrain.interfaces.frames import StepContext
from tests.support.federation import server, settings, synthetic_devices

LORA = {"name": "lora", "rank": 2, "alpha": 4.0}


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "secure"])
@pytest.mark.parametrize("tune", [{}, LORA], ids=["all weights", "lora"])
def test_bytes_of_rounds_are_those_of_their_messages(tune: dict[str, Any], secure: bool) -> None:
    config = settings({"per_round": 3, "min_devices": 3, "secure": secure}, **({"tune": tune} if tune else {}))
    one = exchange(config)
    engine = server(config, synthetic_devices(config, 3))
    names = 20_000  # of tensors, and the metrics
    for step, once in enumerate((one.once, 0)):
        found = engine.step([], StepContext(config.seed, step), 1e-3).metrics
        assert 0 <= found["federated/bytes_sent"][0][0] / 3 - one.sent - once < names
        assert 0 <= found["federated/bytes_received"][0][0] / 3 - one.received < names
    assert (one.once > one.sent) == (bool(tune) and not secure)


def test_shares_of_all_devices_add_up_to_the_run() -> None:
    config = settings({"per_round": 4})
    one, devices = exchange(config), 1000
    part = share(config, one, devices)
    assert part.rounds * devices == pytest.approx(config.train.steps * 4)
    assert part.seconds * devices == pytest.approx(config.train.steps * config.data.batch_seconds)
    assert part.exchange.received * devices == pytest.approx(config.train.steps * 4 * one.received, rel=1e-3)


def test_plan_run_prints_the_share_of_ten_thousand_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan-run", "+experiment=federated_tiny", "devices=10000"]) == ExitCode.DONE
    printed = capsys.readouterr().out
    assert "300 rounds of 8 devices" in printed
    assert "10,000" in printed
    for wrong in ("devices=0", "cluster=1x8xH100"):
        assert main(["plan-run", "+experiment=federated_tiny", wrong]) == ExitCode.USAGE
