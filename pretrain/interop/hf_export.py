"""A run as a Hugging Face model folder (`auricle export`).

Nothing is written unless `from_pretrained` on it gives our features to 1e-5.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.core.schema import ConfigError, load
from data_pipeline.core.types import SAMPLE_RATE
from pretrain.checkpointing.locate import latest_checkpoint, near
from pretrain.checkpointing.tensor_files import save_tensors
from pretrain.config import Config
from pretrain.interfaces.models import SpeechModel
from pretrain.interop.hf_names import to_hugging_face
from pretrain.train_module import TrainModule, build_model

TOLERANCE = 1e-5


def export(config: Config, module: TrainModule, folder: Path) -> float:
    """Writes config.json, preprocessor_config.json and model.safetensors; returns the worst error of the gate.

    Raises ConfigError for an architecture that Hugging Face has no model for, for an existing folder, and when the
    loaded copy's features differ.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists; give a new folder to export to")
    described = describe(config, module.objective.exports_as)
    weights = {
        name: weight.detach().cpu().float() for name, weight in to_hugging_face(module.model.state_dict()).items()
    }
    embedding = getattr(module.objective, "mask_embedding", None)
    if embedding is None:
        described["mask_time_prob"] = 0.0
    else:
        weights["masked_spec_embed"] = embedding.detach().cpu().float()
    frontend: Any = config.frontend  # a waveform_conv, as `describe` requires
    processor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": SAMPLE_RATE,
        "padding_value": 0.0,
        "padding_side": "right",
        "do_normalize": frontend.normalize,
        "return_attention_mask": frontend.norm == "layer",
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        temporary = Path(name) / "model"
        temporary.mkdir()
        (temporary / "config.json").write_text(json.dumps(described, indent=2) + "\n")
        (temporary / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
        contiguous = {key: weight.contiguous().clone() for key, weight in weights.items()}
        save_tensors(contiguous, temporary / "model.safetensors")
        error = gate(module.model, frontend.normalize, temporary)
        if not error <= TOLERANCE:
            raise ConfigError(f"the exported model's features differ by {error:.1e} (allowed: {TOLERANCE:.0e})")
        shutil.move(str(temporary), folder)
    return error


def describe(config: Config, plain: str) -> dict[str, Any]:
    """Hugging Face's config.json; `plain` is the kind of a model without one of its own.

    Raises ConfigError naming what has no counterpart there.
    """
    frontend: Any = config.frontend  # of any kind until the obstacles are ruled out
    encoder: Any = config.encoder
    obstacles = [
        f"{field}={value}"
        for field, value, fits in (
            ("frontend.name", frontend.name, frontend.name == "waveform_conv"),
            ("encoder.name", encoder.name, encoder.name == "transformer"),
            (
                "encoder.positions",
                getattr(encoder, "positions", ""),
                getattr(encoder, "positions", "") in ("conv", "conv_stack"),
            ),
            ("encoder.attention", encoder.attention, encoder.attention == "full"),
        )
        if not fits
    ]
    if obstacles:
        raise ConfigError(
            f"{', '.join(obstacles)}: Hugging Face has no such model; only a waveform_conv front end with a "
            "transformer of convolutional positions and full attention can be exported. `auricle export --to onnx` or "
            "`--to torchscript` makes one file that needs no code of ours"
        )
    stack = encoder.positions == "conv_stack"
    if stack and (encoder.relative_bias or encoder.norm == "pre" or frontend.norm == "group"):
        raise ConfigError(
            "encoder.positions=conv_stack exports as Data2VecAudio, which has frontend.norm=layer, encoder.norm=post "
            "and no relative bias"
        )
    kind = "WavLM" if encoder.relative_bias else "Data2VecAudio" if stack else plain
    described = {
        "architectures": [f"{kind}Model"],
        "model_type": {"Data2VecAudio": "data2vec-audio"}.get(kind, kind.lower()),
        "hidden_size": encoder.dim,
        "num_hidden_layers": encoder.layers,
        "num_attention_heads": encoder.heads,
        "intermediate_size": encoder.ffn_dim,
        "hidden_act": "gelu",
        "hidden_dropout": encoder.dropout,
        "attention_dropout": encoder.attention_dropout,
        "activation_dropout": encoder.activation_dropout,
        "feat_proj_dropout": frontend.dropout,
        "layerdrop": encoder.layer_drop,
        "feat_extract_norm": frontend.norm,
        "feat_extract_activation": "gelu",
        "conv_dim": [frontend.channels] * len(frontend.kernels),
        "conv_kernel": list(frontend.kernels),
        "conv_stride": list(frontend.strides),
        "conv_bias": frontend.bias,
        "num_feat_extract_layers": len(frontend.kernels),
        "num_conv_pos_embeddings": encoder.conv_positions_depth if stack else encoder.conv_positions_kernel,
        "num_conv_pos_embedding_groups": encoder.conv_positions_groups,
        "do_stable_layer_norm": encoder.norm == "pre",
        "layer_norm_eps": 1e-5,
        "mask_time_prob": 0.05,
        "dtype": "float32",
    }
    if stack:
        described["conv_pos_kernel_size"] = encoder.conv_positions_kernel
    if encoder.relative_bias:
        described |= {"num_buckets": encoder.relative_buckets, "max_bucket_distance": encoder.relative_max_distance}
    return described


@torch.no_grad()
def gate(model: SpeechModel, normalized: bool, folder: Path) -> float:
    """Largest difference of the last layer between `model` and what `from_pretrained` makes of `folder`.

    In double precision, so that what is seen is a wrong weight or formula and not the rounding of a deep model.
    Raises ConfigError if transformers is absent, or if it finds weights missing or left over.
    """
    try:
        import transformers
    except ImportError:
        raise ConfigError("the check before an export needs transformers: pip install transformers") from None
    theirs, report = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    wrong = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if wrong:
        raise ConfigError(f"transformers finds weights missing or left over: {', '.join(wrong)}")
    wave_BT = 0.1 * torch.randn(2, SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(model).cpu().double().eval()
    ours = exact(wave_BT.double(), torch.tensor([SAMPLE_RATE] * 2)).final.x_BFD
    if normalized:
        extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
        wave_BT = extractor(list(wave_BT.numpy()), sampling_rate=SAMPLE_RATE, return_tensors="pt").input_values
    return float((theirs.double().eval()(wave_BT.double()).last_hidden_state - ours).abs().max())


def load_run(folder: Path) -> tuple[Config, TrainModule]:
    """The config and the newest weights of a run folder."""
    newest = latest_checkpoint(folder / "checkpoints")
    if newest is None:
        raise ConfigError(f"{folder}: not a run folder with a checkpoint (checkpoints/latest is missing){near(folder)}")
    config = load(Config, json.loads((folder / "config.json").read_text()))
    module = build_model(config)
    state: Mapping[str, Tensor] = load_file(newest / "model.safetensors")
    module.load_state_dict(state)
    return config, module
