"""Pairs of utterances: is the speaker the same? By the cosine of pooled frames, without fitting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from data_pipeline.core.rng import keyed_rng, keyed_seed
from data_pipeline.core.schema import ConfigError
from pretrain.evaluate.features import Waves
from pretrain.evaluate.frozen_encoders import FrozenEncoder
from pretrain.evaluate.manifest import Utterance
from pretrain.evaluate.metrics import Interval95, equal_error_rate

SAMPLE: Final = 200
"""About how many recordings choose the layer, where they are drawn from many."""
OF_EACH: Final = 5
"""Recordings of each speaker among them; more where there are few speakers."""


@dataclass(frozen=True)
class Trials:
    """Pairs of utterances.  first_P, second_P: indices of the utterances.  same_P: whether the speaker is the same."""

    first_P: np.ndarray
    second_P: np.ndarray
    same_P: np.ndarray


def all_pairs(part: Sequence[Utterance]) -> Trials:
    """Returns every pair of two utterances."""
    first_P, second_P = np.triu_indices(len(part), 1)
    speakers = np.array([u.speaker for u in part])
    return Trials(first_P, second_P, speakers[first_P] == speakers[second_P])


def read_trials(file: Path, utterances: Sequence[Utterance]) -> tuple[list[Utterance], Trials, int]:
    """Reads a list of trials: lines of 1 (same speaker) or 0 and two paths, as VoxCeleb's veri_test.txt.

    Args:
        file: the list.
        utterances: the recordings, by their path below the data's folder, or by the end of it.

    Returns:
        The utterances of the trials, the trials, and the number of lines whose recordings are not among `utterances`.

    Raises:
        ConfigError: there is no such file, a line has another form, or no line can be used.
    """
    if not file.is_file():
        raise ConfigError(
            f"trials={file}: there is no such file; it has lines `1 PATH PATH` (same speaker) or `0 PATH PATH`. Put it "
            "there, or leave `trials` empty in a task file of your own to use all pairs"
        )
    by_end = {"/".join(u.file.rsplit("/", depth)[-depth:]): u for u in utterances for depth in (1, 2, 3, 4)}
    by_end |= {u.file: u for u in utterances}
    numbers: dict[str, int] = {}
    used: list[Utterance] = []
    rows, lost = [], 0
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) != 3 or parts[0] not in ("0", "1"):
            raise ConfigError(f"trials={file}: line {number} is not `1 PATH PATH` or `0 PATH PATH`")
        pair = [by_end.get(path) for path in parts[1:]]
        if any(u is None for u in pair):
            lost += 1
            continue
        for u in pair:
            if u is not None and u.name not in numbers:
                numbers[u.name] = len(used)
                used.append(u)
        rows.append((*(numbers[u.name] for u in pair if u is not None), parts[0] == "1"))
    if not rows:
        raise ConfigError(f"trials={file}: none of its {lost} pairs has both recordings in the task's data")
    table = np.array(rows)
    return used, Trials(table[:, 0], table[:, 1], table[:, 2].astype(bool)), lost


def sampled(utterances: Sequence[Utterance]) -> list[Utterance]:
    """Returns about `SAMPLE` recordings, several of each speaker, so that they have many pairs of one speaker.

    Speakers with a single recording come last. Which recordings are drawn depends on the names of speakers and
    recordings alone.
    """
    of: dict[str, list[Utterance]] = {}
    for u in sorted(utterances, key=lambda u: u.name):
        of.setdefault(u.speaker, []).append(u)
    each = max(OF_EACH, SAMPLE // max(1, len(of)))
    found: list[Utterance] = []
    for name in sorted(of, key=lambda name: (len(of[name]) == 1, keyed_seed("verification", name))):
        if len(found) >= SAMPLE:
            break
        order = keyed_rng("verification", name).permutation(len(of[name]))
        found += [of[name][i] for i in order[:each]]
    return found


def for_choice(train: Sequence[Utterance], valid: Sequence[Utterance], least_speakers: int) -> Sequence[Utterance]:
    """Returns the recordings that choose the layer: `valid`, or a sample of both parts if it has too few speakers.

    Nothing is fitted to `train`, so that both parts are as good.

    Args:
        train: recordings of the training speakers.
        valid: those of the validation speakers.
        least_speakers: with fewer speakers, or without pairs, `valid` does not choose alone.
    """
    enough = len({u.speaker for u in valid}) >= least_speakers and can_choose(valid)
    return valid if enough else sampled([*train, *valid])


def can_choose(utterances: Sequence[Utterance]) -> bool:
    """Returns whether there are pairs of one speaker and pairs of two, as the choice of a layer needs."""
    counts = Counter(u.speaker for u in utterances)
    return len(counts) > 1 and max(counts.values()) > 1


def pooled_cosines(encoder: FrozenEncoder, part: Sequence[Utterance], waves: Waves) -> np.ndarray:
    """Returns unit vectors of each utterance and layer, (N, L, D): mean frames, without the mean of all utterances."""
    x_NLD = np.stack([encoder.encode(waves(u)).float().mean(1).numpy() for u in part])
    x_NLD -= x_NLD.mean(0)
    unit_NLD: np.ndarray = x_NLD / np.maximum(np.linalg.norm(x_NLD, axis=2, keepdims=True), 1e-9)
    return unit_NLD


def equal_error_rates(
    encoder: FrozenEncoder, part: Sequence[Utterance], trials: Trials, waves: Waves, times: int = 0, layer: int = -1
) -> list[Interval95]:
    """Returns the equal error rate of each layer with its interval over speakers.

    Args:
        encoder: computes the features.
        part: the utterances.
        trials: the pairs.
        waves: decoded audio.
        times: bootstrap draws of the speakers; a pair counts as often as both of its speakers were drawn.
        layer: the only layer to measure; -1: all.
    """
    unit_NLD = pooled_cosines(encoder, part, waves)
    names, owner_N = np.unique([u.speaker for u in part], return_inverse=True)
    rng, found = np.random.default_rng(0), []
    drawn = [np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names)) for _ in range(times)]
    for one in range(unit_NLD.shape[1]) if layer < 0 else [layer]:
        x_ND = unit_NLD[:, one]
        score_P = np.concatenate(
            [
                np.einsum("pd,pd->p", x_ND[trials.first_P[at : at + 65_536]], x_ND[trials.second_P[at : at + 65_536]])
                for at in range(0, len(trials.same_P), 65_536)
            ]
        )
        value = equal_error_rate(score_P, trials.same_P)
        rates = []
        for weight_S in drawn:
            weight_P = (weight_S[owner_N[trials.first_P]] * weight_S[owner_N[trials.second_P]]).astype(float)
            if weight_P[trials.same_P].any() and weight_P[~trials.same_P].any():
                rates.append(equal_error_rate(score_P, trials.same_P, weight_P))
        low, high = np.percentile(rates, [2.5, 97.5]) if rates else (float("nan"), float("nan"))
        found.append(Interval95(value, float(low), float(high)))
    return found


def verification(
    encoder: FrozenEncoder,
    others: Sequence[Utterance],
    test: Sequence[Utterance],
    waves: Waves,
    trials: Trials | None = None,
    times: int = 0,
) -> Interval95:
    """Returns the equal error rate on `test` of the layer that is best on all pairs of `others`.

    Args:
        encoder: computes the features.
        others: utterances of other speakers; the last layer is taken if they cannot choose one (`can_choose`).
        test: utterances to verify.
        waves: decoded audio.
        trials: pairs of `test`; None: all of them.
        times: bootstrap draws of the speakers for the interval.

    Raises:
        ValueError: the pairs of `test` are all of one kind.
    """
    trials = trials or all_pairs(test)
    if trials.same_P.all() or not trials.same_P.any():
        raise ValueError("verification needs pairs of the same speaker and pairs of two; give more utterances of each")
    if can_choose(others):
        rates = equal_error_rates(encoder, others, all_pairs(others), waves)
        best = int(np.argmin([rate.value for rate in rates]))
    else:
        best = len(encoder.encode(waves(test[0]))) - 1
    return equal_error_rates(encoder, test, trials=trials, waves=waves, times=times, layer=best)[0]
