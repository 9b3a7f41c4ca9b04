"""A small local Ray cluster shared by all preprocessing tests that need one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from data_pipeline.core.ray_tasks import RayClusterConfig, cluster


@pytest.fixture(scope="package")
def local_ray() -> Iterator[None]:
    """Starts a local Ray with two workers; `preprocess` uses it instead of starting its own."""
    with cluster(RayClusterConfig(num_cpus=2)):
        yield
