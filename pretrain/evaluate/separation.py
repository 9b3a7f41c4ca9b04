"""Separation of mixtures of unseen speakers: improvement of the SI-SNR beside an ideal mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from pretrain.checkpointing.head_choice import checkpoint_with_heads, chosen_device, chosen_head
from pretrain.checkpointing.weights import load_checkpoint
from pretrain.evaluate.config import EvaluateConfig, items
from pretrain.evaluate.features import Waves
from pretrain.evaluate.manifest import Utterance, corpora_in_words
from pretrain.evaluate.metrics import Interval95, Tally, bootstrap
from pretrain.heads.separation import Separation
from pretrain.interfaces.models import SpeechModel
from pretrain.nn.numerics import pad_audio
from pretrain.nn.separation import EPS, Spectra, best_assignment, si_snr


@dataclass(frozen=True)
class Separator:
    """A model in evaluation mode and its separating head."""

    model: SpeechModel
    head: Separation
    name: str
    step: int
    """Updates of its run."""

    @torch.inference_mode()
    def separate(self, mixture_T: Tensor) -> Tensor:
        """Returns estimates of the parts of a mixture, (S, T), in no particular order; `mixture_T` (T,) at 16 kHz."""
        device = next(self.head.parameters()).device
        wave_1T = pad_audio(mixture_T[None].to(device), self.model.frontend.least_samples())
        length_1 = torch.tensor([len(mixture_T)])
        estimates_1ST: Tensor = self.head.separate(self.model(wave_1T, length_1), wave_1T, length_1)
        return estimates_1ST[0, :, : len(mixture_T)].cpu()


@dataclass(frozen=True)
class Example:
    """A mixture of several speakers.  parts_ST: its clean parts, whose sum it is.  speakers: of the parts."""

    parts_ST: Tensor
    speakers: tuple[str, ...]


def open_separator(given: str, head: str = "", device: str = "cpu") -> Separator:
    """Loads a run with a head that separates.

    Args:
        given: run folder (its newest checkpoint) or checkpoint.
        head: name of the head; empty: the only one that separates.
        device: torch device for the model, or "auto".

    Raises:
        ConfigError: there is no such checkpoint or head.
        ValueError: the checkpoint is damaged.
    """
    device = chosen_device(device)
    module, config, step = load_checkpoint(checkpoint_with_heads(given))
    remedy = "train one with heads.NAME.name=separation in `auricle pretrain`"
    described, field = "that separates speech", "separation.head"
    _, chosen = chosen_head(
        given, module, config, kind=Separation, head=head, described=described, remedy=remedy, field=field
    )
    return Separator(module.model.eval().to(device), chosen.eval().to(device), config.name, step)


def draw_examples(
    config: EvaluateConfig, utterances: Sequence[Utterance], waves: Waves, speakers: int
) -> list[Example]:
    """Makes mixtures of different speakers, the same for every model.

    Args:
        config: split, corpora, number, length and levels of the mixtures.
        utterances: the manifest.
        waves: decoded audio.
        speakers: in each mixture.

    Raises:
        ConfigError: the split has too few speakers.
    """
    asked = config.separation
    by_speaker: dict[str, list[Utterance]] = {}
    corpora = items(config.corpora)
    for utterance in utterances:
        if utterance.part == config.ask and (not corpora or utterance.corpus in corpora):
            by_speaker.setdefault(utterance.speaker, []).append(utterance)
    if len(by_speaker) < speakers:
        raise ConfigError(
            f"task=separation: a mixture needs {speakers} speakers, and there are {len(by_speaker)} in split "
            f"ask={config.ask} of {corpora_in_words(corpora, utterances)}"
        )
    names, made = sorted(by_speaker), []
    for number in range(asked.mixtures):
        rng = keyed_rng(0, number, "separation")
        # every speaker is the first one equally often
        first = names[number % len(names)]
        rest = [name for name in names if name != first]
        chosen = [first, *(rest[k] for k in rng.choice(len(rest), speakers - 1, replace=False))]
        parts = []
        for name in chosen:
            wave_T = waves(by_speaker[name][int(rng.integers(len(by_speaker[name])))]).float()
            length = int(asked.seconds * SAMPLE_RATE)
            begin = int(rng.integers(max(1, len(wave_T) - length + 1)))
            parts.append(pad_audio(wave_T[None, begin : begin + length], length)[0])
        levels = [0.0, *(-rng.uniform(*asked.snr_db) for _ in parts[1:])]
        scaled = [
            part_T * 0.05 * 10 ** (level / 20) / part_T.square().mean().sqrt().clamp(min=1e-6)
            for part_T, level in zip(parts, levels, strict=True)
        ]
        made.append(Example(torch.stack(scaled), tuple(chosen)))
    return made


def improvement(estimates_ST: Tensor, parts_ST: Tensor) -> Tensor:
    """Returns how much closer the estimates are to the parts than their mixture is, in dB, (S,); the best order."""
    costs_1SS = -si_snr(estimates_ST[None, :, None], parts_ST[None, None])
    arranged_ST = best_assignment(costs_1SS).arranged(estimates_ST[None])[0]
    return si_snr(arranged_ST, parts_ST) - si_snr(parts_ST.sum(0).expand_as(parts_ST), parts_ST)


def ideal_masks(parts_ST: Tensor, spectra: Spectra) -> Tensor:
    """Returns what ideal ratio masks of magnitudes make of the parts' mixture, (S, T): a bound for real masks."""
    parts_SKC = spectra(parts_ST)
    masks_SKC = parts_SKC.abs() / (parts_SKC.abs().sum(0) + EPS)
    return spectra.inverse(masks_SKC * parts_SKC.sum(0), parts_ST.shape[1])


def report(
    config: EvaluateConfig,
    separator: Separator,
    utterances: Sequence[Utterance],
    waves: Waves,
    say: Callable[[str], None],
) -> Iterator[tuple[str, Interval95]]:
    """Yields (measure, mean over mixtures with its 95 % interval over the first speakers): model, then ideal masks.

    Args:
        config: the mixtures.
        separator: separates.
        utterances: the manifest.
        waves: decoded audio.
        say: receives a line per measure.
    """
    examples = draw_examples(config, utterances, waves, separator.head.config.sources)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "SI-SNR improvement, dB": lambda parts_ST: separator.separate(parts_ST.sum(0)),
        "SI-SNR improvement of ideal ratio masks, dB": lambda parts_ST: ideal_masks(parts_ST, separator.head.spectra),
    }
    for measure, separate in ways.items():
        sums: dict[str, np.ndarray] = {}
        for example in examples:
            gain = float(improvement(separate(example.parts_ST), example.parts_ST).mean())
            sums[example.speakers[0]] = sums.get(example.speakers[0], np.zeros(2)) + np.array([gain, 1.0])
        tally: Tally = {speaker: (float(found[0]), float(found[1])) for speaker, found in sums.items()}
        found = bootstrap([tally], config.bootstrap)
        say(f"separation, {measure}: {found.value:.1f}  {separator.name}")
        yield measure, found
