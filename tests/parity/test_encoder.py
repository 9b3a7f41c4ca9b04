"""Every hidden state of stem and encoder against transformers (recipe: ≤ 1e-5 in fp32, ≤ 1e-10 in fp64)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.parity.hugging_face import copy_weights, hugging_face_config, our_model, ragged_batch, randomize

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("pre", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
def test_hidden_states(
    norm: str,
    pre: bool,
    ragged: bool,
    dtype: torch.dtype,
    tolerance: float,
    parity: Callable[[str, float, float], None],
) -> None:
    torch.manual_seed(0)
    theirs = transformers.Wav2Vec2Model(hugging_face_config(transformers.Wav2Vec2Config, norm, pre)).eval()
    randomize(theirs)
    ours = our_model(norm, pre).eval()
    copy_weights(theirs, ours)
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    wave_BT, lengths_B = ragged_batch(ragged)
    attention_mask = (torch.arange(wave_BT.shape[1])[None] < lengths_B[:, None]).long() if ragged else None
    with torch.no_grad():
        expected = theirs(wave_BT.to(dtype), attention_mask=attention_mask, output_hidden_states=True)
        features = ours.frontend.extract(wave_BT.to(dtype), lengths_B)
        found = ours.encoder(ours.frontend.project(features))
    valid_BF = found.final.valid_BF()
    worst = (features.x_BFD - expected.extract_features)[valid_BF].abs().max().item()
    hidden = [*expected.hidden_states[:-1], expected.last_hidden_state]
    assert len(hidden) == len(found.layers)
    for mine, other in zip(found.layers, hidden, strict=True):
        worst = max(worst, (mine - other)[valid_BF].abs().max().item())
    parity(f"Wav2Vec2Model hidden states, {str(dtype)[6:]}", tolerance, worst)
