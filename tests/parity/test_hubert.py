"""HuBERT's loss against torchaudio's pretraining model, masks injected; k-means against scikit-learn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_pipeline.types import Batch
from pretrain.export.layout import from_hugging_face
from pretrain.nn.kmeans import kmeans
from pretrain.nn.quantizers import nearest_codes
from pretrain.objectives import hubert
from pretrain.types import StepContext
from tests.parity.hugging_face import our_model, ragged_batch, randomize

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


@pytest.mark.parametrize("ragged", [False, True], ids=["one", "ragged"])
@pytest.mark.parametrize(("norm", "pre"), [("group", False), ("layer", True)], ids=["base", "large"])
def test_loss_and_gradients(norm: str, pre: bool, ragged: bool, parity: Callable[[str, float, float], None]) -> None:
    torch.manual_seed(0)
    theirs = torchaudio_model(norm, pre)
    randomize(theirs)
    ours = our_model(norm, pre)
    ours.frontend.gradient_scale = 0.1
    state = {
        name.removeprefix("wav2vec2.")
        .replace("encoder.feature_projection", "feature_projection")
        .replace("encoder.transformer", "encoder"): w
        for name, w in theirs.state_dict().items()
        if name.startswith("wav2vec2.")
    }
    ours.load_state_dict(from_hugging_face(state, ours.state_dict()))
    config = hubert.Config(labels="units", units=UNITS, projection_dim=24)
    objective = hubert.build(config, ours.shape)
    parts = theirs.state_dict()
    objective.load_state_dict(
        {
            "mask_embedding": parts["mask_generator.mask_embedding"],
            "classifiers.0.linear.weight": parts["logit_generator.final_proj.weight"],
            "classifiers.0.linear.bias": parts["logit_generator.final_proj.bias"],
            "classifiers.0.embedding_KD": parts["logit_generator.label_embeddings"],
        }
    )
    wave_BT, lengths_B = ragged_batch(ragged)
    if not ragged:  # their penalty weighs utterances alike, ours by masked frames (fairseq trims those to be as many)
        wave_BT, lengths_B = wave_BT[:1], lengths_B[:1]
    labels_BF = torch.randint(0, UNITS, (len(wave_BT), 49))
    batch = Batch(wave_BT, lengths_B, ("a", "b", "c")[: len(wave_BT)], 0, targets={"units": labels_BF})
    ctx = StepContext(0, 0)
    plan = objective.prepare(ours, batch, ctx)
    found, _ = objective(ours, batch, plan, ctx)

    def inject(x: torch.Tensor, padding_mask: object) -> tuple[torch.Tensor, torch.Tensor]:
        masked = torch.where(plan.mask.mask_BF[:, :, None], theirs.mask_generator.mask_embedding, x)
        return masked, plan.mask.mask_BF

    theirs.mask_generator.forward = inject
    logits, _, penalty = theirs(wave_BT, labels_BF, lengths_B if ragged else None)
    cross_entropy = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64), reduction="sum")

    def relative(mine: torch.Tensor, other: torch.Tensor) -> float:
        return float(((mine - other).abs() / other.abs()).detach())

    # one column for the label and K, of which the label's is −inf, are the same as K columns
    parity(
        "HuBERT against torchaudio: cross-entropy", 5e-7, relative(found.metrics["loss/prediction"][0], cross_entropy)
    )
    if not ragged:
        parity(
            "HuBERT against torchaudio: feature penalty",
            1e-5,
            relative(found.metrics["loss/feature_penalty"][0] / plan.count, penalty),
        )
        (found.total / plan.count).backward()
        ((cross_entropy + 10 * penalty * plan.count) / plan.count).backward()
        pairs = [
            (objective.classifiers[0].embedding_KD, theirs.logit_generator.label_embeddings),
            (objective.classifiers[0].linear.weight, theirs.logit_generator.final_proj.weight),
            (objective.mask_embedding, theirs.mask_generator.mask_embedding),
            (ours.frontend.convs[0].conv.weight, theirs.wav2vec2.feature_extractor.conv_layers[0].conv.weight),
            (
                ours.encoder.blocks[0].ffn_in.weight,
                theirs.wav2vec2.encoder.transformer.layers[0].feed_forward.intermediate_dense.weight,
            ),
        ]
        for mine, other in pairs:
            error = (mine.grad - other.grad).abs().max() / other.grad.abs().max()
            parity("HuBERT against torchaudio: gradients", 1e-4, float(error))


def test_kmeans_inertia(parity: Callable[[str, float, float], None]) -> None:
    """Recipe: inertia within 1 % of scikit-learn's."""
    cluster = pytest.importorskip("sklearn.cluster")
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((40, 39)) * 2
    x_ND = (centres[rng.integers(0, 40, 6000)] + rng.standard_normal((6000, 39))).astype(np.float32)
    theirs = cluster.KMeans(100, init="k-means++", n_init=1, random_state=0).fit(x_ND).inertia_
    points = torch.from_numpy(x_ND)
    found_KD = kmeans(points, 100, seed=0)
    ours = float((points - found_KD[nearest_codes(points, found_KD)]).square().sum())
    parity("k-means inertia against scikit-learn (relative, if worse)", 1e-2, max(0.0, ours / theirs - 1))
