"""Losses of pairs against those of transformers' SigLIP and CLIP, from the embeddings that their towers give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.nn.pair_losses import sigmoid_loss, softmax_loss
from tests.support.hugging_face import randomize
from tests.support.parity_table import Parity, difference

ROWS = 5


def theirs(name: str) -> tuple[Any, Any]:
    """Returns a tiny model of transformers and its output for random texts and images, with its loss."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    vision = sizes | {"image_size": 8, "patch_size": 4}
    more = {} if name == "Siglip" else {"projection_dim": 16}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **more)
    model = getattr(transformers, f"{name}Model")(config).eval()
    randomize(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 20, (ROWS, 8), generator=generator)
    pixels = torch.randn(ROWS, 3, 8, 8, generator=generator)
    return model, model(input_ids=ids, pixel_values=pixels, return_loss=True)


def compare(parity: Parity, name: str, loss: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    parity(f"loss of {name} on its embeddings", 1e-6, difference(loss, expected))
    found, wanted = (torch.autograd.grad(one, inputs, retain_graph=True) for one in (loss, expected))
    error = max(difference(one, other) for one, other in zip(found, wanted, strict=True))
    parity(f"gradients of that loss of {name}", 1e-5, error)


def test_the_sigmoid_loss_equals_that_of_siglip(parity: Parity) -> None:
    model, out = theirs("Siglip")
    logits = out.text_embeds @ out.image_embeds.T * model.logit_scale.exp() + model.logit_bias
    same, every = torch.eye(ROWS, dtype=torch.bool), torch.ones(ROWS, ROWS, dtype=torch.bool)
    inputs = [model.logit_scale, model.logit_bias, model.vision_model.embeddings.patch_embedding.weight]
    compare(parity, "SiglipModel", sigmoid_loss(logits, same, every) / ROWS, out.loss, inputs)


def test_the_softmax_loss_equals_that_of_clip(parity: Parity) -> None:
    model, out = theirs("CLIP")
    logits = out.text_embeds @ out.image_embeds.T * model.logit_scale.exp()
    same, every = torch.eye(ROWS, dtype=torch.bool), torch.ones(ROWS, ROWS, dtype=torch.bool)
    loss = (softmax_loss(logits, same, every) + softmax_loss(logits.T, same, every)) / 2 / ROWS
    inputs = [model.logit_scale, model.text_projection.weight, model.visual_projection.weight]
    compare(parity, "CLIPModel", loss, out.loss, inputs)
