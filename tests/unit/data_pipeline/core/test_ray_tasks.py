"""Ray clusters that were started before this process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline.core import plugins
from data_pipeline.core.ray_tasks import RayConfig, cluster


def test_workers_of_a_running_cluster_get_the_plug_in_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.delenv(plugins.VARIABLE, raising=False)
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        monkeypatch.setenv(plugins.VARIABLE, str(tmp_path))
        with cluster(RayConfig(address=started.address)) as ray:
            given = ray.remote(lambda: os.environ.get(plugins.VARIABLE)).remote()
            assert ray.get(given, timeout=120) == str(tmp_path)
    finally:
        started.shutdown()
