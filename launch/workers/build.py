"""The composition root: builds the objects of a run from its config."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from data_pipeline.core.atomic_files import write_secret
from data_pipeline.core.json_object import DamagedFileError
from data_pipeline.core.jsonl import append_row
from data_pipeline.core.schema import ConfigError, dump
from data_pipeline.core.types import SAMPLE_RATE, StepReader
from data_pipeline.labels.store import LabelMetadata
from data_pipeline.loader.held_out import HeldOut
from data_pipeline.loader.reader import PlanReader
from data_pipeline.loader.streaming import StreamReader
from data_pipeline.loader.texts import TEXT
from data_pipeline.text.tokenizer import load_tokenizer
from launch.federation.flower import FlowerDevices
from launch.federation.ray_devices import RayDevices
from pretrain.checkpointing.locate import latest_checkpoint
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.compression.distillation import load_teacher
from pretrain.config import Config
from pretrain.engines import make_engine
from pretrain.engines.base import Engine
from pretrain.engines.distributed import DistributedContext
from pretrain.federated.secure_server import SecureEngine
from pretrain.federated.server import FederatedEngine, RoundReader
from pretrain.federated.transport import Devices
from pretrain.interfaces.configs import FrameLabels, TextHeadConfig
from pretrain.interop.init_weights import load_initial
from pretrain.nn.tuning import learned_share
from pretrain.profiling.operation_check import check_operations
from pretrain.train_module import TrainModule, build_model, least_samples, open_run_reader, read_run_held_out

LEFT_OUT = "left_out.jsonl"
"""List of the answers of devices that were left out, in the run folder of a federated run."""


@dataclass(frozen=True)
class Run:
    """Engine, reader and held-out audio of one rank."""

    engine: Engine
    reader: StepReader
    held_out: HeldOut | None


def require_fitting_labels(config: Config) -> None:
    """Raises ConfigError if labels that a head needs are not read, or frame labels do not fit the objective."""
    for name, head in config.heads.items():
        if missing := [label for label in head.segment_labels if label not in config.data.labels]:
            raise ConfigError(
                f"data.labels={list(config.data.labels)}: heads.{name} needs {missing[0]!r}, which is not read; "
                f"set data.labels={[*config.data.labels, *missing]}"
            )
        if isinstance(head, TextHeadConfig) and not head.tokens and head.label != TEXT:
            raise ConfigError(
                f"heads.{name}.label={head.label}: characters are those of the label {TEXT!r}, since a crop must lose "
                f"its text; make tokens with `auricle tokens label={head.label}`, and set "
                f"data.tokens.{head.label}=FOLDER heads.{name}.tokens={head.label}"
            )
        if config.data.crop_to_shortest and TEXT in head.segment_labels:
            raise ConfigError(
                f"data.crop_to_shortest=true: leaves hardly a segment with its text, which heads.{name} needs; set "
                "data.crop_to_shortest=false"
            )
        if head.needed_sources and not 0 < config.data.sources <= head.needed_sources:
            raise ConfigError(
                f"data.sources={config.data.sources}: heads.{name} separates {head.needed_sources} sources; set "
                f"data.sources={head.needed_sources} and data.augment.mix_prob"
            )
        for tokens, size in head.needed_tokens.items():
            _require_tokens(config, f"heads.{name}", tokens, size)
        for side, channels in head.image_shapes:
            _require_images(config, name, side, channels)
        for frames in head.frame_labels:
            _require_frame_labels(config, f"heads.{name}", frames)
    if config.data.lines and not any(head.lines_of for head in config.heads.values()):
        raise ConfigError(
            f"data.lines={config.data.lines}: no head learns from lines; leave it out, or train one with "
            "heads.NAME.name=units and direction=text_to_units"
        )
    if config.objective.frame_labels is not None:
        _require_frame_labels(config, "objective", config.objective.frame_labels)
        if config.data.valid:
            _require_labels_of_held_out(config, config.objective.frame_labels.name)


def _require_frame_labels(config: Config, part: str, wanted: FrameLabels) -> None:
    """Raises ConfigError if frame labels are not read, or have another rate or more classes than their user expects.

    part: the field of the config that holds their user, "objective" or "heads.NAME".
    """
    if wanted.name not in config.data.targets:
        raise ConfigError(
            f"{part}.{wanted.name_field}={wanted.name}: data.targets has no frame labels of this name, only "
            f"{sorted(config.data.targets)}; make them with `auricle targets` and set data.targets.{wanted.name}=FOLDER"
        )
    root = config.data.targets[wanted.name]
    found = LabelMetadata.read(root)
    if found.rate_hz != wanted.rate_hz:
        raise _mismatch(
            part,
            wanted,
            field=wanted.rate_field,
            needed=f"{wanted.rate_hz:g} Hz",
            found=f"{found.rate_hz} Hz",
            root=root,
        )
    if wanted.classes and found.classes > wanted.classes:
        here, there = f"{wanted.classes} classes", f"{found.classes} classes"
        raise _mismatch(part, wanted, field=wanted.classes_field, needed=here, found=there, root=root)


def _mismatch(part: str, wanted: FrameLabels, field: str, needed: str, found: str, root: str) -> ConfigError:
    """Returns the error for frame labels of another rate or number of classes; field: the one that chooses it, if any.

    needed, found: a number and its unit.
    """
    if field:
        value = found.split()[0]
        return ConfigError(
            f"{part}.{field}={needed.split()[0]}: the labels in {root} have {found}; set {part}.{field}={value}"
        )
    return ConfigError(
        f"{part}.{wanted.name_field}={wanted.name}: needs {needed}, and the labels in {root} have {found}; make others "
        f"with `auricle targets` and set data.targets.{wanted.name}=FOLDER"
    )


def _require_tokens(config: Config, field: str, name: str, size: int) -> None:
    """Raises ConfigError if a head's tokens are not read, or differ in number from its classes."""
    if name not in config.data.tokens:
        raise ConfigError(
            f"{field}.tokens={name}: data.tokens has no tokens of this name, only {sorted(config.data.tokens)}; make "
            f"them with `auricle tokens` and set data.tokens.{name}=FOLDER"
        )
    found = load_tokenizer(config.data.tokens[name]).size
    if found != size:
        raise ConfigError(
            f"{field}.vocabulary={size}: {config.data.tokens[name]} has {found} tokens; set {field}.vocabulary={found}"
        )


