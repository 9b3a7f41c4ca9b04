"""wav2vec 2.0's loss and gradients against transformers, with equal masks and negatives and no Gumbel noise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from data_pipeline.core.types import Batch
from pretrain.interfaces.frames import StepContext
from pretrain.interop.hf_names import objective_from_hugging_face, to_hugging_face
from pretrain.objectives import wav2vec2
from pretrain.self_supervision import quantizers
from tests.support.hugging_face import (
    copy_weights,
    hugging_face_config,
    negatives_as_theirs,
    our_model,
    ragged_batch,
    randomize,
)
from tests.support.parity_table import Parity

transformers = pytest.importorskip("transformers")


CTX = StepContext(seed=0, step=0)


def exact_hard_gumbel(logits: Tensor, tau: float = 1.0, hard: bool = False, **_: object) -> Tensor:
    """Returns torch's gumbel_softmax without noise, with an exactly one-hot forward value."""
    soft = (logits / tau).softmax(-1)
    one_hot = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    return one_hot + (soft - soft.detach())


GRADIENTS: dict[str, Callable[[wav2vec2.Wav2Vec2], Tensor]] = {
    "wav2vec2.masked_spec_embed": lambda ours: ours.mask_embedding.grad,
    "quantizer.weight_proj.weight": lambda ours: ours.quantizer.logits.weight.grad,
    "quantizer.weight_proj.bias": lambda ours: ours.quantizer.logits.bias.grad,
    "quantizer.codevectors": lambda ours: ours.quantizer.codebook_GVC.grad.flatten(0, 1)[None],
    "project_q.weight": lambda ours: ours.project_target.weight.grad,
    "project_q.bias": lambda ours: ours.project_target.bias.grad,
    "project_hid.weight": lambda ours: ours.project_prediction.weight.grad,
    "project_hid.bias": lambda ours: ours.project_prediction.bias.grad,
}
"""Our weights by their names in transformers."""


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize(("norm", "pre"), [("group", False), ("layer", True)], ids=["base", "large"])
def test_loss_and_gradients_equal_those_of_transformers(
    norm: str, pre: bool, ragged: bool, parity: Parity, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", exact_hard_gumbel)
    monkeypatch.setattr(quantizers, "gumbel_noise", torch.zeros_like)
    off = {
        f"{where}_dropout": 0.0
        for where in ("hidden", "attention", "activation", "feat_proj", "feat_quantizer", "final")
    }
    theirs = transformers.Wav2Vec2ForPreTraining(
        hugging_face_config(transformers.Wav2Vec2Config, norm, pre, diversity_loss_weight=0.1, **off)
    )
    randomize(theirs)
    with torch.no_grad():  # sharp enough to use many codes, and smooth enough that no probability underflows
        theirs.quantizer.weight_proj.weight.mul_(0.3)
    ours = our_model(norm, pre)
    copy_weights(theirs, ours)
    objective = wav2vec2.Wav2Vec2(wav2vec2.Config(penalty_weight=0.0, feature_dropout=0.0), ours.shape)
    objective.load_state_dict(objective_from_hugging_face(theirs.state_dict(), objective.state_dict()).weights)

    wave_BT, lengths_B = ragged_batch(ragged)
    plan = objective.prepare(ours, Batch(wave_BT, lengths_B, ("a", "b", "c"), 0), CTX)
    attention_mask = (torch.arange(wave_BT.shape[1])[None] < lengths_B[:, None]).long() if ragged else None
    expected = theirs(
        wave_BT,
        attention_mask=attention_mask,
        mask_time_indices=plan.mask.mask_BF,
        sampled_negative_indices=negatives_as_theirs(plan),
    )
    found, _ = objective(ours, Batch(wave_BT, lengths_B, ("a", "b", "c"), 0), plan, CTX)

    def relative(mine: Tensor, other: Tensor) -> float:
        return float((mine - other).detach().abs() / other.detach().abs())

    def relative_to_largest(mine: Tensor, other: Tensor) -> float:
        # the bias of attention keys has a gradient of 0 up to rounding, hence the floor
        return float((mine - other).abs().max() / other.abs().max().clamp(min=1e-4))

    parity("contrastive: total", 1e-5, relative(found.total, expected.loss))
    parity("contrastive: InfoNCE", 1e-5, relative(found.metrics["loss/contrastive"][0], expected.contrastive_loss))
    parity("contrastive: diversity", 1e-5, relative(found.metrics["loss/diversity"][0], expected.diversity_loss))
    perplexity = found.metrics["metric/soft_perplexity"][0] / plan.count
    parity("contrastive: perplexity", 1e-5, relative(perplexity, expected.codevector_perplexity))

    (found.total / plan.count).backward()
    (expected.loss / plan.count).backward()
    gradients = to_hugging_face({name: weight.grad for name, weight in ours.named_parameters()})
    gradients = {f"wav2vec2.{name}": gradient for name, gradient in gradients.items()}
    gradients |= {theirs_name: read(objective) for theirs_name, read in GRADIENTS.items()}
    weights = dict(theirs.named_parameters())
    assert gradients.keys() == weights.keys()
    for name, weight in weights.items():
        parity("contrastive: all gradients", 1e-4, relative_to_largest(gradients[name], weight.grad))
