"""Ray clusters that were started before this process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PROGRAM = """
import os
import sys
from ray.cluster_utils import Cluster
from data_pipeline.core import plugins
from data_pipeline.core.ray_tasks import RayClusterConfig, cluster
os.environ.pop(plugins.VARIABLE, None)
started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
os.environ[plugins.VARIABLE] = sys.argv[1]
with cluster(RayClusterConfig(address=started.address)) as ray:
    given = ray.remote(lambda: os.environ.get(plugins.VARIABLE)).remote()
    print("given:", ray.get(given, timeout=120))
started.shutdown()
"""


@pytest.mark.slow
def test_workers_of_a_running_cluster_get_the_plug_in_folders(tmp_path: Path) -> None:
    """In a process of its own, since tests share a Ray to which this one is connected."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=240, check=False)
    assert f"given: {tmp_path}" in done.stdout, done.stderr[-2000:]
