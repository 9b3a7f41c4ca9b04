"""Finds speech for the demo: a given folder, that of AURICLE_SPEECH, Debian's voice packages, or synthetic speech."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.schema import ConfigError
from data_pipeline.corpora.local_speech import MANIFEST_NAME, SPEECH_VARIABLE, speech_folder

PACKAGES = (
    "asterisk-core-sounds-en-wav",
    "asterisk-core-sounds-fr-wav",
    "asterisk-core-sounds-it-wav",
    "pocketsphinx-testdata",
)
"""Debian packages of recorded speech in formats that libsndfile reads: 1.2 h, 57 MB."""
RATE = 16_000
Wave = npt.NDArray[np.float64]


@dataclass(frozen=True)
class DemoCorpus:
    """Speech for the demo: a short name for its folder below demo/, the corpus to preprocess, and its origin.

    `overrides` are fields of `auricle preprocess`.
    """

    name: str
    overrides: tuple[str, ...]
    origin: str


def find_corpus(given: str, work: Path, say: Callable[[str], None] = print) -> DemoCorpus:
    """Returns the first source that is available.

    The order is `given`, the folder that AURICLE_SPEECH names, Debian's voice packages, synthetic speech. A folder of
    AURICLE_SPEECH with a manifest.tsv contributes the rows of its splits pretrain and train.

    Args:
        given: folder of audio; may be empty.
        work: folder for downloaded and synthetic speech.
        say: receives progress lines.

    Raises:
        ConfigError: `given` or AURICLE_SPEECH is not a folder.
    """
    if given:
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"corpus={given}: not a folder; give a folder of audio files")
        return DemoCorpus(_short_name(folder), _below(folder), f"your folder {folder}")
    speech = speech_folder()
    if speech:
        manifest = speech / MANIFEST_NAME
        listed = ("corpus=manifest", f"corpus.path={manifest}", "corpus.splits=[pretrain,train]")
        overrides = listed if manifest.is_file() else _below(speech)
        return DemoCorpus(_short_name(speech), overrides, f"{SPEECH_VARIABLE}={speech}")
    target = work / "debian"
    if (target / "whole").exists() or _from_debian(target, say):
        origin = f"recorded voices of Debian's {', '.join(PACKAGES)}"
        return DemoCorpus("debian", _below(target / "audio"), origin)
    synthesise(work / "synthetic" / "audio")
    origin = "speech-like sounds made by auricle itself, not speech"
    return DemoCorpus("synthetic", _below(work / "synthetic" / "audio"), origin)


def _short_name(folder: Path) -> str:
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    return f"{re.sub('[^A-Za-z0-9]+', '_', folder.resolve().name)}_{key}"


def _below(folder: Path) -> tuple[str, ...]:
    return ("corpus=path", f"corpus.path={folder}")


def _from_debian(target: Path, say: Callable[[str], None]) -> bool:
    """Downloads and unpacks the packages without installing them; returns False on failure."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        return False
    say(f"downloading speech: Debian's {', '.join(PACKAGES)} (57 MB)")
    packages, apt = target / "packages", target / "apt"
    for folder in (packages, apt / "lists" / "partial", apt / "cache" / "archives" / "partial"):
        folder.mkdir(parents=True, exist_ok=True)
    own = ("-o", f"Dir::State::lists={apt.resolve()}/lists", "-o", f"Dir::Cache={apt.resolve()}/cache")
    # first with the machine's package lists, then with private ones, since many containers come without lists
    works = _run("apt-get", "download", *PACKAGES, cwd=packages) or (
        _run("apt-get", *own, "update", cwd=apt) and _run("apt-get", *own, "download", *PACKAGES, cwd=packages)
    )
    if not works:
        say("apt could not deliver them")
        return False
    for package in sorted(packages.glob("*.deb")):
        if not _run("dpkg", "-x", package.name, str((target / "tree").resolve()), cwd=packages):
            return False
    (target / "audio").mkdir(exist_ok=True)
    for number, wav in enumerate(sorted((target / "tree").rglob("*.wav"))):
        if wav.parent.name != "silence":
            wav.rename(target / "audio" / f"{number:05d}_{wav.name}")
    shutil.rmtree(target / "tree")
    shutil.rmtree(apt)
    (target / "whole").touch()
    return True


def _run(*command: str, cwd: Path) -> bool:
    try:
        return subprocess.run(command, cwd=cwd, capture_output=True, timeout=120, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def synthesise(folder: Path, utterances: int = 240) -> None:
    """Writes half an hour of formant synthesis: twelve voices, vowels, fricatives and pauses. Deterministic.

    The harmonics of a pulse train are weighted by three moving resonances (Fant's source-filter model), so there is
    some of the structure of speech to learn. The result does not measure how well a model learns speech.
    """
    import soundfile

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(utterances):
        path = folder / f"voice{number % 12:02d}_{number:04d}.flac"
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            soundfile.write(temporary, _utterance(number), RATE, format="FLAC")
            temporary.rename(path)


def _utterance(number: int) -> Wave:
    voice, draw = keyed_rng("voice", number % 12), keyed_rng("utterance", number)
    pitch, tract = voice.uniform(80, 240), voice.uniform(0.9, 1.15)
    pieces = [np.zeros(int(0.1 * RATE))]
    for _ in range(int(draw.integers(25, 60))):
        length = int(draw.uniform(0.06, 0.25) * RATE)
        kind = draw.choice(["vowel", "vowel", "vowel", "fricative", "pause"])
        if kind == "vowel":
            pieces.append(_vowel(draw, length, pitch, tract))
        elif kind == "fricative":
            noise = np.diff(draw.standard_normal(length + 1))
            pieces.append(0.03 * noise * np.hanning(length))
        else:
            pieces.append(np.zeros(length))
    wave = np.concatenate(pieces)
    wave += 0.001 * draw.standard_normal(len(wave))
    loudest: Wave = 0.5 * wave / np.abs(wave).max()
    return loudest


def _vowel(draw: np.random.Generator, length: int, pitch: float, tract: float) -> Wave:
    centres = np.array([draw.uniform(280, 800), draw.uniform(900, 2300), draw.uniform(2300, 3200)]) * tract
    glide = centres[:, None] * np.linspace(1.0, draw.uniform(0.85, 1.15), length)
    f0 = pitch * np.linspace(draw.uniform(0.9, 1.2), draw.uniform(0.8, 1.0), length)
    phase = 2 * np.pi * np.cumsum(f0) / RATE
    wave = np.zeros(length)
    for harmonic in range(1, int(4000 / pitch)):
        frequency = harmonic * f0
        gain = sum(1.0 / (1.0 + ((frequency - centre) / 90.0) ** 2) for centre in glide)
        wave += gain * np.sin(harmonic * phase) / np.sqrt(harmonic)
    result: Wave = wave * np.hanning(length)
    return result
