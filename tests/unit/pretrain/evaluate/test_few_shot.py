"""Few-shot classification: speakers of support and queries differ, and both classifiers equal their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_pipeline.core.schema import ConfigError
from data_pipeline.sampling.episodes import Episode
from pretrain.engines import inner_loop
from pretrain.evaluate.config import FewShotConfig
from pretrain.evaluate.features import Labelled
from pretrain.evaluate.few_shot import (
    LEARNED,
    PROTOTYPES,
    TUNED,
    classify_queries,
    draw,
    learner_of,
    most_shots,
    tallies,
)
from pretrain.evaluate.metrics import accuracy
from pretrain.heads.episode import prototypes
from pretrain.train_module import build_model
from tests.support.episodes import settings

WORDS, SPEAKERS, TAKES = 6, 4, 3
SETTINGS = FewShotConfig(ways=3, shots=(1, 4), queries=2, episodes=30, choice_episodes=10)


def spoken(seed: int, noise: float = 0.3) -> Labelled:
    """Makes words by speakers; layer 0 is noise, layer 1 has the word, with an offset of each speaker."""
    rng = np.random.default_rng(seed)
    words_N = np.tile(np.repeat(np.arange(WORDS), TAKES), SPEAKERS)
    speakers_N = np.repeat(np.arange(SPEAKERS), WORDS * TAKES)
    x_ND = (
        np.eye(10)[words_N] + noise * rng.normal(0, 1, (len(words_N), 10)) + 0.5 * rng.normal(0, 1, (4, 10))[speakers_N]
    )
    layers = np.stack([rng.normal(0, 1, x_ND.shape), x_ND], 1)
    names = tuple(f"speaker {seed}-{number}" for number in range(SPEAKERS))
    return Labelled(torch.from_numpy(layers).half(), torch.from_numpy(words_N), speakers_N, names)


def test_no_speaker_is_in_support_and_queries() -> None:
    part = spoken(0)
    for number in range(20):
        episode = draw(part, SETTINGS, 2, number, 0)
        assert episode.support_WK.shape == (3, 2)
        given, asked = part.speaker_N[episode.support_WK.ravel()], part.speaker_N[episode.queries_Q]
        assert not set(given) & set(asked)
        labels_W = part.y_N.numpy()[episode.support_WK]
        assert (labels_W == labels_W[:, :1]).all()
        assert (part.y_N.numpy()[episode.queries_Q] == labels_W[episode.classes_Q, 0]).all()
    again = draw(part, SETTINGS, 2, 19, 0)
    assert np.array_equal(again.queries_Q, episode.queries_Q)
    assert not np.array_equal(again.support_WK, draw(part, SETTINGS, 2, 18, 0).support_WK)


def test_prototypes_are_nearest_means_and_steps_those_of_autograd() -> None:
    x_ND = torch.randn(40, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    episode = Episode(np.arange(12).reshape(4, 3), np.arange(12, 40), np.zeros(28))
    means_WD = x_ND[:12].view(4, 3, 7).mean(1)
    assert classify_queries(x_ND, episode, 0, 0.0).tolist() == torch.cdist(x_ND[12:], means_WD).argmin(1).tolist()
    weight_WD, bias_W = (2 * means_WD).requires_grad_(), (-means_WD.square().sum(1)).requires_grad_()
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(
            (x_ND[:12] @ weight_WD.T + bias_W) / 7, torch.arange(4).repeat_interleave(3)
        )
        gradients = torch.autograd.grad(loss, (weight_WD, bias_W))
        # the step of scaled scores: the gradient times the number of channels
        weight_WD, bias_W = (
            (w - 2.0 * 7 * g).detach().requires_grad_() for w, g in zip((weight_WD, bias_W), gradients, strict=True)
        )
    expected = (x_ND[12:] @ weight_WD.T + bias_W).argmax(1)
    assert classify_queries(x_ND, episode, 4, 2.0).tolist() == expected.tolist()
    assert classify_queries(x_ND, episode, 4, 2.0).tolist() != classify_queries(x_ND, episode, 0, 0.0).tolist()


def test_words_of_unseen_speakers_are_found_by_the_layer_that_has_them() -> None:
    found = {name: accuracy([tally]) for name, tally in tallies(spoken(0), spoken(1), SETTINGS).items()}
    assert set(found) == {f"{way}, 3-way {shots}-shot" for way in (PROTOTYPES, TUNED) for shots in (1, 4)}
    assert found[f"{PROTOTYPES}, 3-way 4-shot"] > found[f"{PROTOTYPES}, 3-way 1-shot"] > 0.5
    assert found[f"{TUNED}, 3-way 4-shot"] > 0.7
    noise = spoken(1)
    noise.x_NLD[:, 1] = noise.x_NLD[:, 0]
    guessed = tallies(spoken(0), noise, SETTINGS)
    assert all(abs(accuracy([tally]) - 1 / 3) < 0.12 for tally in guessed.values())


def test_too_few_classes_or_examples_are_refused_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"few_shot\.ways=7.*there are 6 classes, 4 speakers and 72 recordings"):
        draw(spoken(0), FewShotConfig(ways=7), 1, 0, 0)
    with pytest.raises(ConfigError, match=r"few_shot\.shots=9"):
        draw(spoken(0), SETTINGS, 9, 0, 0)
    assert most_shots(spoken(0), SETTINGS, 9) == 6


def test_a_meta_run_is_measured_with_its_own_start_and_rates() -> None:
    """Its inner loop on pooled features finds what the head finds after the same steps."""
    config = settings(method="anil", adapt=["heads.task.classes"], inner_lr=0.7)
    module = build_model(config)
    learner = learner_of(module, config)
    assert learner is not None
    draw_from = torch.Generator().manual_seed(0)
    head = learner.head
    with torch.no_grad():
        head.project.weight.add_(0.05 * torch.randn(head.project.weight.shape, generator=draw_from))
    x_NLD = torch.randn(20, 3, 128, generator=draw_from)
    episode = Episode(np.arange(6).reshape(2, 3), np.arange(6, 20), np.zeros(14))
    embedded_ND = learner.embed(x_NLD)
    last_ND = x_NLD[:, -1]
    centred_ND = (last_ND - last_ND.mean(0)) / last_ND.std(0)
    torch.testing.assert_close(embedded_ND, head.embed(centred_ND).detach())
    ways_S = torch.arange(2).repeat_interleave(3)
    weight, bias = prototypes(embedded_ND[:6].clone(), ways_S, 2)
    path = inner_loop.descend(
        {"weight": weight, "bias": bias},
        lambda w, step: torch.nn.functional.cross_entropy(embedded_ND[:6].clone() @ w["weight"].T + w["bias"], ways_S),
        lambda name, step: torch.tensor(0.7),
        2,
    )
    logits = embedded_ND[6:] @ path.weights[-1]["weight"].detach().T + path.weights[-1]["bias"].detach()
    assert learner.adapted(embedded_ND, episode).tolist() == logits.argmax(1).tolist()
    found = tallies(spoken(0), spoken(1), SETTINGS)
    assert not any(name.startswith(LEARNED) for name in found)
    assert learner_of(build_model(settings(method="maml")), settings(method="maml")) is None
