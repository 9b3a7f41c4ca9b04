"""Runs functions as Ray tasks: starts or joins a cluster, bounds what is in flight, retries lost tasks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from data_pipeline.core.schema import ConfigError, about, config


@config
class RayConfig:
    """Where the work runs."""

    address: Annotated[str, about("of a running Ray cluster, or auto; empty starts a Ray on this machine")] = ""
    num_cpus: Annotated[int, about("cores of a Ray started here; 0 takes all", ge=0)] = 0
    dashboard: Annotated[bool, about("start Ray's dashboard on localhost")] = False
    attempts: Annotated[
        int, about("how often a unit is tried whose worker dies before it is given up and listed", ge=1)
    ] = 3


@contextlib.contextmanager
def cluster(config: RayConfig, show: bool = False) -> Iterator[Any]:
    """A Ray to work on: the one this process is connected to, the one at `address`, or a local one for the while.

    With `show`, says where its dashboard is, if it has one.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield ray
        return
    if config.address:
        try:
            context = ray.init(address=config.address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError) as error:
            raise ConfigError(f"ray.address={config.address}: no Ray cluster answers there ({error})") from None
    else:
        with _on_loopback():
            context = ray.init(
                address="local",
                num_cpus=config.num_cpus or None,
                include_dashboard=config.dashboard,
                dashboard_host="127.0.0.1",
                _node_ip_address="127.0.0.1",
                object_store_memory=100_000_000,
                log_to_driver=False,
                logging_level="ERROR",
            )
    try:
        if show and context.dashboard_url:
            Console(stderr=True).print(f"Ray dashboard: http://{context.dashboard_url}", highlight=False)
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that starts meanwhile listens on 127.0.0.1: it takes the address of the network otherwise, even if told."""
    from ray._private import ray_constants

    name, clusters = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    before = os.environ.get(name, str(int(clusters)))
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = before, clusters


def run_tasks(
    function: Callable[..., Any],
    arguments: Mapping[str, tuple[Any, ...]],
    config: RayConfig,
    advance: Callable[[Any], None],
) -> dict[str, str]:
    """Calls `function` once for each name, on Ray, a bounded number at a time; `advance` gets each result.

    Returns the names that failed and why. A task whose worker dies is tried again. Raises OSError if a task does.
    """
    import ray

    task = ray.remote(_at).options(name=function.__name__, num_cpus=1, max_retries=config.attempts - 1)
    limit = 2 * max(int(ray.cluster_resources().get("CPU", 1)), 1)
    directory = str(Path.cwd())
    waiting, failed = list(arguments)[::-1], dict[str, str]()
    running: dict[Any, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                name = waiting.pop()
                running[task.remote(directory, function, *arguments[name])] = name
            ready, _ = ray.wait(list(running), num_returns=1)
            for reference in ready:
                name = running.pop(reference)
                try:
                    advance(ray.get(reference))
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, OSError):
                        raise error.cause from None
                    failed[name] = f"{type(error.cause).__name__}: {error.cause}"
                except ray.exceptions.RayError as error:
                    failed[name] = f"its worker died {config.attempts} times ({type(error).__name__})"
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
    return failed


def _at(directory: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function` in the driver's working directory: relative paths of a config mean the same on every node."""
    os.chdir(directory)
    return function(*arguments)
