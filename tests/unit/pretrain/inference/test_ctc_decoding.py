"""CTC decoding and alignment, against enumeration of all paths."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from pretrain.inference.ctc_alignment import align
from pretrain.inference.ctc_decoding import NGram, beam_search, greedy

Symbols = tuple[int, ...]


def random_output(frames: int, seed: int) -> np.ndarray:
    return torch.randn(frames, 4, generator=torch.Generator().manual_seed(seed)).mul(1.5).log_softmax(1).numpy()


def paths(frames: int) -> dict[Symbols, list[tuple[int, ...]]]:
    """Returns the paths that spell each sequence of three symbols."""
    found: dict[Symbols, list[tuple[int, ...]]] = defaultdict(list)
    for path in itertools.product(range(4), repeat=frames):
        found[tuple(v - 1 for i, v in enumerate(path) if v and (i == 0 or v != path[i - 1]))].append(path)
    return found


PATHS = paths(5)


def log_prob(output: np.ndarray, path: tuple[int, ...]) -> float:
    return float(sum(p[v] for p, v in zip(output, path, strict=True)))


def exact(output: np.ndarray) -> dict[Symbols, float]:
    """Returns the probability of each sequence, summed over all paths."""
    return {symbols: sum(math.exp(log_prob(output, path)) for path in those) for symbols, those in PATHS.items()}


@pytest.mark.parametrize("seed", range(8))
def test_beam_search_finds_the_most_probable_symbols(seed: int) -> None:
    output = random_output(5, seed)
    probabilities = exact(output)
    best = max(probabilities, key=lambda symbols: probabilities[symbols])
    assert tuple(beam_search(output, beam=200, pruned_below=-100)) == best


@pytest.mark.parametrize("seed", range(4))
def test_beam_search_includes_the_n_gram_score(seed: int) -> None:
    output, model = random_output(5, seed), NGram([(0, 1, 0, 1), (0, 1, 2, 0), (0, 1)], 3, 3)

    def score(symbols: Symbols, probability: float) -> float:
        return math.log(probability) + 0.7 * sum(model.log_prob(symbols[:i], s) for i, s in enumerate(symbols))

    best = max(exact(output).items(), key=lambda item: score(*item))[0]
    assert tuple(beam_search(output, 200, model, weight=0.7, pruned_below=-100)) == best


def test_greedy_decoding_merges_repeats_and_drops_blanks() -> None:
    path = [0, 1, 1, 0, 1, 2, 2, 0, 3]
    assert greedy(np.eye(4)[path]) == [0, 0, 1, 2]


def test_the_n_gram_is_a_distribution_that_fits_its_sequences() -> None:
    model = NGram([(0, 1, 0, 1)] * 2, 3, 3)
    for context in ((), (0,), (0, 1), (2, 2)):
        assert sum(math.exp(model.log_prob(context, s)) for s in range(3)) == pytest.approx(1.0)
    assert model.log_prob((0, 1, 0), 1) > math.log(0.8)


@pytest.mark.parametrize("symbols", [(0,), (0, 0), (0, 1, 2), (2, 2, 1)])
@pytest.mark.parametrize("seed", range(4))
def test_the_alignment_is_the_most_probable_path(symbols: Symbols, seed: int) -> None:
    output = random_output(5, seed)
    best = max(PATHS[symbols], key=lambda path: log_prob(output, path))
    found = align(output, symbols)
    path = [0] * 5
    for symbol, aligned in zip(symbols, found, strict=True):
        path[aligned.start : aligned.stop] = [symbol + 1] * (aligned.stop - aligned.start)
        mean = np.mean([output[frame, symbol + 1] for frame in range(aligned.start, aligned.stop)])
        assert aligned.log_prob == pytest.approx(float(mean))
    assert tuple(path) == best


def test_symbols_that_do_not_fit_are_refused() -> None:
    assert align(random_output(3, 0), []) == []
    with pytest.raises(ValueError, match="3 symbols do not fit into 3 frames"):
        align(random_output(3, 0), [0, 0, 1])
