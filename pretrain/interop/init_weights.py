"""Initial weights (`init=`) from a Hugging Face folder or another run.

Weights of equal shape can belong to another architecture, so the configs are compared as well. Attention patterns and
regularisation may differ: a model with full attention may become a streaming one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.core.schema import ConfigError, dump, load
from data_pipeline.text.tokenizer import load_tokenizer
from pretrain.checkpointing.locate import find_checkpoint
from pretrain.checkpointing.stored import read_state
from pretrain.checkpointing.token_sets import saved_tokens
from pretrain.checkpointing.weights import LoadedCheckpoint, merged
from pretrain.config import Config
from pretrain.interop import hf_folder
from pretrain.interop.hf_export import load_run, run_checkpoint
from pretrain.interop.hf_names import from_hugging_face, objective_from_hugging_face
from pretrain.nn.tuning import is_added
from pretrain.train_module import TrainModule

FREE = {
    *("dropout", "attention_dropout", "activation_dropout", "layer_drop", "stochastic_depth", "gradient_scale"),
    *("attention", "attention_kernel", "window", "full_every", "registers", "chunk_frames", "left_chunks"),
}
"""Fields of front ends and encoders that may differ. (Registers are weights; missing ones are found by name.)"""
FIXED = {"hidden_act": "gelu", "feat_extract_activation": "gelu", "layer_norm_eps": 1e-5, "conv_pos_batch_norm": False}
"""Values that every model here has, by the names of Hugging Face's config.json."""
TYPES = ("wav2vec2", "hubert", "wavlm", "data2vec-audio")


class Taken(NamedTuple):
    """Names of the weights that `init=` loaded (model, objective, heads), left unused, and created randomly (made)."""

    model: list[str]
    objective: list[str]
    left: list[str]
    made: list[str]
    heads: list[str] = []  # noqa: RUF012  # of a tuple, which nothing appends to

    def lines(self, where: str) -> list[str]:
        """Returns the report; `where` is the value of `init=`."""
        objective = f"{len(self.objective)} of the objective ({_some(self.objective)})" if self.objective else "none"
        found = [f"init={where}: {len(self.model)} weights of front end and encoder taken, and {objective}"]
        if self.heads:
            found.append(f"  heads: {len(self.heads)} weights taken ({_some(self.heads)})")
        if self.left:
            found.append(f"  left unused in the checkpoint: {_some(self.left)}")
        if self.made:
            found.append(f"  new, with random values: {_some(self.made)}")
        return found


def load_initial(config: Config, module: TrainModule, say: Callable[[str], None] = lambda line: None) -> Taken:
    """Loads front end, encoder and, where possible, the objective from `config.init`.

    The objective's weights are loaded from a run with the same objective, or from a Hugging Face folder that contains
    them with the right shapes. Otherwise the objective starts with random weights; an EMA teacher copies the loaded
    encoder.

    Args:
        config: the config of the new run.
        module: its model, modified in place.
        say: receives the lines of the report on loaded, unused and new weights.

    Returns:
        The same report, by names of weights.

    Raises:
        ConfigError: `config.init` has another architecture, lacks a weight, or cannot be read.
        ValueError: the checkpoint of the run is damaged.
    """
    folder = Path(config.init).expanduser()
    taken = _from_run(config, module, folder) if _is_run(folder) else _from_hugging_face(config, module, folder)
    for line in taken.lines(config.init):
        say(line)
    return taken


def require_same_architecture(config: Config) -> None:
    """Compares the architecture of `config.init` with the config's, from their configs alone.

    Raises:
        ConfigError: they differ, or `config.init` cannot be read.
    """
    folder = Path(config.init).expanduser()
    if not _is_run(folder):
        theirs = hf_folder.read_config(folder)
        _refuse_differences(config, hugging_face_architecture(theirs, hf_folder.read_processor(folder), str(folder)))
        return
    checkpoint = find_checkpoint(config.init)
    if (checkpoint / "state.json").is_file():
        _refuse_differences(config, architecture_fields(load(Config, read_state(checkpoint)["config"])))


def _is_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir() or (folder / "state.json").is_file()


