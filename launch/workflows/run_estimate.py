"""Prints an estimate of memory, time and communication of a run on a cluster."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.text import visible
from launch.cli.tables import console
from launch.config import PretrainJob
from pretrain.config import Config
from pretrain.federated import estimate
from pretrain.profiling import cost_model
from pretrain.profiling.cost_model import GIB, Cluster, Measured
from pretrain.profiling.hardware import GPUS

PUBLISHED = "0.09-0.11"
"""MFU of published speech pretraining on an H100 (docs/findings.md)."""
LARGEST = 1024


def show_federated(config: PretrainJob, devices: str = "") -> None:
    """Prints rounds and bytes of a federated run.

    Args:
        config: the run.
        devices: number of devices; empty: some examples.

    Raises:
        ConfigError: `devices` is not a number above 0.
    """
    if devices and not (devices.isdigit() and int(devices)):
        raise ConfigError(f"devices={devices}: the number of devices, 1 or more")
    settings, one = config.engine.federated, estimate.exchange(config)
    out = console()
    asked = min(settings.per_round, int(devices or settings.per_round))
    out.print(
        Text.assemble((visible(config.name), "bold")),
        f": {_updates(config):,} rounds of {settings.per_round} devices; a round sends each of them "
        f"{one.sent / 1e6:.1f} MB and receives {one.received / 1e6:.1f} MB: "
        f"{asked * (one.sent + one.received) / 1e6:,.0f} MB at the server, and "
        f"{_updates(config) * asked * (one.sent + one.received) / 1e9:,.1f} GB in the run"
        + (f"; {one.once / 1e6:.1f} MB that do not learn go to each device once\n" if one.once >= 1e5 else "\n"),
        sep="",
    )
    columns = ("devices", "rounds of one", "its audio, minutes", "sent to it, MB", "received, MB")
    table = Table(*columns, title="of each device, where all answer", title_justify="left", box=None)
    for number in [int(devices)] if devices else (100, 1_000, 10_000):
        part = estimate.share(config, one, number)
        table.add_row(
            f"{number:,}",
            *(f"{part.rounds:,.1f}", f"{part.seconds / 60:,.1f}"),
            *(f"{part.exchange.sent / 1e6:,.1f}", f"{part.exchange.received / 1e6:,.1f}"),
        )
    out.print(table)


def show(config: PretrainJob, cluster: str = "1x8xH100", mfu: str = "", measured: str = "") -> None:
    """Prints the estimate.

    Args:
        config: the run.
        cluster: NODESxGPUSxKIND.
        mfu: share of the peak that is reached, or LOW-HIGH; empty: `PUBLISHED`.
        measured: JSON file of benchmarks/gpu.sh or benchmarks/train_step.py, instead of `mfu`.

    Raises:
        ConfigError: cluster or mfu is malformed, mfu and measured are both given, or the file has no such row.
    """
    if mfu and measured:
        raise ConfigError("mfu= and measured=: give one of them")
    where, shares = cost_model.parse_cluster(cluster), _shares(mfu or PUBLISHED)
    model = cost_model.measure(config)
    if measured:
        rate = cost_model.measured_rate(Path(measured), config)
        shares = (cost_model.utilisation(model, config, where, rate),) * 2
    out = console()
    flops = model.flops.of(config.data.max_seconds) / config.data.max_seconds / 1e9
    summary = (
        f": {model.parameters / 1e6:.1f} M parameters; forward pass {flops:.1f} GFLOP per second of audio; "
        f"{_updates(config):,} updates of {config.data.batch_seconds / 60:.0f} min of audio{_iterations(config)}\n"
    )
    out.print(Text.assemble((visible(config.name), "bold"), summary))
    out.print(_memory(config, where, model), _scaling(config, where, model, shares), sep="\n\n")
    out.print(Text(f"\n{LEGEND}"))
    out.print(Text("\nassumed", style="bold"))
    for name, text in cost_model.assumptions(config, where, shares).items():
        out.print(f"  {name}: {text}")


def _updates(config: PretrainJob) -> int:
    """Returns the number of updates, over all iterations if the experiment is a chain."""
    return sum(iteration.steps for iteration in config.chain.values()) or config.train.steps


def _iterations(config: PretrainJob) -> str:
    if not config.chain:
        return ""
    counted = " + ".join(f"{name} {iteration.steps:,}" for name, iteration in config.chain.items())
    return f" ({counted}; the labels in between are not counted)"


def _shares(text: str) -> tuple[float, float]:
    """Returns (lowest, highest) share of the peak. Raises ConfigError."""
    try:
        shares = [float(part) for part in text.split("-")]
    except ValueError:
        shares = []
    if len(shares) not in (1, 2) or not 0 < shares[0] <= shares[-1] <= 1:
        raise ConfigError(f"mfu={text}: a share of the GPU's peak, above 0 and at most 1, or two as in {PUBLISHED}")
    return shares[0], shares[-1]


def _memory(config: Config, cluster: Cluster, measured: Measured) -> Table:
    capacity = GPUS[cluster.kind].memory
    activations = cost_model.activation_bytes(measured, config) / GIB
    title = f"GiB per GPU on {cluster.nodes} × {cluster.gpus} {cluster.kind} ({capacity:g} GiB)"
    table = Table("ZeRO", "states", "activations", "sum", "", title=title, title_justify="left", box=None)
    for stage in range(4):
        states = cost_model.state_bytes(measured, stage, cluster.size) / GIB
        note = "fits" if states + activations < 0.8 * capacity else "too much: raise data.micro_batches"
        table.add_row(str(stage), f"{states:.2f}", f"{activations:.2f}", f"{states + activations:.2f}", note)
    return table


def _scaling(config: PretrainJob, cluster: Cluster, measured: Measured, mfu: tuple[float, float]) -> Table:
    """Returns the table of the forecast, at most 80 columns wide; a range is from the highest to the lowest MFU."""
    columns = ("GPUs", "audio s", "step s", "sent GB", "waits s", "speed", "days", "")
    table = Table(*columns, title=f"with engine.zero_stage={config.engine.zero_stage}", title_justify="left", box=None)
    for gpus in sorted({*cost_model.counts(LARGEST), cluster.size}):
        low, high = (cost_model.forecast(measured, config, cluster, gpus, share) for share in mfu)
        mark = "" if config.data.micro_batches % gpus == 0 else "*"
        mark += "†" if low.seconds_each < config.data.max_seconds else ""
        audio = [f"{config.data.batch_seconds / f.step / gpus:,.0f}" for f in (low, high)]
        days = [f"{f.step * _updates(config) / 86400:,.2f}" for f in (high, low)]
        table.add_row(
            *(str(gpus), f"{low.seconds_each:.1f}", _range(f"{high.step:.3f}", f"{low.step:.3f}")),
            *(f"{low.sent / 1e9:.2f}", f"{high.exposed:.2f}", _range(*audio), _range(*days), mark),
            style="bold" if gpus == cluster.size else "",
        )
    return table


LEGEND = """audio s: audio per update of the busiest GPU; step s: one update;
sent GB, waits s: gradients sent per GPU and update, and the part of that time
which the backward pass does not hide; speed: × real time of each GPU;
days: to the last update
*  does not divide data.micro_batches: some GPUs idle in the last round
†  less than one segment for each GPU: raise data.batch_seconds"""


def _range(low: str, high: str) -> str:
    """Returns two figures as a range, and equal ones as one."""
    return low if low == high else f"{low}–{high}"
