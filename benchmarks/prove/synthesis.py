"""Trains a voice for strings of digits and lets an independent recogniser listen to it.

    python benchmarks/prove/synthesis.py                  # about 25 minutes of one core
    python benchmarks/prove/synthesis.py --trained        # listens to what an earlier call trained in --work

On real speech (AURICLE_SPEECH): one speaker of the Free Spoken Digit Dataset (8 kHz, 250 recordings, two minutes).
Recordings of 20 takes of each digit are joined to strings of 3 to 5 digits, and `synthesis_tiny` is trained on them.
PocketSphinx, which accepts any string of digits, then listens to

    recording     strings joined from the other 5 takes of each digit
    vocoder       the same, taken apart into mel frames and put together by the trained vocoder, or by Griffin-Lim
    text          the same strings from their text, by the trained vocoder, or by Griffin-Lim
    untrained     from text before training

Then `auricle speak` says "three one four" into pi.wav of --work, and measured are the time of one core for a second of
speech, and text to mel frames beside transformers' FastSpeech2ConformerModel with as many layers and channels. Writes
benchmarks/results/synthesis.md, .json and .png. Exit code 1 unless the digit error of the text is at most twice that of
the recordings through the vocoder, and the real-time factor at most 0.2.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.prove.common import parser_of, quiet_auricle, real_speech  # noqa: E402
from data_pipeline.audio.codecs import read_mono  # noqa: E402
from data_pipeline.core.jsonl import read_rows  # noqa: E402
from data_pipeline.core.rng import keyed_rng  # noqa: E402
from pretrain.evaluate.manifest import read_manifest  # noqa: E402
from pretrain.evaluate.metrics import bootstrap  # noqa: E402
from pretrain.evaluate.synthesis import copy_synthesis, mel_cepstral_distortion, pitch_error, pocketsphinx  # noqa: E402
from pretrain.generation.voice import Voice, open_voice  # noqa: E402
from pretrain.models.synthesis.synthesizer import AS_LEARNED  # noqa: E402
from pretrain.profiling.processor import model_name  # noqa: E402
from pretrain.recognition.error_rates import edits  # noqa: E402

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = 'symbols=" \'abcdefghijklmnopqrstuvwxyz"'
TEST_TAKES = 5
"""Of each digit, never heard in training."""
PAUSE = 4_000
"""Samples of silence between digits, and at both ends: with 0.1 s PocketSphinx hears four times as many errors."""
FADE = 160
"""Samples over which each recording begins and ends, since a step sounds like a consonant."""
NOISE = 1e-3
"""Amplitude of the noise below all of it; speech has 0.1."""


@dataclass(frozen=True)
class String:
    """A string of digits with its audio at 16 kHz."""

    text: str
    wave_T: np.ndarray


def main() -> int:
    """Trains, listens and measures; returns the exit code."""
    parser = parser_of(__doc__, "synthesis")
    parser.add_argument("--speaker", default="fsdd-jackson")
    parser.add_argument("--updates", type=int, default=1_600, help="of training (default: 1,600)")
    parser.add_argument("--train", type=int, default=200, help="strings for training (default: 200)")
    parser.add_argument("--test", type=int, default=60, help="strings to listen to (default: 60)")
    parser.add_argument("--trained", action="store_true", help="listen to the run that an earlier call left in --work")
    given = parser.parse_args()
    manifest = real_speech()
    if manifest is None:
        return 0
    torch.set_num_threads(1)
    if not given.trained:
        shutil.rmtree(given.work, ignore_errors=True)
    takes = read_takes(manifest, given.speaker)
    train_takes = {digit: waves[:-TEST_TAKES] for digit, waves in takes.items()}
    test_takes = {digit: waves[-TEST_TAKES:] for digit, waves in takes.items()}
    test = strings(test_takes, given.test, "test")
    if not given.trained:
        data = prepare(strings(train_takes, given.train, "train"), given.work)
        train(data, given.work, "untrained", 2)
        train(data, given.work, "voice", given.updates)
    runs = given.work / "runs"
    said = given.work / "pi.wav"
    quiet_auricle("speak", f"checkpoint={runs / 'voice'}", "text=three one four", f"out={said}", "language=none")
    print(f"{said}: three one four")
    voice = open_voice(str(runs / "voice"))
    rates = listen(voice, open_voice(str(runs / "untrained")), test)
    rows = read_rows(runs / "voice" / "metrics.jsonl")
    quality, picture = compare(voice, test)
    speed = {"text to audio": real_time_factor(voice, test), **beside_transformers(voice)}
    values = {
        "command": "python benchmarks/prove/synthesis.py " + " ".join(sys.argv[1:]),
        "speaker": given.speaker, "updates": rows[-1]["step"],
        "training_seconds": round(statistics.median(row["perf/step_seconds"] for row in rows) * rows[-1]["step"]),
        "digit_error": rates, "quality": quality, "speed": speed, "machine": model_name(),
    }  # fmt: skip
    report(given.out, values)
    picture.savefig(given.out / "synthesis.png", dpi=80)
    kept = rates["text, trained vocoder"][0] <= 2 * rates["recording, trained vocoder"][0]
    fast = speed["text to audio"] <= 0.2
    print(f"error at most twice that of recordings: {kept}; real-time factor at most 0.2: {fast}")
    return 0 if kept and fast else 1


def read_takes(manifest: Path, speaker: str) -> dict[str, list[np.ndarray]]:
    """Returns the recordings of each digit, (T,) at 16 kHz each."""
    found: dict[str, list[np.ndarray]] = {digit: [] for digit in DIGITS}
    for utterance in read_manifest(manifest):
        if utterance.speaker == speaker and utterance.text in found:
            found[utterance.text].append(read_mono(str(utterance.path)))
    if not all(len(waves) > TEST_TAKES for waves in found.values()):
        raise SystemExit(f"--speaker={speaker}: there are too few recordings of each digit")
    return found


def strings(
    takes: dict[str, list[np.ndarray]], count: int, purpose: str, least: int = 3, most: int = 5
) -> list[String]:
    """Joins recordings to strings of 3 to 5 digits, all digits equally often, with silence around them."""
    rng = keyed_rng(0, purpose)
    silence, made = np.zeros(PAUSE, np.float32), []
    for _ in range(count):
        digits = [DIGITS[number] for number in rng.integers(len(DIGITS), size=rng.integers(least, most + 1))]
        parts = [silence]
        for digit in digits:
            wave_T = takes[digit][rng.integers(len(takes[digit]))]
            edges_T = np.minimum(1.0, np.arange(1, len(wave_T) + 1) / FADE)
            parts += [edges_T * edges_T[::-1] * 0.1 * wave_T / max(float(np.std(wave_T)), 1e-4), silence]
        wave_T = np.concatenate(parts)
        noise_T = NOISE * rng.standard_normal(len(wave_T))
        made.append(String(" ".join(digits), np.clip(wave_T + noise_T, -1, 1).astype(np.float32)))
    return made


def prepare(train: Sequence[String], work: Path) -> list[str]:
    """Writes shards, tokens and pitch labels; returns the settings of a run that name them."""
    shards, tokens = write_shards(train, work)
    labels = work / "pitch"
    quiet_auricle("targets", f"shards={shards}", f"out={labels}", "features=pitch", f"runs={work}")
    return [f"data.shards={shards}", f"data.tokens.text={tokens}", f"data.targets.pitch={labels}"]


def write_shards(train: Sequence[String], work: Path) -> tuple[Path, Path]:
    """Writes strings as shards, and their letters as tokens; returns the two folders."""
    (work / "audio").mkdir(parents=True)
    lines = []
    for number, string in enumerate(train):
        path = (work / "audio" / f"{number:04d}.flac").resolve()
        soundfile.write(path, string.wave_T, 16_000)
        lines.append(json.dumps({"path": str(path), "speaker": "one", "text": string.text, "corpus": "digits"}))
    (work / "list.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shards, tokens = work / "shards", work / "tokens"
    corpus = ["corpus=manifest", f"corpus.path={work / 'list.jsonl'}", "corpus.allow_outside=true"]
    quiet_auricle("preprocess", *corpus, f"out={shards}", f"runs={work}", "min_shards=2")
    quiet_auricle("tokens", f"shards={shards}", f"out={tokens}", LETTERS)
    return shards, tokens


def train(data: Sequence[str], work: Path, name: str, steps: int) -> None:
    """Trains `synthesis_tiny` for so many updates."""
    length = [f"train.steps={steps}", f"schedule.warmup_steps={max(1, steps // 20)}", f"train.checkpoint_every={steps}"]
    one_core = ["engine.name=torch", "data.workers=0", "launcher=local", "launcher.threads=1"]
    more = [*one_core, "train.log_every=10", "train.media_every=0"]
    quiet_auricle(
        "pretrain", "+experiment=synthesis_tiny", *data, *length, *more, f"runs={work / 'runs'}", f"name={name}"
    )


def speaker_of(voice: Voice, vocoder: str = "istft") -> Callable[[String], np.ndarray]:
    """Returns what speaks the text of a string."""
    return lambda string: voice.speak(voice.tokenizer.encode(string.text), AS_LEARNED, vocoder)


def listen(voice: Voice, untrained: Voice, test: Sequence[String]) -> dict[str, list[float]]:
    """Returns the digit error of each kind of audio, with its 95 % interval over strings."""
    recogniser = pocketsphinx(DIGITS)
    kinds: dict[str, Callable[[String], np.ndarray]] = {
        "recording": lambda string: string.wave_T,
        "recording, trained vocoder": lambda string: copy_synthesis(voice, string.wave_T),
        "recording, Griffin-Lim": lambda string: copy_synthesis(voice, string.wave_T, "griffin_lim"),
        "text, trained vocoder": speaker_of(voice),
        "text, Griffin-Lim": speaker_of(voice, "griffin_lim"),
        "text, untrained": speaker_of(untrained),
    }
    rates = {}
    for kind, make in kinds.items():
        texts = [recogniser(make(string)) for string in test]
        counts = edits([string.text for string in test], texts, by_words=True)
        tally = {str(number): (float(wrong), float(count)) for number, (wrong, count) in enumerate(counts)}
        rate = bootstrap([tally], 2_000)
        rates[kind] = [rate.value, rate.low, rate.high]
        print(f"{kind}: digit error {rate.value:.1%} ({rate.low:.1%} … {rate.high:.1%})", flush=True)
    return rates


def compare(voice: Voice, test: Sequence[String]) -> tuple[dict[str, float], Any]:
    """Returns distances from recordings of the same texts, and a picture of one string."""
    from matplotlib.figure import Figure

    say, some = speaker_of(voice), test[:20]
    sums = np.zeros(4)
    for string in some:
        spoken = say(string)
        sums += (*mel_cepstral_distortion(string.wave_T, spoken), *pitch_error(string.wave_T, spoken))
    figure = Figure(figsize=(9, 5), layout="constrained")
    for axes, (title, wave_T) in zip(
        figure.subplots(2, 1), (("recording", test[0].wave_T), ("from text", say(test[0]))), strict=True
    ):
        mel = voice.head.mel(torch.from_numpy(wave_T)[None], torch.tensor([len(wave_T)]))
        axes.imshow(mel.x_BFD[0].T.numpy(), origin="lower", aspect="auto", vmin=-2.5, vmax=2)
        axes.set_title(f"{title}: {test[0].text}")
    return {"mel-cepstral distortion, dB": sums[0] / sums[1], "F0 error, semitones": sums[2] / max(sums[3], 1)}, figure


def real_time_factor(voice: Voice, test: Sequence[String]) -> float:
    """Returns the seconds of one core for a second of speech from text."""
    say = speaker_of(voice)
    say(test[0])
    began = time.perf_counter()
    spoken = sum(len(say(string)) for string in test[:30])
    return (time.perf_counter() - began) / (spoken / 16_000)


def beside_transformers(voice: Voice) -> dict[str, float]:
    """Returns milliseconds of text to mel frames, here and by transformers' model of as many layers and channels.

    All durations are made 8 frames by the bias of the predictors. The encoder of transformers' model has Conformer
    blocks without their convolution module here, since ours has none.
    """
    from transformers import FastSpeech2ConformerConfig, FastSpeech2ConformerModel
    from transformers.models.fastspeech2_conformer.modeling_fastspeech2_conformer import (
        FastSpeech2ConformerEncoderLayer,
    )

    ours, sizes = voice.head.synthesizer, voice.head.config.synthesizer
    config = FastSpeech2ConformerConfig(
        hidden_size=sizes.dim, vocab_size=voice.head.config.vocabulary + 2, num_mel_bins=voice.head.mel.dim,
        encoder_layers=sizes.layers, encoder_num_attention_heads=sizes.heads, encoder_linear_units=sizes.ffn_dim,
        decoder_layers=sizes.decoder_layers, decoder_num_attention_heads=sizes.heads,
        decoder_linear_units=sizes.ffn_dim, positionwise_conv_kernel_size=sizes.kernel,
        duration_predictor_channels=sizes.predictor_dim, energy_predictor_channels=sizes.predictor_dim,
        pitch_predictor_channels=sizes.predictor_dim, pitch_predictor_layers=2, speech_decoder_postnet_layers=1,
        use_cnn_in_conformer=False, use_macaron_style_in_conformer=False,
    )  # fmt: skip
    theirs = FastSpeech2ConformerModel(config).eval()
    for layer in theirs.modules():
        if isinstance(layer, FastSpeech2ConformerEncoderLayer):
            layer.conv_module = None  # transformers 5.23 forgets it where use_cnn_in_conformer is off
    kept = {name: tensor.clone() for name, tensor in ours.duration.out.state_dict().items()}
    for linear in (ours.duration.out, theirs.duration_predictor.linear):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.constant_(linear.bias, float(np.log(9)))
    tokens_1N = torch.randint(1, voice.head.config.vocabulary, (1, 60))
    style_1D = torch.zeros(1, sizes.dim)
    found = {"text to mel frames, ms": [], "FastSpeech2ConformerModel, ms": []}
    with torch.inference_mode():
        for _ in range(12):
            for name, call in (
                ("text to mel frames, ms", lambda: ours.speak(tokens_1N, torch.tensor([60]), style_1D, AS_LEARNED)),
                ("FastSpeech2ConformerModel, ms", lambda: theirs(tokens_1N)),
            ):
                began = time.perf_counter()
                out = call()
                found[name].append(1_000 * (time.perf_counter() - began))
                frames = out.x_BFD.shape[1] if hasattr(out, "x_BFD") else out.spectrogram.shape[1]
                assert frames == 480, (name, frames)
    ours.duration.out.load_state_dict(kept)
    medians = {name: float(np.median(values[2:])) for name, values in found.items()}
    weights = {"weights": ours, "FastSpeech2ConformerModel, weights": theirs}
    counts = {name: float(sum(p.numel() for p in module.parameters())) for name, module in weights.items()}
    counts["weights"] -= sum(p.numel() for part in (ours.vocoder, ours.aligner) if part for p in part.parameters())
    return medians | counts


def report(out: Path, values: dict[str, Any]) -> None:
    """Writes the tables and their numbers."""
    lines = [
        "# Synthesis: a voice for strings of digits",
        "",
        f"`{values['command'].strip()}`, one core ({values['machine']}); {values['speaker']}, "
        f"{values['updates']} updates of `synthesis_tiny` in {values['training_seconds'] / 60:.0f} minutes. "
        "PocketSphinx listens, any string of digits. Results for digits of one speaker at 8 kHz do not extend to "
        "dictation.",
        "",
        "| audio | digit error | 95 % over strings |",
        "|---|---|---|",
        *(
            f"| {kind} | {rate:.1%} | {low:.1%} … {high:.1%} |"
            for kind, (rate, low, high) in values["digit_error"].items()
        ),
        "",
        "| figure | value |",
        "|---|---|",
        *(f"| {name} | {value:.3g} |" for name, value in values["quality"].items()),
        f"| real-time factor, text to audio, one core | {values['speed']['text to audio']:.3g} |",
        *(f"| {name} | {value:,.3g} |" for name, value in values["speed"].items() if name != "text to audio"),
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "synthesis.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "synthesis.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