def _from_run(config: Config, module: TrainModule, folder: Path) -> Taken:
    source, their_config, step = load_run(folder)
    if dump(their_config.tune) != dump(config.tune):
        source, their_config, _ = merged(LoadedCheckpoint(source, their_config, step))
    theirs, ours = source.model.state_dict(), module.model.state_dict()
    _refuse_differences(config, architecture_fields(their_config))
    added = [name for name in ours if name not in theirs and is_added(name)]
    wrong = [
        name for name in ours if name not in added and (name not in theirs or theirs[name].shape != ours[name].shape)
    ]
    if wrong:
        raise ConfigError(
            f"init={config.init}: {wrong[0]} and {len(wrong) - 1} more weights are missing or have another shape"
        )
    left = [name for name in theirs if name not in ours]
    if any(map(is_added, left)):
        raise ConfigError(
            f"init={config.init}: has weights of tune.name={their_config.tune.name} ({left[0]}); take the run that it "
            "was tuned from, or the same fields of tune"
        )
    if left:
        raise ConfigError(
            f"init={config.init}: {left[0]} and {len(left) - 1} more of its weights are not in this model"
        )
    module.model.load_state_dict(theirs, strict=False)  # but for `added`, names are equal
    objective, own = source.objective.state_dict(), list(module.objective.state_dict())
    heads = _load_heads(config, module, their_config, source, other_tokens(config, run_checkpoint(folder)))
    if dump(config.objective) == dump(their_config.objective):
        module.objective.load_state_dict(objective)
        return Taken(list(theirs), own, heads.left, [*added, *heads.made], heads.taken)
    module.objective.attach(module.model)
    left, made = [f"objective.{name}" for name in objective], _new(own, ())
    return Taken(list(theirs), [], [*left, *heads.left], [*added, *made, *heads.made], heads.taken)


class _Heads(NamedTuple):
    taken: list[str]
    left: list[str]
    made: list[str]


def _load_heads(
    config: Config, module: TrainModule, their_config: Config, source: TrainModule, other: Container[str]
) -> _Heads:
    """Loads the heads whose names, shapes, tokens and configs (but for weight, warm-up and input) agree in both runs.

    Args:
        config, module: the new run.
        their_config, source: the run that it starts from.
        other: names of tokens that differ in both runs.
    """
    found = _Heads([], [], [])
    for name, head in module.heads.items():
        ours = head.state_dict()
        theirs = source.heads[name].state_dict() if name in source.heads else {}
        same = name in source.heads and _task(config, name) == _task(their_config, name)
        same = same and not any(tokens in other for tokens in config.heads[name].needed_tokens)
        same = same and ours.keys() == theirs.keys() and all(ours[key].shape == theirs[key].shape for key in ours)
        if same:
            head.load_state_dict(theirs)
        (found.taken if same else found.made).extend(f"heads.{name}.{key}" for key in ours)
    taken = set(found.taken)
    found.left.extend(key for key in (f"heads.{name}" for name in source.heads.state_dict()) if key not in taken)
    return found


def other_tokens(config: Config, checkpoint: Path) -> set[str]:
    """Returns the names in data.tokens of which a checkpoint was trained with other tokens."""
    trained = saved_tokens(checkpoint)
    return {
        name
        for name, root in config.data.tokens.items()
        if trained and trained.get(name) != load_tokenizer(root).sha256
    }


def _task(config: Config, name: str) -> dict[str, Any]:
    """Returns the fields of a head's config that give its weights their meaning."""
    fields: dict[str, Any] = dump(config)["heads"][name]
    return {key: value for key, value in fields.items() if key not in ("weight", "warmup", "input")}


def _from_hugging_face(config: Config, module: TrainModule, folder: Path) -> Taken:
    theirs, state = hf_folder.read_config(folder), hf_folder.read_weights(folder)
    _refuse_differences(config, hugging_face_architecture(theirs, hf_folder.read_processor(folder), str(folder)))
    ours = {name: weight for name, weight in module.model.state_dict().items() if not is_added(name)}
    try:
        found = from_hugging_face(state, ours)
    except ValueError as error:
        raise ConfigError(f"init={folder}: {error}") from None
    module.model.load_state_dict(found.weights, strict=False)  # all but added ones, as `from_hugging_face` checks
    own = module.objective.state_dict()
    objective = objective_from_hugging_face(state, own)
    module.objective.load_state_dict(objective.weights, strict=False)
    module.objective.attach(module.model)
    used = found.sources | objective.sources
    made = [name for name in module.model.state_dict() if is_added(name)]
    made += [*_new(own, objective.weights), *(f"heads.{name}" for name in module.heads.state_dict())]
    return Taken(list(ours), list(objective.weights), [name for name in state if name not in used], made)


