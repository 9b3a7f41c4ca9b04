"""Optimizer states on disk give the same losses as in memory; missing requirements are reported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import pytest

from data_pipeline.core.schema import ConfigError, load
from pretrain.config import Config
from pretrain.engines import make_engine
from pretrain.engines.distributed import DistributedContext
from pretrain.train_module import build_model
from tests.support.engine_runs import case, furthest, run

ON_DISK = 4
"""Steps. The model is larger than the size per rank and group (1 MiB) below which DeepSpeed keeps states in memory."""


NINJA = Path(sys.executable).parent / "ninja"
"""The ninja that built the operator; another one would rebuild it."""


def test_missing_requirements_of_nvme_offload_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", lambda *_, **__: False)
    config = load(Config, case("deepspeed", 3, {"offload": "nvme", "offload_folder": "/nowhere"})["config"])
    with pytest.raises(ConfigError, match="install libaio-dev"):
        make_engine(config, build_model(config), DistributedContext())


def built() -> str:
    """Returns why DeepSpeed's disk operator is not built yet, according to ninja; compiling it takes minutes."""
    from torch.utils.cpp_extension import get_default_build_root

    for name in ("pin_memory", "async_io"):
        found = list(Path(get_default_build_root()).glob(f"*/{name}/build.ninja"))
        answers = [subprocess.run([NINJA, "-n", "-C", file.parent], capture_output=True, text=True) for file in found]
        here = str(Path(deepspeed.__file__).parent)
        pairs = zip(found, answers, strict=True)
        ready = [here in file.read_text() and "no work" in answer.stdout for file, answer in pairs]
        if not any(ready):
            return f"DeepSpeed's {name} is not built in this environment; the first start with offload=nvme does that"
    return ""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_states_on_a_disk_give_the_same_losses_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := built():
        pytest.skip(reason)
    monkeypatch.setenv("PATH", f"{NINJA.parent}:{os.environ['PATH']}")

    def large(stage: int = 3, **more: Any) -> dict[str, Any]:
        settings = {"offload": "nvme", "offload_folder": str(tmp_path / "disk")} if more.pop("disk", True) else {}
        made = case("deepspeed", stage, settings, **more) | {"steps": more.get("steps", ON_DISK)}
        made["config"]["encoder"] |= {"dim": 192, "heads": 4, "ffn_dim": 768, "layers": 4, "layer_drop": 0.3}
        return made

    cases = {"memory": large(disk=False), "disk": large()}
    cases["first half"] = large(steps=2, save=str(tmp_path / "saved"))
    cases["second half"] = large(load=str(tmp_path / "saved"))
    cases["back in memory"] = large(disk=False, load=str(tmp_path / "saved"))
    measured = run(tmp_path, "disk", 2, cases)
    files = [file.stat().st_size for file in (tmp_path / "disk").rglob("*.swp")]
    assert len(files) >= 6, "weights and both moments of two ranks"
    assert min(files) >= 1 << 20
    whole = measured["memory"]["losses"]
    assert furthest(measured["disk"]["losses"], whole) <= 1e-6
    assert furthest(measured["second half"]["losses"], whole[2:]) <= 1e-6
    assert furthest(measured["back in memory"]["losses"], whole[2:]) <= 1e-6
    assert measured["disk"]["norms"] == pytest.approx(measured["memory"]["norms"], rel=1e-5)
