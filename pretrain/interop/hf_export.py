"""Exports a run as a Hugging Face model folder (`auricle export`).

Nothing is written unless `from_pretrained` on the folder reproduces the features to 1e-5. A model trained with wav2vec
2.0 is written as Wav2Vec2ForPreTraining, with its quantiser and projections, for `init=` or further pretraining
elsewhere; transformers has no such class for other objectives, so their weights stay in the run's checkpoint. A run
with a CTC head is written as …ForCTC with its vocabulary, one with an attention decoder as SpeechEncoderDecoderModel.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from data_pipeline.core.new_folder import new_folder
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from pretrain.checkpointing.locate import latest_checkpoint, near
from pretrain.checkpointing.tensor_files import save_tensors
from pretrain.checkpointing.weights import LoadedCheckpoint, load_checkpoint
from pretrain.config import Config
from pretrain.heads.ctc import CTC
from pretrain.heads.sequence import Sequence
from pretrain.interfaces.models import SpeechModel
from pretrain.interop import hf_decoder
from pretrain.interop.export_tolerance import require_close
from pretrain.interop.hf_ctc import ctc_head, ctc_weights, describe_ctc, vocabulary
from pretrain.interop.hf_names import MASK_EMBEDDING, objective_to_hugging_face, to_hugging_face
from pretrain.models.encoders import transformer
from pretrain.models.frontends import waveform_conv
from pretrain.nn.stack_config import StackConfig
from pretrain.objectives import wav2vec2
from pretrain.train_module import TrainModule

SMALL_RECIPES = {
    "best_rq": "best_rq_conv_tiny",
    "data2vec": "data2vec_tiny",
    "data2vec2": "data2vec2_tiny",
    "dinosr": "dinosr_tiny",
    "hubert": "hubert_conv_tiny",
    "time_contrastive": "time_contrastive_tiny",
    "wav2vec2": "wav2vec2_conv_tiny",
    "wavlm": "wavlm_tiny",
}
"""Objective -> the recipe for two CPU cores in a form that can be exported."""


def exports(config: Config) -> bool:
    """Returns whether transformers has front end and encoder of `config`."""
    try:
        describe(config, "Wav2Vec2")
    except ConfigError:
        return False
    return True


def export(config: Config, module: TrainModule, folder: Path, head: str = "") -> float:
    """Writes config.json, preprocessor_config.json and model.safetensors, of a recogniser its vocabulary as well.

    Args:
        config: the config that `module` was trained with.
        module: front end, encoder and objective.
        folder: must not exist; is created complete or not at all.
        head: the CTC head or attention decoder to export; empty: the only one of a run without a self-supervised loss,
            see `ctc_head` and `sequence_head`.

    Returns:
        The largest difference between the last layer of `module`, or ln p of its head, and that of the loaded copy, in
        double precision.

    Raises:
        ConfigError: the architecture has no counterpart in transformers, `folder` exists, or the loaded copy differs by
            more than TOLERANCE.
        OSError: the folder cannot be written; nothing is left behind.
    """
    recogniser: CTC | Sequence | None = hf_decoder.sequence_head(config, module, head)
    if recogniser is None:
        recogniser = ctc_head(config, module, head)
    described = describe(config, module.objective.exports_as)
    weights = to_hugging_face(module.model.state_dict())
    objective = module.objective.state_dict()
    if MASK_EMBEDDING in objective:
        weights["masked_spec_embed"] = objective[MASK_EMBEDDING]
    else:
        described["mask_time_prob"] = 0.0
    for_pretraining = False
    files: dict[str, dict[str, Any]] = {}
    if recogniser is not None:
        described["mask_time_prob"] = 0.0
        weights.pop("masked_spec_embed", None)
    if isinstance(recogniser, Sequence):
        files = hf_decoder.vocabulary(config, recogniser)
        described = hf_decoder.describe(recogniser, described)
        name_of = {found: name for name, found in module.heads.items()}
        weights = hf_decoder.weights(recogniser, weights, name_of[recogniser])
    elif recogniser is not None:
        described |= describe_ctc(recogniser, described)
        weights, files = ctc_weights(recogniser, weights, described["model_type"]), vocabulary(recogniser.symbols)
    elif isinstance(config.objective, wav2vec2.Config) and described["model_type"] == "wav2vec2":
        for_pretraining = True
        described |= describe_objective(config.objective)
        weights = {f"wav2vec2.{name}": weight for name, weight in weights.items()}
        weights |= objective_to_hugging_face(objective)
    frontend = config.frontend
    assert isinstance(frontend, waveform_conv.Config)  # `describe` requires it
    processor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "sampling_rate": SAMPLE_RATE,
        "padding_value": 0.0,
        "padding_side": "right",
        "do_normalize": frontend.normalize,
        "return_attention_mask": frontend.norm == "layer",
    }
    with new_folder(folder) as made:
        for file, values in {"config.json": described, "preprocessor_config.json": processor, **files}.items():
            (made / file).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        contiguous = {key: weight.detach().cpu().float().contiguous().clone() for key, weight in weights.items()}
        save_tensors(contiguous, made / "model.safetensors")
        error = largest_difference(module.model, frontend.normalize, made, for_pretraining, recogniser)
        require_close(error, "hugging_face", described["architectures"][0])
    return error


def describe_objective(objective: wav2vec2.Config) -> dict[str, Any]:
    """Returns the fields of config.json for the objective of wav2vec 2.0."""
    return {
        "architectures": ["Wav2Vec2ForPreTraining"],
        "num_codevector_groups": objective.groups,
        "num_codevectors_per_group": objective.n_codes,
        "codevector_dim": objective.code_dim,
        "proj_codevector_dim": objective.projection_dim,
        "num_negatives": objective.negatives,
        "contrastive_logits_temperature": objective.logit_temperature,
        "diversity_loss_weight": objective.diversity_weight,
        "feat_quantizer_dropout": objective.feature_dropout,
        "mask_time_prob": objective.mask_prob,
        "mask_time_length": objective.mask_span,
    }


def describe(config: Config, plain: str) -> dict[str, Any]:
    """Returns the fields of Hugging Face's config.json for front end and encoder.

    Args:
        config: the config of the run.
        plain: the model class, such as "Wav2Vec2", unless the encoder's architecture implies another one (WavLM,
            Data2VecAudio).

    Raises:
        ConfigError: some fields have values without a counterpart in transformers; the message names them.
    """
    frontend, encoder = config.frontend, config.encoder
    obstacles = [f"tune.name={config.tune.name}"] if config.tune.name in ("prompt", "adapter", "lora") else []
    if not isinstance(frontend, waveform_conv.Config):
        obstacles.append(f"frontend.name={frontend.name}")
    if not isinstance(encoder, transformer.Config):
        obstacles.append(f"encoder.name={encoder.name}")
    elif encoder.positions not in ("conv", "conv_stack"):
        obstacles.append(f"encoder.positions={encoder.positions}")
    elif encoder.norm == "pre" and not encoder.final_norm:
        obstacles.append("encoder.final_norm=false")
    if isinstance(encoder, StackConfig) and encoder.attention != "full":
        obstacles.append(f"encoder.attention={encoder.attention}")
    if isinstance(encoder, StackConfig) and set(encoder.widths) - {(encoder.heads, encoder.block_widths[0].ffn_dim)}:
        obstacles.append(f"encoder.widths={[list(pair) for pair in encoder.widths]}")
    if obstacles or not isinstance(frontend, waveform_conv.Config) or not isinstance(encoder, transformer.Config):
        small = SMALL_RECIPES.get(config.objective.name)
        remedy = f", as in +experiment={small}" if small else ""
        raise ConfigError(
            f"{', '.join(obstacles)}: Hugging Face has no such model; only a waveform_conv front end with a "
            "transformer of convolutional positions and full attention can be exported (frontend=waveform_conv "
            f"encoder.positions=conv of a new run{remedy}). `auricle export --to onnx` or `--to torchscript` writes "
            "one self-contained file instead"
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
        "intermediate_size": encoder.block_widths[0].ffn_dim,
        "hidden_act": "gelu",
        "hidden_dropout": encoder.dropout,
        "attention_dropout": encoder.attention_dropout,
        "activation_dropout": encoder.activation_dropout,
        "feat_proj_dropout": frontend.dropout,
        "layerdrop": encoder.layer_drop,
        "feat_extract_norm": frontend.norm,
        "feat_extract_activation": "gelu",
        "conv_dim": list(frontend.conv_widths),
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
def largest_difference(
    model: SpeechModel,
    normalized: bool,
    folder: Path,
    for_pretraining: bool = False,
    head: CTC | Sequence | None = None,
) -> float:
    """Returns the largest difference of the last layer, or of ln p, between `model` and what transformers loads.

    In double precision, so that wrong weights or formulas show and the rounding of a deep model does not.

    Args:
        model: front end and encoder that were exported.
        normalized: whether the front end normalises each utterance.
        folder: the exported model.
        for_pretraining: whether it includes the objective's weights.
        head: the CTC head or attention decoder that it includes.

    Raises:
        ConfigError: transformers is not installed, or reports missing or unexpected weights.
    """
    try:
        import transformers
    except ImportError:
        raise ConfigError("the check before an export needs transformers: pip install transformers") from None
    kind = transformers.AutoModelForPreTraining if for_pretraining else transformers.AutoModel
    if head is not None:
        kind = transformers.AutoModelForCTC if isinstance(head, CTC) else transformers.SpeechEncoderDecoderModel
    theirs, report = kind.from_pretrained(folder, output_loading_info=True, trust_remote_code=False)
    wrong = sorted({*report["missing_keys"], *report["unexpected_keys"]})
    if wrong:
        raise ConfigError(f"transformers reports missing or unexpected weights: {', '.join(wrong)}")
    wave_BT = 0.1 * torch.randn(2, SAMPLE_RATE, generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(model).cpu().double().eval()
    encoded = exact(wave_BT.double(), torch.tensor([SAMPLE_RATE] * 2))
    if normalized:
        extractor = transformers.AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=False)
        wave_BT = extractor(list(wave_BT.numpy()), sampling_rate=SAMPLE_RATE, return_tensors="pt").input_values
    if isinstance(head, Sequence):
        return hf_decoder.difference(head, theirs.double().eval(), wave_BT.double(), encoded)
    if head is not None:
        log_probs_BFV = copy.deepcopy(head).cpu().double().eval().log_probs(encoded)
        return float((theirs.double().eval()(wave_BT.double()).logits.log_softmax(-1) - log_probs_BFV).abs().max())
    base = theirs.wav2vec2 if for_pretraining else theirs
    return float((base.double().eval()(wave_BT.double()).last_hidden_state - encoded.final.x_BFD).abs().max())


def load_run(given: Path) -> LoadedCheckpoint:
    """Loads the newest checkpoint of a run folder, or the given checkpoint, with the config saved in it.

    Raises:
        ConfigError: the folder has no checkpoint.
        ValueError: the checkpoint is damaged.
    """
    return load_checkpoint(run_checkpoint(given))


def run_checkpoint(given: Path) -> Path:
    """Returns the newest checkpoint of a run folder, or the given checkpoint.

    Raises:
        ConfigError: the folder has no checkpoint.
        ValueError: the pointer to the newest one is damaged.
    """
    if (given / "state.json").is_file():
        return given
    newest = latest_checkpoint(given / "checkpoints")
    if newest is None:
        raise ConfigError(f"{given}: not a run folder with a checkpoint (checkpoints/latest is missing){near(given)}")
    return newest
