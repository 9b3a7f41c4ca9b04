"""Runs functions as Ray tasks: starts or joins a cluster, limits tasks in flight, retries lost tasks."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from data_pipeline.core import plugins
from data_pipeline.core.schema import ConfigError, about, config, refuse

_HOST_PORT = r"(?:\[[0-9A-Fa-f:.]+\]|[0-9A-Za-z](?:[0-9A-Za-z._-]*[0-9A-Za-z])?):[0-9]{1,5}"
_ADDRESS = re.compile(rf"auto|local|(?:ray://)?{_HOST_PORT}")
_DASHBOARD = re.compile(rf"https?://(?:{_HOST_PORT}|[0-9A-Za-z](?:[0-9A-Za-z._-]*[0-9A-Za-z])?)(?:/[0-9A-Za-z._/-]*)?")
ADDRESS = "ray.address"
"""Field of the cluster's address, where the launcher does not set it."""


def refuse_foreign_address(field: str, value: str) -> None:
    """Raises ConfigError unless `value` is empty or the address of a Ray cluster.

    Ray imports the module that an address of another form names: `evilmod://x` would run `evilmod`.
    """
    if value and not _ADDRESS.fullmatch(value):
        refuse(field, value, "auto, local, HOST:PORT, or ray://HOST:PORT")


def refuse_foreign_dashboard(field: str, value: str) -> None:
    """Raises ConfigError unless `value` is empty or the http address of a dashboard, for the same reason."""
    if value and not _DASHBOARD.fullmatch(value):
        refuse(field, value, "http://HOST:PORT or https://HOST:PORT")


def require_answer(address: str, seconds: float, field: str = ADDRESS) -> None:
    """Raises ConfigError, which names `field`, if no Ray cluster answers in time; Ray would try for 40 s or more."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host:
            socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
        # in a process that can be killed: calls into Ray's library cannot be interrupted
        command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
        if address.startswith("ray://"):  # the health check does not know this protocol
            command = [sys.executable, "-c", "import ray, sys; ray.init(sys.argv[1])", address]
        done = subprocess.run(
            command, timeout=seconds, capture_output=True, encoding="utf-8", errors="replace", check=False
        )
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["it is not a healthy Ray cluster"]
            raise ConnectionError(lines[-1])
    except subprocess.TimeoutExpired:
        reason = f"no answer of a Ray cluster within {seconds:g} s"
    except (OSError, OverflowError) as error:
        reason = str(error)
    else:
        return
    raise ConfigError(
        f"{field}={address}: no Ray cluster answers there ({reason}); check the address, and `ray status`"
    )


@config
class RayClusterConfig:
    """Ray cluster that runs the work, and its attempts."""

    address: Annotated[str, about("address of a running Ray cluster, or auto; empty: start Ray on this machine")] = ""
    num_cpus: Annotated[int, about("cores of a Ray started here; 0: all", ge=0)] = 0
    dashboard: Annotated[bool, about("start Ray's dashboard on localhost")] = False
    answer_seconds: Annotated[float, about("time in which the cluster must answer", gt=0)] = 20.0
    attempts: Annotated[int, about("attempts at a unit whose worker dies, before it is listed as failed", ge=1)] = 3

    def __post_init__(self) -> None:
        """Refuses addresses for which Ray would import a module."""
        refuse_foreign_address("address", self.address)


@contextlib.contextmanager
def cluster(config: RayClusterConfig, show: bool = False, field: str = ADDRESS) -> Iterator[Any]:
    """Provides Ray in the block: the connected cluster, the one at `address`, or a local one that is then stopped.

    With `show`, prints the address of its dashboard, if it has one. `field` is the field of `address` in errors.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    keep_token_private()
    import ray

    if ray.is_initialized():
        yield ray
        return
    if config.address and config.address != "local":
        require_answer(config.address, config.answer_seconds, field)
        try:
            context = ray.init(
                address=config.address, runtime_env=_passed_on(), log_to_driver=False, logging_level="ERROR"
            )
        except (ConnectionError, RuntimeError) as error:
            raise ConfigError(f"{field}={config.address}: no Ray cluster answers there ({error})") from None
    else:
        with _on_loopback(), _start_failures_as_os_errors():
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


def _passed_on() -> dict[str, Any] | None:
    """Returns the runtime environment that gives workers on other nodes the plug-in folders of this process.

    Those of a Ray Job have it from the job, and Ray refuses to set a variable twice.
    """
    folders = os.environ.get(plugins.VARIABLE)
    if not folders or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        return None
    return {"env_vars": {plugins.VARIABLE: folders}}


def process_capacity(cpus: int, gpus: int) -> int:
    """Returns the number of processes with these cores and GPUs that the live nodes can hold, ignoring their load."""
    import ray

    found = 0
    for node in ray.nodes():
        if node["Alive"]:
            resources = node["Resources"]
            found += int(min(resources.get("CPU", 0) // cpus, resources.get("GPU", 0) // gpus if gpus else 1 << 30))
    return found


def cluster_contents() -> str:
    """Returns the size of the cluster in words, for messages."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    return f"it has {len(nodes)} nodes with {cores:g} cores and {gpus:g} GPUs in total"


def keep_token_private() -> None:
    """Makes ~/.ray accessible to its owner only: Ray stores the cluster's token there, readable for everyone."""
    folder = Path.home() / ".ray"
    with contextlib.suppress(OSError):  # without write access to the home folder there is no token either
        folder.mkdir(mode=0o700, exist_ok=True)
        folder.chmod(0o700)
        for token in folder.glob("auth_token*"):
            token.chmod(0o600)


@contextlib.contextmanager
def _start_failures_as_os_errors() -> Iterator[None]:
    """Raises OSError if Ray does not start, such as on an overloaded machine; Ray raises a plain Exception."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"Ray could not be started on this machine ({error}); the same command tries again") from error


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Makes a Ray that starts in the block listen on 127.0.0.1; otherwise it ignores the given address."""
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
    arguments: Iterable[tuple[str, tuple[Any, ...]]],
    config: RayClusterConfig,
    advance: Callable[[Any], None],
) -> dict[str, str]:
    """Calls `function` for each name as a Ray task, a limited number at a time. Tasks whose worker dies are retried.

    Args:
        function: the function.
        arguments: (name, arguments of the function) of each task; they are made when the task can begin.
        config: number of attempts.
        advance: called with each result.

    Returns:
        The reasons of failed tasks, by name.

    Raises:
        OSError: a task raised it.
    """
    import ray

    task = ray.remote(_at).options(name=function.__name__, num_cpus=1, max_retries=config.attempts - 1)
    limit = 2 * max(int(ray.cluster_resources().get("CPU", 1)), 1)
    directory = str(Path.cwd())
    waiting, failed = iter(arguments), dict[str, str]()
    running: dict[Any, str] = {}
    try:
        while True:
            for name, given in itertools.islice(waiting, limit - len(running)):
                running[task.remote(directory, function, *given)] = name
            if not running:
                break
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
    """Calls `function` in the driver's working directory, to which relative paths of a config refer on every node."""
    os.chdir(directory)
    return function(*arguments)
