"""Measures without training: ABX, PNMI of k-means units, and RankMe, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch

from pretrain.evaluate import abx as phone_abx
from pretrain.evaluate import fastabx_cells
from pretrain.evaluate.features import Waves, phone_frames
from pretrain.evaluate.frozen_encoders import FrozenEncoder
from pretrain.evaluate.manifest import Interval, Utterance
from pretrain.evaluate.metrics import Interval95, phone_normalized_mutual_information
from pretrain.monitoring.detectors import rank_me

Found = list[tuple[str, Interval95]]
"""Values by name of the measure; the interval is NaN for measures that are not averaged over speakers."""
Phones = Mapping[str, Sequence[Interval]]
PER_PHONE, RESAMPLINGS, UNITS, MAX_FRAMES = 3, 500, 100, 20_000


def abx(
    encoder: FrozenEncoder,
    part: Sequence[Utterance],
    phones: Phones,
    classes: Mapping[str, int],
    waves: Waves,
    silence: Collection[str],
    library: str = "own",
) -> Found:
    """Measures the phone ABX error of each layer within and across speakers, with intervals over speakers.

    Args:
        encoder: computes the features.
        part: utterances of the evaluated split.
        phones: alignment of each utterance, by name.
        classes: index of each phone.
        waves: decoded audio.
        silence: labels that are not phones.
        library: own or fastabx.

    Raises:
        ValueError: the utterances give no triple.
    """
    tokens: list[tuple[str, str, np.ndarray]] = []
    for utterance in part:
        x_LFD = encoder.encode(waves(utterance)).float().numpy()
        for interval in phones[utterance.name]:
            first, last = (round(edge * encoder.rate_hz) for edge in (interval.start, interval.end))
            last = min(last, x_LFD.shape[1])
            if interval.phone not in silence and 2 <= last - first <= 30:
                tokens.append((interval.phone, utterance.speaker, x_LFD[:, first:last]))
    tokens = phone_abx.thinned(tokens, PER_PHONE)
    cells = fastabx_cells.cells if library == "fastabx" else phone_abx.cells
    if not tokens:
        raise ValueError("abx: no phone of these utterances is 2 to 30 frames long")
    found: Found = []
    for layer in range(len(tokens[0][2])):
        single = [(phone, speaker, x_LFD[layer]) for phone, speaker, x_LFD in tokens]
        for across in (False, True):
            name = f"ABX error {'across' if across else 'within'} speakers, layer {layer}"
            found.append((name, phone_abx.error(cells(single, across), RESAMPLINGS)))
    return found


def pnmi(
    encoder: FrozenEncoder,
    part: Sequence[Utterance],
    phones: Phones,
    classes: Mapping[str, int],
    waves: Waves,
    silence: Collection[str],
) -> Found:
    """Computes PNMI and purities of k-means units of each layer with the phones, without frames of silence.

    Args:
        encoder: computes the features.
        part: utterances of the evaluated split.
        phones: intervals of each utterance's phones, in seconds.
        classes: number of each phone.
        waves: reads the audio of an utterance.
        silence: phones that do not count as speech.
    """
    from sklearn.cluster import MiniBatchKMeans

    frames = phone_frames(encoder, part, phones, classes, waves)
    spoken_N = torch.isin(frames.y_N, torch.tensor([classes[p] for p in silence if p in classes]), invert=True)
    (chosen_N,) = spoken_N.nonzero(as_tuple=True)
    chosen_N = chosen_N[:: max(1, len(chosen_N) // MAX_FRAMES)]
    kept, labels = frames.x_NLD[chosen_N], frames.y_N[chosen_N].numpy()
    found: Found = []
    for layer in range(kept.shape[1]):
        x_ND = kept[:, layer].float().numpy()
        means = MiniBatchKMeans(min(UNITS, len(x_ND) // 4), n_init=3, batch_size=4096, random_state=0)
        value, purity, cluster = phone_normalized_mutual_information(labels, means.fit_predict(x_ND))
        named = {"PNMI": value, "phone purity": purity, "cluster purity": cluster}
        found += [(f"{name}, layer {layer}", point(value)) for name, value in named.items()]
    return found


def rankme(
    encoder: FrozenEncoder,
    part: Sequence[Utterance],
    phones: Phones,
    classes: Mapping[str, int],
    waves: Waves,
    silence: Collection[str],
) -> Found:
    """Measures the effective rank of each layer (RankMe, arXiv 2210.02885).

    Args:
        encoder: computes the features.
        part: utterances of the evaluated split.
        phones: intervals of each utterance's phones, in seconds.
        classes: number of each phone.
        waves: reads the audio of an utterance.
        silence: phones that do not count as speech.
    """
    frames = phone_frames(encoder, part, phones, classes, waves)
    kept = frames.x_NLD[:: max(1, len(frames.x_NLD) // 4096)].float().numpy()
    return [(f"RankMe, layer {layer}", point(rank_me(kept[:, layer]))) for layer in range(kept.shape[1])]


def point(value: float) -> Interval95:
    """Returns a value without an interval."""
    return Interval95(value, float("nan"), float("nan"))


MEASURES: dict[str, Callable[..., Found]] = {"abx": abx, "pnmi": pnmi, "rankme": rankme}
