"""HuBERT's loss against torchaudio's pretraining model with equal masks; k-means against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_pipeline.core.types import Batch
from pretrain.interfaces.frames import StepContext
from pretrain.interfaces.models import SpeechModel
from pretrain.interop.hf_names import from_hugging_face, to_hugging_face
from pretrain.models.encoders import transformer
from pretrain.models.frontends import waveform_conv
from pretrain.objectives import hubert
from pretrain.self_supervision.kmeans import kmeans
from pretrain.self_supervision.quantizers import nearest_codes
from tests.support.hugging_face import our_model, ragged_batch, randomize
from tests.support.parity_table import Parity

models = pytest.importorskip("torchaudio.models")
UNITS = 17


def torchaudio_model(norm: str, pre: bool) -> torch.nn.Module:
    stem = [(64, 10, 5)] + [(64, 3, 2)] * 4 + [(64, 2, 2)] * 2
    return models.hubert_pretrain_model(
        extractor_mode=f"{norm}_norm",
        extractor_conv_layer_config=stem,
        extractor_conv_bias=norm == "layer",
        encoder_embed_dim=96,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=32,
        encoder_pos_conv_groups=4,
        encoder_num_layers=3,
        encoder_num_heads=4,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=192,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=pre,
        encoder_layer_drop=0.0,
        mask_prob=0.8,
        mask_selection="static",
        mask_other=0.0,
        mask_length=10,
        no_mask_overlap=False,
        mask_min_space=1,
        mask_channel_prob=0.0,
        mask_channel_selection="static",
        mask_channel_other=0.0,
        mask_channel_length=10,
        no_mask_channel_overlap=False,
        mask_channel_min_space=1,
        skip_masked=False,
        skip_nomask=False,
        num_classes=UNITS,
        final_dim=24,
        feature_grad_mult=0.1,
    )


OBJECTIVE = {
    "mask_embedding": "mask_generator.mask_embedding",
    "classifiers.0.linear.weight": "logit_generator.final_proj.weight",
    "classifiers.0.linear.bias": "logit_generator.final_proj.bias",
    "classifiers.0.embedding_KD": "logit_generator.label_embeddings",
}
"""Maps our weight names to torchaudio's."""


def as_hugging_face(name: str) -> str:
    """Converts a torchaudio weight name of stem or encoder to transformers' naming; all other names are equal."""
    return (
        name.removeprefix("wav2vec2.")
        .replace("encoder.feature_projection", "feature_projection")
        .replace("encoder.transformer", "encoder")
    )


def compare(theirs: torch.nn.Module, ours: SpeechModel, labels: hubert.Config, ragged: bool, parity: Parity) -> None:
    """Copies torchaudio's weights and compares the loss and all gradients for one mask."""
    randomize(theirs)
    parts = theirs.state_dict()
    stem_and_encoder = {as_hugging_face(name): w for name, w in parts.items() if name.startswith("wav2vec2.")}
    ours.load_state_dict(from_hugging_face(stem_and_encoder, ours.state_dict()).weights)
    ours.frontend.gradient_scale = 0.1
    objective = hubert.build(labels, ours.shape)
    objective.load_state_dict({name: parts[other] for name, other in OBJECTIVE.items()})
    wave_BT, lengths_B = ragged_batch(ragged)
    if (
        not ragged
    ):  # torchaudio's penalty weighs utterances equally, ours by masked frames (fairseq equalises their numbers)
        wave_BT, lengths_B = wave_BT[:1], lengths_B[:1]
    labels_BF = torch.randint(0, labels.units, (len(wave_BT), 49))
    batch = Batch(wave_BT, lengths_B, ("a", "b", "c")[: len(wave_BT)], 0, targets={"units": labels_BF})
    plan = objective.prepare(ours, batch, StepContext(0, 0))
    found, _ = objective(ours, batch, plan, StepContext(0, 0))

    def inject(x: torch.Tensor, padding_mask: object) -> tuple[torch.Tensor, torch.Tensor]:
        masked = torch.where(plan.mask.mask_BF[:, :, None], theirs.mask_generator.mask_embedding, x)
        return masked, plan.mask.mask_BF

    theirs.mask_generator.forward = inject
    logits, _, penalty = theirs(wave_BT, labels_BF, lengths_B if ragged else None)
    expected = cross_entropy = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64), reduction="sum")

    def relative(mine: torch.Tensor, other: torch.Tensor) -> float:
        return float(((mine - other).abs() / other.abs()).detach())

    # a column for the label and K columns, of which the label's is −inf, are equivalent to K columns
    mine = found.metrics["loss/prediction"][0]
    parity("HuBERT against torchaudio: (K+1)-column cross-entropy", 5e-7, relative(mine, cross_entropy))
    if not ragged:
        mine = found.metrics["loss/feature_penalty"][0] / plan.count
        parity("HuBERT against torchaudio: feature penalty", 1e-5, relative(mine, penalty))
        expected = cross_entropy + labels.penalty_weight * penalty * plan.count
    (found.total / plan.count).backward()
    (expected / plan.count).backward()
    gradients = to_hugging_face({name: weight.grad for name, weight in ours.named_parameters()})
    gradients |= {OBJECTIVE[name]: weight.grad for name, weight in objective.named_parameters()}
    weights = {as_hugging_face(name): weight for name, weight in theirs.named_parameters()}
    assert gradients.keys() == weights.keys()
    for name, weight in weights.items():
        error = (gradients[name] - weight.grad).abs().max() / weight.grad.abs().max().clamp(min=1e-4)
        parity("HuBERT against torchaudio: all gradients", 1e-4, float(error))


@pytest.mark.parametrize("ragged", [False, True], ids=["one", "ragged"])
@pytest.mark.parametrize(("norm", "pre"), [("group", False), ("layer", True)], ids=["base", "large"])
def test_loss_and_gradients_equal_those_of_torchaudio(norm: str, pre: bool, ragged: bool, parity: Parity) -> None:
    torch.manual_seed(0)
    penalty = 0.0 if ragged else 10.0
    labels = hubert.Config(labels="units", units=UNITS, projection_dim=24, penalty_weight=penalty)
    compare(torchaudio_model(norm, pre), our_model(norm, pre), labels, ragged, parity)


@pytest.mark.slow
def test_hubert_pretrain_base(parity: Parity) -> None:
    """Uses the model factory at its full size."""
    torch.manual_seed(0)
    theirs = models.hubert_pretrain_base(0.0, 0.0, 0.0, 0.0, 0.0, num_classes=100)
    quiet = {"dropout": 0.0, "attention_dropout": 0.0, "layer_drop": 0.0}
    encoder = transformer.build(transformer.Config(**quiet))
    ours = SpeechModel(waveform_conv.build(waveform_conv.Config(dropout=0.0), encoder.dim), encoder)
    compare(theirs, ours, hubert.Config(labels="units", units=100), False, parity)


def test_kmeans_inertia_matches_scikit_learn(parity: Parity) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((40, 39)) * 2
    x_ND = (centres[rng.integers(0, 40, 6000)] + rng.standard_normal((6000, 39))).astype(np.float32)
    theirs = cluster.KMeans(100, init="k-means++", n_init=1, random_state=0).fit(x_ND).inertia_
    points = torch.from_numpy(x_ND)
    found_KD = kmeans(points, 100, seed=0)
    ours = float((points - found_KD[nearest_codes(points, found_KD)]).square().sum())
    parity("k-means inertia against scikit-learn (relative)", 1e-2, abs(ours / theirs - 1))
