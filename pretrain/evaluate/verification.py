"""Pairs of utterances: is the speaker the same? By the cosine of pooled frames, without fitting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.core.schema import ConfigError
from pretrain.evaluate.features import Waves
from pretrain.evaluate.frozen_encoders import FrozenEncoder
from pretrain.evaluate.manifest import Utterance
from pretrain.evaluate.metrics import Interval95, equal_error_rate


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
        raise ConfigError(f"trials={file}: there is no such file; it has lines `1 PATH PATH` or `0 PATH PATH`")
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
    valid: Sequence[Utterance],
    test: Sequence[Utterance],
    waves: Waves,
    trials: Trials | None = None,
    times: int = 0,
) -> Interval95:
    """Returns the equal error rate on `test` of the layer that is best on all pairs of `valid`.

    Args:
        encoder: computes the features.
        valid: utterances of other speakers; without any pair of one speaker, the last layer is taken.
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
    pairs = all_pairs(valid)
    if pairs.same_P.any() and not pairs.same_P.all():
        best = int(np.argmin([rate.value for rate in equal_error_rates(encoder, valid, pairs, waves)]))
    else:
        best = len(encoder.encode(waves(test[0]))) - 1
    return equal_error_rates(encoder, test, trials=trials, waves=waves, times=times, layer=best)[0]
