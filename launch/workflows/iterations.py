"""Pretraining in iterations (HuBERT): labels → training → labels from a layer of that model → training → …

Each link is a separate command line, `auricle targets …` or `auricle pretrain …`, so it can be run alone, queued, and
continued after a kill like any other. The files on disk determine which links are finished.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.core.schema import ConfigError
from data_pipeline.labels.kmeans import all_labelled
from launch.cli import request
from launch.cli.compose import compose
from launch.config import Iteration, PretrainJob, TargetsJob
from launch.exit_codes import ExitCode
from launch.launchers.status import require_ended
from launch.runs import metadata
from launch.runs.job_record import read_record
from pretrain.checkpointing.locate import steps_done
from pretrain.interop.fingerprint import weights_of

LABELS = "units"
"""Name of the frame labels in data.targets of the trainings."""
MFCC_HZ = 100.0
"""Rate of labels from MFCC, in Hz."""

Command = Callable[[list[str]], int]


@dataclass(frozen=True)
class Link:
    """One command line of a chain."""

    name: str
    command: Literal["targets", "pretrain"]
    arguments: tuple[str, ...]
    folder: Path
    """Its run folder."""
    needs: str = ""
    """Name of the link whose result it uses; "" for none."""

    def finished(self) -> bool:
        """Returns whether the link is finished. Raises ConfigError if it was finished with another config."""
        if not self.folder.exists():
            return False
        if self.command == "targets":
            labels = request.config_of("targets", TargetsJob, self.arguments)
            try:
                weights = weights_of(labels)
            except (ValueError, OSError):
                weights = ""  # the model was removed since; its labels remain valid
            return all_labelled(labels, weights)
        config = request.config_of("pretrain", PretrainJob, self.arguments)
        if steps_done(self.folder) < config.train.steps:
            return False
        metadata.prepare(config)
        return True


def run(config: PretrainJob, arguments: Sequence[str], commands: Mapping[str, Command]) -> int:
    """Runs or queues the links that are not finished, in order.

    Args:
        config: the config of the chain.
        arguments: the command line from which it was composed.
        commands: functions that run a command line and return its exit code, by command.

    Returns:
        0, or the exit code of the first link that failed.

    Raises:
        ConfigError: the chosen link needs another one that is not finished.
    """
    switches = [argument for argument in arguments if argument.startswith("-")]
    every = links(config, [argument for argument in arguments if not argument.startswith("-")])
    if switches and not config.link:
        if switches != ["--dry-run"]:
            raise ConfigError(f"{switches[0]} is for one link of a chain: {', '.join(f'link={x.name}' for x in every)}")
        print("\n".join(request.shell_line(link.command, link.arguments) for link in every))
        return ExitCode.DONE
    for link in every:
        if config.link in ("", link.name) and not switches and not link.finished():
            require_ended(link.folder)
    queued = config.launcher.queued
    done, after = {""}, ""
    for link in every:
        if link.finished():
            done.add(link.name)
            print(f"{link.name}: {link.folder} is complete", flush=True)
        elif config.link in ("", link.name):
            if link.needs not in done and not queued:
                raise ConfigError(
                    f"link={link.name} needs {link.needs}: run link={link.needs} first, or leave link out"
                )
            print(f"{link.name}: {request.shell_line(link.command, link.arguments)}", flush=True)
            dependency = [f"launcher.after={after}"] if after else []
            if code := commands[link.command]([*link.arguments, *dependency, *switches]):
                return code
            done.add(link.name)
            after = read_record(link.folder).handle if queued and not switches else ""
    return ExitCode.DONE


def links(config: PretrainJob, overrides: Sequence[str]) -> list[Link]:
    """Returns the links of `config.chain`, in order.

    Raises:
        ConfigError: an override sets a field that the chain sets itself, or `link` names an unknown link.
    """
    given = {line.lstrip("+").partition("=")[0] for line in overrides}
    if wrong := given & {"train.steps", "objective.labels", "objective.label_rate_hz", "objective.units"}:
        names = ", ".join(f"chain.{name}.steps" for name in config.chain)
        raise ConfigError(
            f"{min(wrong)}: each iteration of the chain has its own; set {names} and the like, or leave the chain out "
            "with ~chain"
        )
    common = [line for line in overrides if line.lstrip("+").partition("=")[0] not in ("name", "link")]
    common = [line for line in common if not line.lstrip("+~").startswith("chain")]
    without = ["~chain"] if "chain" in compose("pretrain", common) else []
    launcher = [line for line in common if line.lstrip("+").startswith("launcher")]
    found: list[Link] = []
    for name, iteration in config.chain.items():
        run_name, features, rate_hz, needs = f"{config.name}-{name}", *_features(config, iteration, found)
        folder = Path(config.runs) / f"{run_name}-labels"
        labels = folder / "labels"
        targets = [
            f"shards={listed(config.data.shards)}", f"out={labels}", f"features={features}", f"layer={iteration.layer}",
            f"classes={iteration.classes}", f"fraction={iteration.fraction}", f"seed={config.seed}",
            f"runs={config.runs}", f"name={folder.name}", *launcher,
        ]  # fmt: skip
        training = [
            *common, *iteration.overrides, *without, f"name={run_name}", f"train.steps={iteration.steps}",
            f"objective.labels={LABELS}", f"objective.units={iteration.classes}", f"objective.label_rate_hz={rate_hz}",
            f"data.targets.{LABELS}={labels}",
        ]  # fmt: skip
        found.append(Link(f"{name}-labels", "targets", tuple(targets), folder, needs))
        found.append(Link(name, "pretrain", tuple(training), Path(config.runs) / run_name, f"{name}-labels"))
    if config.link and config.link not in (known := [link.name for link in found]):
        raise ConfigError(f"link={config.link}: the chain has no such link; there are: {', '.join(known)}")
    return found


def _features(config: PretrainJob, iteration: Iteration, before: list[Link]) -> tuple[str, float, str]:
    """Returns the features of an iteration's labels, their rate in Hz, and the link that must be finished first."""
    last = before[-1] if before and not iteration.features else None
    features = iteration.features or "mfcc"
    if last is not None:
        steps = config.chain[last.name].steps
        features = str(last.folder / "checkpoints" / f"step_{steps:08d}")
    rate_hz = MFCC_HZ if features == "mfcc" else iteration.rate_hz or _frames_hz(config)
    return features, rate_hz, last.name if last else ""


def _frames_hz(config: PretrainJob) -> float:
    import torch

    from pretrain import registry

    with torch.device("meta"):
        return registry.build_frontend(config.frontend, config.encoder.dim).rate_hz


def listed(places: Sequence[str]) -> str:
    """Returns one place, or several as the value of an override."""
    return places[0] if len(places) == 1 else f"[{','.join(places)}]"
