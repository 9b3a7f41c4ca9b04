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

USAGE = """auricle plan-run [the overrides of `auricle pretrain`] cluster=NODESxGPUSxKIND [mfu=0.3]

Memory per GPU for each ZeRO stage, operations, communication, and days to the end on 1 to 1,024 GPUs."""
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
    mfu = _share(own.get("mfu", "0.3"))
    measured = cost_model.measure(config)
    out = console()
    flops = measured.flops.of(config.data.max_seconds) / config.data.max_seconds / 1e9
    summary = (
        f": {measured.parameters / 1e6:.1f} M parameters; forward pass {flops:.1f} GFLOP per second of audio; "
        f"{_updates(config):,} updates of {config.data.batch_seconds / 60:.0f} min of audio{_iterations(config)}\n"
    )
    out.print(Text.assemble((visible(config.name), "bold"), summary))
    out.print(_memory(config, cluster, measured), _scaling(config, cluster, measured, mfu), sep="\n\n")
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


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"mfu={text}: must be a share of the GPU's peak, above 0 and at most 1")
    return share


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


def _scaling(config: PretrainJob, cluster: Cluster, measured: Measured, mfu: float) -> Table:
    columns = ("GPUs", "s of audio each", "step s", "sent GB", "not hidden s", "audio-h / GPU-h", "days", "")
    table = Table(*columns, title=f"with engine.zero_stage={config.engine.zero_stage}", title_justify="left", box=None)
    for gpus in sorted({*cost_model.counts(LARGEST), cluster.size}):
        f = cost_model.forecast(measured, config, cluster, gpus, mfu)
        note = "" if config.data.micro_batches % gpus == 0 else "data.micro_batches must be a multiple of it"
        if f.seconds_each < config.data.max_seconds:
            note = "less than one segment each: raise data.batch_seconds"
        table.add_row(
            *(str(gpus), f"{f.seconds_each:.1f}", f"{f.step:.3f}", f"{f.sent / 1e9:.2f}", f"{f.exposed:.3f}"),
            *(f"{config.data.batch_seconds / f.step / gpus:,.0f}", f"{f.step * _updates(config) / 86400:,.2f}", note),
            style="bold" if gpus == cluster.size else "",
        )
    return table
