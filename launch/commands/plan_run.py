"""auricle plan-run: estimates memory, time and communication of a run on a cluster."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.text import visible
from launch.cli import request
from launch.cli.tables import console
from launch.config import PretrainJob
from launch.exit_codes import ExitCode
from pretrain.config import Config
from pretrain.profiling import cost_model
from pretrain.profiling.cost_model import GIB, Cluster, Measured
from pretrain.profiling.hardware import GPUS

USAGE = """auricle plan-run [the overrides of `auricle pretrain`] cluster=NODESxGPUSxKIND [mfu=0.09-0.11]

Memory per GPU for each ZeRO stage, operations, communication, and days to the
end on 1 to 1,024 GPUs. mfu is the share of the GPU's peak that is reached, one
figure or LOW-HIGH; published speech pretraining reaches 9 to 11 % on an H100,
and perf/mfu of a run on your GPUs is the better figure."""
PUBLISHED = "0.09-0.11"
"""MFU of published speech pretraining on an H100 (docs/findings.md)."""
LARGEST = 1024


def run(arguments: list[str]) -> int:
    """Prints the estimate; returns 0."""
    pairs = [line.partition("=") for line in arguments]
    own = {name: value for name, _, value in pairs if name in ("cluster", "mfu")}
    rest = [line for line in arguments if line.partition("=")[0] not in own]
    if "--help" in rest or "-h" in rest:
        print(USAGE)
        return ExitCode.DONE
    if not any(line.startswith("data.shards=") for line in rest):
        rest.append("data.shards=none")  # nothing is read
    given = request.read("pretrain", PretrainJob, rest)
    if given is None:
        return ExitCode.DONE
    config, cluster = given.config, cost_model.parse_cluster(own.get("cluster", "1x8xH100"))
    mfu = _shares(own.get("mfu", PUBLISHED))
    measured = cost_model.measure(config)
    out = console()
    flops = measured.flops.of(config.data.max_seconds) / config.data.max_seconds / 1e9
    summary = (
        f": {measured.parameters / 1e6:.1f} M parameters; forward pass {flops:.1f} GFLOP per second of audio; "
        f"{_updates(config):,} updates of {config.data.batch_seconds / 60:.0f} min of audio{_iterations(config)}\n"
    )
    out.print(Text.assemble((visible(config.name), "bold"), summary))
    out.print(_memory(config, cluster, measured), _scaling(config, cluster, measured, mfu), sep="\n\n")
    out.print(Text(f"\n{LEGEND}"))
    out.print(Text("\nassumed", style="bold"))
    for name, text in cost_model.assumptions(config, cluster, mfu).items():
        out.print(f"  {name}: {text}")
    return ExitCode.DONE


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
    columns = ("GPUs", "audio s", "step s", "sent GB", "waits s", "h/GPU-h", "days", "")
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
which the backward pass does not hide; h/GPU-h: hours of audio per GPU-hour;
days: to the last update
*  does not divide data.micro_batches: some GPUs idle in the last round
†  less than one segment for each GPU: raise data.batch_seconds"""


def _range(low: str, high: str) -> str:
    """Returns two figures as a range, and equal ones as one."""
    return low if low == high else f"{low}–{high}"
