"""Data of `joint_embedding.py`: spoken and handwritten digits, spoken sentences, their augmentation and batches."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import affine_transform
from scipy.signal import butter, lfilter, sosfilt

from benchmarks.prove.alignments import aligned_words
from data_pipeline.audio.transforms import change_speed
from data_pipeline.core.types import IMAGE, SAMPLE_RATE, Batch, Images
from pretrain.evaluate.manifest import Utterance

ALPHABET = " 'abcdefghijklmnopqrstuvwxyz"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FURTHER = "asterisk-core-sounds"
"""Telephone prompts, of which one English voice says each digit once; for training."""
LONGEST_WORD = 0.9
"""Seconds of a word with its margins: more is two equal words."""
SIDE = 8
"""Pixels of scikit-learn's digits."""

Matrix = np.ndarray


@dataclass(frozen=True)
class Sample:
    """One sample; an absent part is None or "". tokens: instead of the characters of the text."""

    key: str
    wave: Matrix | None = None
    pixels: Matrix | None = None
    text: str = ""
    tokens: tuple[int, ...] = ()


def batch(samples: Sequence[Sample]) -> Batch:
    """Returns samples as a micro-batch; a sample without audio has zero samples of it."""
    waves = [sample.wave if sample.wave is not None else np.zeros(0, np.float32) for sample in samples]
    wave_BT = torch.zeros(len(waves), max(SAMPLE_RATE // 4, *map(len, waves)))
    for row, wave in zip(wave_BT, waves, strict=True):
        row[: len(wave)] = torch.from_numpy(wave)
    tokens = (sample.tokens or [ALPHABET.index(c) for c in sample.text] for sample in samples)
    ids = [torch.tensor(numbers, dtype=torch.int64) for numbers in tokens]
    images = [np.zeros((1, SIDE, SIDE), np.uint8) if sample.pixels is None else sample.pixels for sample in samples]
    present_B = torch.tensor([sample.pixels is not None for sample in samples])
    return Batch(
        wave_BT,
        torch.tensor(list(map(len, waves))),
        tuple(sample.key for sample in samples),
        0,
        tokens={"text": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)},
        images={IMAGE: Images(torch.from_numpy(np.stack(images)), present_B)},
    )


def speech_folder(listed: Sequence[Utterance]) -> Path:
    """Returns the folder of speech that holds the utterances of a manifest."""
    [root] = {u.path.removesuffix(u.name) for u in listed if u.split in ("train", "valid")}
    return Path(root)


def cut_words(listed: Sequence[Utterance]) -> list[Utterance]:
    """Returns the digits in transcribed English sentences, cut out by their forced alignment, but of split test.

    Without them, English has three voices and a fourth that says each digit once.
    """
    sentences = {u.name: u for u in listed if u.split in ("train", "valid")}
    found = []
    for name, words in aligned_words(speech_folder(listed)).items():
        for word in words:
            if word.text in WORDS and name in sentences and word.stop - word.start < LONGEST_WORD * SAMPLE_RATE:
                named = replace(sentences[name], name=f"{name}@{word.start}", text=word.text)
                found.append(replace(named, start=word.start, stop=word.stop))
    return found


def word_of(utterance: Utterance) -> str:
    """Returns the English word of a spoken digit; Arabic ones have it as their label, prompts a number."""
    if utterance.corpus == FURTHER:
        number = utterance.value("label").removeprefix("digits_")
        return WORDS[int(number)] if number.isdecimal() and int(number) < 10 else ""
    return utterance.text or utterance.value("label")


def handwritten() -> tuple[list[tuple[Matrix, int]], list[tuple[Matrix, int]]]:
    """Returns (1, 8, 8) uint8 images of scikit-learn's digits with their digit: two thirds to train, a third to test.

    The set is sorted by writers, so that the test part has writers of its own.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = [
        (np.minimum(image * 16, 255).astype(np.uint8)[None], int(digit))
        for image, digit in zip(data.images, data.target, strict=True)
    ]
    cut = 2 * len(images) // 3
    return images[:cut], images[cut:]


def augmented(wave: Matrix, rng: np.random.Generator) -> Matrix:
    """Returns the audio as of another voice and another channel: speed with pitch, bandwidth, tilt, place and noise.

    Half of the recordings lose what is above 3 to 4 kHz: those in English are at 8 kHz, those in Arabic at 16 kHz.
    """
    factor = float(rng.uniform(0.8, 1.25))
    wave = change_speed(wave, factor, round(len(wave) / factor))
    if rng.random() < 0.5:
        wave = sosfilt(low_pass(int(rng.integers(6, 9))), wave)
    wave = lfilter([1.0, float(rng.uniform(-0.6, 0.6))], [1.0], wave).astype(np.float32)
    wave = np.pad(wave, (int(rng.integers(0, SAMPLE_RATE // 10)), int(rng.integers(0, SAMPLE_RATE // 10))))
    level = float(np.sqrt(np.mean(wave**2))) + 1e-6
    noise = rng.standard_normal(len(wave)).astype(np.float32)
    tilted = noise if rng.random() < 0.5 else np.convolve(noise, np.ones(8, np.float32) / 3, "same")
    return (wave + tilted * level * 10 ** (-float(rng.uniform(5, 35)) / 20)).astype(np.float32)


@functools.cache
def low_pass(half_kilohertz: int) -> Matrix:
    """Returns the sections of a low-pass filter."""
    sections: Matrix = butter(6, 500 * half_kilohertz, "lowpass", fs=SAMPLE_RATE, output="sos")
    return sections


def shifted(pixels: Matrix, rng: np.random.Generator) -> Matrix:
    """Returns the image turned, scaled and moved a little, with noise."""
    angle, scale, middle = rng.uniform(-0.2, 0.2), rng.uniform(0.85, 1.15), np.full(2, (SIDE - 1) / 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    moved = affine_transform(
        pixels[0].astype(np.float32), turn, middle - turn @ (middle + rng.uniform(-0.7, 0.7, 2)), order=1
    )
    return np.clip(moved + rng.normal(0, 12, moved.shape), 0, 255).astype(np.uint8)[None]


def written(text: str) -> str:
    """Returns a text in the alphabet's characters."""
    return " ".join("".join(c for c in text.lower() if c in ALPHABET).split())