def _new(own: Iterable[str], taken: Container[str]) -> list[str]:
    """Returns the objective's weights that were not loaded; a teacher's are copies of the encoder, so not new."""
    return [f"objective.{name}" for name in own if name not in taken and not name.startswith("teacher.")]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def architecture_fields(config: Config) -> dict[str, Any]:
    """Returns the fields of front end and encoder that must agree, by the names of their overrides.

    Those of positions by convolution count where the encoder has such positions only.
    """
    encoder = dump(config.encoder)
    unused = "" if str(encoder.get("positions", "conv")).startswith("conv") else "conv_positions_"
    return {
        f"{part}.{field}": value
        for part in ("frontend", "encoder")
        for field, value in dump(getattr(config, part)).items()
        if field not in FREE and not (unused and field.startswith(unused))
    }


def hugging_face_architecture(theirs: Mapping[str, Any], processor: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Returns the fields of `architecture_fields` from a Hugging Face config.json.

    Fields that it leaves out have transformers' defaults, which are those of the released BASE models.

    Args:
        theirs: config.json.
        processor: preprocessor_config.json.
        path: the folder, for messages.

    Raises:
        ConfigError: the model type, or a value of FIXED, has no counterpart here.
    """
    kind = theirs.get("model_type")
    if kind not in TYPES:
        raise ConfigError(f"init={path}: model_type={kind}; only {', '.join(TYPES)} have a counterpart here")
    odd = [f"{key}={theirs[key]}" for key, value in FIXED.items() if theirs.get(key, value) != value]
    if odd:
        raise ConfigError(f"init={path}: {', '.join(odd)} has no counterpart here; take another checkpoint")
    stack, kernels, strides = kind == "data2vec-audio", (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)
    norm = "layer" if stack else theirs.get("feat_extract_norm", "group")
    widths = list(theirs.get("conv_dim", (512,)))
    same = len(set(widths)) == 1
    fields = {
        "frontend.name": "waveform_conv",
        **({"frontend.channels": widths[0]} if same else {}),
        "frontend.widths": [] if same else widths,
        "frontend.kernels": list(theirs.get("conv_kernel", kernels)),
        "frontend.strides": list(theirs.get("conv_stride", strides)),
        "frontend.norm": norm,
        "frontend.bias": theirs.get("conv_bias", False),
        "encoder.name": "transformer",
        "encoder.dim": theirs.get("hidden_size", 768),
        "encoder.layers": theirs.get("num_hidden_layers", 12),
        "encoder.heads": theirs.get("num_attention_heads", 12),
        "encoder.ffn_dim": theirs.get("intermediate_size", 3072),
        "encoder.norm": "pre" if theirs.get("do_stable_layer_norm", False) and not stack else "post",
        "encoder.positions": "conv_stack" if stack else "conv",
        "encoder.conv_positions_groups": theirs.get("num_conv_pos_embedding_groups", 16),
        "encoder.half_rate_blocks": 0,
        "encoder.relative_bias": kind == "wavlm",
    }
    if norm == "layer" and "do_normalize" in processor:  # a group norm removes the scale of the waveform anyway
        fields["frontend.normalize"] = processor["do_normalize"]
    if stack:
        fields["encoder.conv_positions_depth"] = theirs.get("num_conv_pos_embeddings", 5)
        fields["encoder.conv_positions_kernel"] = theirs.get("conv_pos_kernel_size", 19)
    else:
        fields["encoder.conv_positions_kernel"] = theirs.get("num_conv_pos_embeddings", 128)
    if kind == "wavlm":
        fields["encoder.relative_buckets"] = theirs.get("num_buckets", 320)
        fields["encoder.relative_max_distance"] = theirs.get("max_bucket_distance", 800)
    return fields


def _refuse_differences(config: Config, theirs: Mapping[str, Any]) -> None:
    ours = architecture_fields(config)
    # a front end or encoder of another type has other fields: report its name only
    kinds = {name.partition(".")[0] for name in ("frontend.name", "encoder.name") if ours[name] != theirs[name]}
    differing = [
        name
        for name, value in theirs.items()
        if name in ours and ours[name] != value and (name.endswith(".name") or name.partition(".")[0] not in kinds)
    ]
    if differing:
        differences = ", ".join(
            f"{name}={_shown(ours.get(name))} here and {_shown(theirs[name])} there" for name in differing
        )
        fitting = " ".join(f"{name.removesuffix('.name')}={_shown(theirs[name])}" for name in differing)
        raise ConfigError(f"init={config.init} has another architecture: {differences}; to match it, add {fitting}")


def _shown(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")).strip('"')
