"""Weights to start from (`init=`): a Hugging Face folder, or another run.

Weights of one shape can belong to another architecture, so the configs are compared, too. Who attends to whom may
differ, as may what is left out in training: a model that hears all may become one that streams.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.core.schema import ConfigError, dump
from pretrain.config import Config
from pretrain.interop.hf_export import load_run
from pretrain.interop.hf_names import from_hugging_face, objective_from_hugging_face
from pretrain.train_module import TrainModule

FREE = {
    *("dropout", "attention_dropout", "activation_dropout", "layer_drop", "stochastic_depth", "gradient_scale"),
    *("attention", "attention_kernel", "window", "full_every", "registers", "chunk_frames", "left_chunks"),
}
"""Fields of front ends and encoders that may differ. (Registers are weights, and found missing as such.)"""
FIXED = {"hidden_act": "gelu", "feat_extract_activation": "gelu", "layer_norm_eps": 1e-5, "conv_pos_batch_norm": False}
"""What our models have in common, by the names of Hugging Face's config.json."""
TYPES = ("wav2vec2", "hubert", "wavlm", "data2vec-audio")
CONVERT = (
    'python -c "import torch, safetensors.torch as s; s.save_file({{name: weight.clone() for name, weight in '
    "torch.load('{0}/pytorch_model.bin', weights_only=True).items()}}, '{0}/model.safetensors')\""
)


def load_initial(config: Config, module: TrainModule) -> None:
    """Fills front end and encoder from `config.init`. Raises ConfigError where it does not fit.

    The objective's weights come along from a run with the same objective, and from Hugging Face what is there under
    its names and in its shapes. Otherwise the objective starts anew; an EMA teacher copies what was loaded.
    """
    folder = Path(config.init).expanduser()
    if (folder / "checkpoints").is_dir():
        _from_run(config, module, folder)
    else:
        _from_hugging_face(config, module, folder)


def _from_run(config: Config, module: TrainModule, folder: Path) -> None:
    their_config, source = load_run(folder)
    theirs, ours = source.model.state_dict(), module.model.state_dict()
    _refuse_differences(config, architecture(their_config))
    wrong = [name for name in ours if name not in theirs or theirs[name].shape != ours[name].shape]
    if wrong:
        raise ConfigError(
            f"init={config.init}: {wrong[0]} and {len(wrong) - 1} more weights are not there in this shape"
        )
    left = [name for name in theirs if name not in ours]
    if left:
        raise ConfigError(
            f"init={config.init}: this model has no place for {left[0]} and {len(left) - 1} more of its weights"
        )
    module.model.load_state_dict(theirs)
    if dump(config.objective) == dump(their_config.objective):
        module.objective.load_state_dict(source.objective.state_dict())
    else:
        module.objective.attach(module.model)


def _from_hugging_face(config: Config, module: TrainModule, folder: Path) -> None:
    state = read_hugging_face(folder)
    processor = _json(folder / "preprocessor_config.json") if (folder / "preprocessor_config.json").is_file() else {}
    _refuse_differences(config, hugging_face_architecture(_json(folder / "config.json"), processor, str(folder)))
    try:
        module.model.load_state_dict(from_hugging_face(state, module.model.state_dict()))
    except ValueError as error:
        raise ConfigError(f"init={folder}: {error}") from None
    module.objective.load_state_dict(objective_from_hugging_face(state, module.objective.state_dict()), strict=False)
    module.objective.attach(module.model)


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights, one or several. Raises ConfigError if none are safetensors."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        names = {"model.safetensors"}
    elif index.is_file():
        names = {Path(name).name for name in _json(index)["weight_map"].values()}
    elif (folder / "pytorch_model.bin").is_file():
        raise ConfigError(
            f"{folder} has no model.safetensors, and a pickle is never opened here; where you trust it, convert it: "
            + CONVERT.format(folder)
        )
    else:
        raise ConfigError(f"{folder} is no run folder, and has no model.safetensors; download the whole model there")
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ConfigError(f"{folder}: {index.name} names {missing[0]}, which is missing; download it, too")
    return [folder / name for name in sorted(names)]


def read_hugging_face(folder: Path) -> dict[str, Tensor]:
    """All weights of a Hugging Face folder. Raises as `weight_files`."""
    return {key: weight for file in weight_files(folder) for key, weight in load_file(file).items()}


def architecture(config: Config) -> dict[str, Any]:
    """Fields that must agree, by the names that an override has."""
    return {
        f"{part}.{field}": value
        for part in ("frontend", "encoder")
        for field, value in dump(getattr(config, part)).items()
        if field not in FREE
    }


def hugging_face_architecture(theirs: Mapping[str, Any], processor: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The same of a config.json; what it leaves out has transformers' default, which is the released BASE."""
    kind = theirs.get("model_type")
    if kind not in TYPES:
        raise ConfigError(f"init={path}: model_type={kind}; only {', '.join(TYPES)} have a counterpart here")
    odd = [f"{key}={theirs[key]}" for key, value in FIXED.items() if theirs.get(key, value) != value]
    if odd:
        raise ConfigError(f"init={path}: {', '.join(odd)} has no counterpart here; take another checkpoint")
    stack, kernels, strides = kind == "data2vec-audio", (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)
    norm = "layer" if stack else theirs.get("feat_extract_norm", "group")
    fields = {
        "frontend.name": "waveform_conv",
        "frontend.channels": theirs.get("conv_dim", (512,))[0],
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
    if norm == "layer" and "do_normalize" in processor:  # a group norm takes the wave's own scale out again
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
    ours = architecture(config)
    # a part of another kind has other fields, of which its name says enough
    kinds = {name.partition(".")[0] for name in ("frontend.name", "encoder.name") if ours[name] != theirs[name]}
    differing = [
        name
        for name, value in theirs.items()
        if ours.get(name) != value and (name.endswith(".name") or name.partition(".")[0] not in kinds)
    ]
    if differing:
        told = ", ".join(f"{name}={_shown(ours.get(name))} here and {_shown(theirs[name])} there" for name in differing)
        fitting = " ".join(f"{name.removesuffix('.name')}={_shown(theirs[name])}" for name in differing)
        raise ConfigError(f"init={config.init} is another architecture: {told}; to fit it, add {fitting}")


def _shown(value: Any) -> str:
    return json.dumps(value, separators=(",", ":")).strip('"')


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(f"{file} is missing; it tells the architecture")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