def _require_images(config: Config, head: str, side: int, channels: int) -> None:
    """Raises ConfigError if the images that a head needs are not read, or in another size."""
    images = config.data.images
    if (images.size, images.channels) != (side, channels):
        raise ConfigError(
            f"data.images.size={images.size}, data.images.channels={images.channels}: heads.{head} needs images of "
            f"{side} × {side} pixels and {channels} channels; set data.images.size={side} "
            f"data.images.channels={channels}"
        )


def require_symbols_of_texts(config: Config, texts: Callable[[str], list[str]], say: Callable[[str], None]) -> None:
    """Compares some texts with the symbols of the heads that write them.

    Args:
        config: the run's config.
        texts: returns a label of some segments.
        say: receives a line where more than a hundredth of the characters is not among a head's symbols.

    Raises:
        ConfigError: a head can write no character of any text.
    """
    for name, head in config.heads.items():
        if not isinstance(head, TextHeadConfig) or head.tokens:
            continue
        found = texts(head.label)
        written = [symbol for text in found for symbol in text.lower() if not symbol.isspace()]
        foreign = sum(symbol not in head.symbol_classes for symbol in written)
        if written and foreign == len(written):
            raise ConfigError(
                f"heads.{name}.symbols={head.symbols!r}: has no character of {len(found)} texts, such as "
                f"{found[0][:60]!r}; set it to their alphabet, or make tokens with `auricle tokens`"
            )
        if foreign > 0.01 * len(written):
            say(
                f"note: heads.{name}.symbols lacks {foreign / len(written):.1%} of the characters of {len(found)} "
                "texts; they are left out"
            )


def _require_labels_of_held_out(config: Config, name: str) -> None:
    """Raises ConfigError where the held-out audio has no frame labels, or others than the training audio."""
    root = config.data.targets[name]
    remedy = f"make them with `auricle targets shards={config.data.valid[0]} kmeans={root} out=FOLDER`"
    if name not in config.data.valid_targets:
        raise ConfigError(
            f"data.valid_targets has no {name}, which objective.labels reads: {remedy}, and set "
            f"data.valid_targets.{name}=FOLDER"
        )
    theirs = config.data.valid_targets[name]
    if LabelMetadata.read(theirs).artefact != LabelMetadata.read(root).artefact:
        raise ConfigError(f"data.valid_targets.{name}={theirs}: its labels are of other centres than {root}; {remedy}")


