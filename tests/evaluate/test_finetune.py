"""CTC fine-tuning and decoding."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.main import main
from pretrain.adaptation.ctc_finetune import Recogniser
from pretrain.evaluate.frozen_encoders import open_pretrained
from pretrain.inference.ctc_decoding import NGram, beam_search, greedy

SYMBOLS = "abc"


def random_output(frames: int, seed: int) -> np.ndarray:
    return torch.randn(frames, 4, generator=torch.Generator().manual_seed(seed)).mul(1.5).log_softmax(1).numpy()


def exact(log_probs_FV: np.ndarray) -> dict[str, float]:
    """Returns the probability of each text, summed over all CTC paths."""
    found: dict[str, float] = defaultdict(float)
    for path in itertools.product(range(4), repeat=len(log_probs_FV)):
        merged = [v for i, v in enumerate(path) if v and (i == 0 or v != path[i - 1])]
        found["".join(SYMBOLS[v - 1] for v in merged)] += math.exp(
            sum(p[v] for p, v in zip(log_probs_FV, path, strict=True))
        )
    return found


@pytest.mark.parametrize("seed", range(8))
def test_beam_search_finds_the_most_probable_text(seed: int) -> None:
    output = random_output(5, seed)
    probabilities = exact(output)
    best = max(probabilities, key=lambda text: probabilities[text])
    assert beam_search(output, SYMBOLS, beam=200, pruned_below=-100) == best


@pytest.mark.parametrize("seed", range(4))
def test_beam_search_includes_the_n_gram_score(seed: int) -> None:
    output, model = random_output(5, seed), NGram(["abab", "abca", "ab"], 3, SYMBOLS)

    def score(text: str, probability: float) -> float:
        return math.log(probability) + 0.7 * sum(model.log_prob(text[:i], s) for i, s in enumerate(text))

    best = max(exact(output).items(), key=lambda item: score(*item))[0]
    assert beam_search(output, SYMBOLS, 200, model, weight=0.7, pruned_below=-100) == best


def test_greedy_decoding_merges_repeats_and_drops_blanks() -> None:
    path = [0, 1, 1, 0, 1, 2, 2, 0, 3]
    assert greedy(np.eye(4)[path], SYMBOLS) == "aabc"


def test_the_n_gram_is_a_distribution_that_fits_its_texts() -> None:
    model = NGram(["abab", "abab"], 3, SYMBOLS)
    for context in ("", "a", "ab", "cc"):
        assert sum(math.exp(model.log_prob(context, s)) for s in SYMBOLS) == pytest.approx(1.0)
    assert model.log_prob("aba", "b") > math.log(0.8)


def test_a_hugging_face_model_can_be_fine_tuned(corpus: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    tiny = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, feat_extract_norm="layer",
    )  # fmt: skip
    transformers.Wav2Vec2Model(tiny).save_pretrained(tmp_path / "hub")
    net = Recogniser(open_pretrained(str(tmp_path / "hub")).model, SYMBOLS).eval()
    wave_BT, lengths_B = torch.randn(1, 16000), torch.tensor([16000])
    whole, _ = net(wave_BT, lengths_B)
    dropped, frames_B = net(wave_BT, lengths_B, torch.arange(49)[None] < 10)
    assert whole.shape == dropped.shape == (1, int(frames_B[0]), len(SYMBOLS) + 1)
    assert not torch.equal(whole, dropped)
    assert torch.equal(whole, net(wave_BT, lengths_B)[0])

    options = ["corpora=tones", "steps=8", "frozen_steps=2", "batch_seconds=6", "mask_time=0.05", "beam=0"]
    options += [f"manifest={corpus}/manifest.tsv", f"out={tmp_path / 'out'}"]
    assert main(["finetune", f"checkpoint={tmp_path / 'hub'}", *options]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["pretrained"]["model_type"] == "wav2vec2"
    assert [row["decoder"] for row in found["errors"]] == ["greedy"]


def test_fine_tuning_learns_to_transcribe_tones(corpus: Path, saved: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    options = ["corpora=tones", "steps=150", "frozen_steps=10", "lr=3e-3", "batch_seconds=6", "mask_time=0.05"]
    options += [f"manifest={corpus}/manifest.tsv", f"out={tmp_path}", "beam=8", "ngram=4"]
    assert main(["finetune", f"checkpoint={saved}", "task=ctc", *options]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    by = {row["decoder"]: row for row in found["errors"]}
    assert set(by) == {"greedy", "beam 8", "beam 8 + 4-gram"}
    assert all(row["utterances"] == 18 for row in by.values())
    assert by["beam 8 + 4-gram"]["wer"] < 0.7
    assert (tmp_path / "model.safetensors").exists()