def _open_reader(config: Config, world: DistributedContext, say: Callable[[str], None]) -> StepReader:
    reader: StreamReader | PlanReader
    if config.data.reader == "webdataset":
        least = least_samples(config)
        reader = StreamReader(config.data, config.seed, world.rank, world.size, least_samples=least, say=say)
    else:
        reader = open_run_reader(config, world.rank, world.size)
    try:
        require_symbols_of_texts(config, reader.some_texts, say)
    except ConfigError:
        reader.close()
        raise
    if isinstance(reader, PlanReader) and reader.plan.too_short:
        seconds = reader.plan.constraints.shortest / SAMPLE_RATE
        say(
            f"note: {reader.plan.too_short} segments are left out: with this front end and these masks, a segment of "
            f"less than {seconds:g} s has no target; the plan is made as with data.min_seconds={seconds:g}"
        )
    return reader


def _listen(config: Config, world: DistributedContext, folder: RunFolder, say: Callable[[str], None]) -> Devices:
    """Starts to listen for the devices of a federated run."""
    if world.size > 1:
        raise ConfigError(f"engine.name=federated: the server is one process, and there are {world.size} ranks")
    settings = config.engine.federated
    if settings.transport == "ray":
        tasks = RayDevices(dump(config), settings.ray)
        say(f"{len(tasks.present())} devices answer as Ray tasks")
        return tasks
    devices = FlowerDevices(settings.server, folder.path / "flower", dump(config), say)
    say(f"devices connect by: auricle device server={settings.server} shards=FOLDER")
    return devices


def _server(
    config: Config, module: TrainModule, world: DistributedContext, folder: RunFolder, devices: Devices
) -> Engine:
    def note(step: int, device: str, reason: str) -> None:
        append_row(folder.path / LEFT_OUT, {"round": step, "device": device, "reason": reason})

    kind = SecureEngine if config.engine.federated.secure else FederatedEngine
    return kind(
        module,
        config,
        world,
        devices,
        run=secrets.token_hex(8),
        secret=_secret(folder),
        note=note,
    )


def _secret(folder: RunFolder) -> str:
    """Returns the secret that keys noise and samples of a run, made at its first start; only its owner reads it."""
    path = folder.path / "privacy.secret"
    if not path.exists():
        write_secret(path)
    return path.read_text(encoding="utf-8")


def learned_weights(tune: str, module: TrainModule) -> str:
    """Returns a line on the share of the weights that learn."""
    learned, total = learned_share(module.model)
    further = learned_share(module)[0] - learned
    return (
        f"tune={tune}: {learned:,} of {total:,} weights of front end and encoder learn ({learned / total:.2%}), and "
        f"{further:,} of heads and objective"
    )


def build(config: Config, world: DistributedContext, folder: RunFolder) -> Run:
    """Builds engine and reader for one rank of the run in `folder`.

    Args:
        config: the run's config.
        world: this rank and the number of ranks.
        folder: the run folder; if it has a checkpoint, `config.init` is not read.

    Returns:
        The engine with initial weights (no checkpoint is loaded here), and the reader at the start of the plan.

    Raises:
        ConfigError: the config cannot work on this machine or with this data.
        ValueError: shards, labels or initial weights are damaged.
        OSError: shards, labels or initial weights cannot be read.
    """
    say = print if world.rank == 0 else lambda line: None
    federated = config.engine.name == "federated"
    if not federated:
        require_fitting_labels(config)
    reader: StepReader | None = None if federated else _open_reader(config, world, say)
    try:
        module = build_model(config)
    except DamagedFileError:
        raise
    except ValueError as error:  # else the model depends on the config alone
        raise ConfigError(str(error)) from error
    if config.tune.name != "full":
        say(learned_weights(config.tune.name, module))
    load_teacher(config, module.objective)
    check_operations(module, world.device, module.autocast, say)
    if config.init and latest_checkpoint(folder.checkpoints) is None:  # a resume loads its own weights
        load_initial(config, module, say)
    if reader is None:
        devices = _listen(config, world, folder, say)
        reader, engine = RoundReader(devices), _server(config, module, world, folder, devices)
    else:
        engine = make_engine(config, module, world)
    held_out = read_run_held_out(config, world.rank, world.size)
    if held_out is not None:
        where = ", ".join(config.data.valid)
        say(f"held-out audio: {held_out.seconds:.0f} s in {held_out.segments} segments of {where}")
    return Run(engine, reader, held_out)
