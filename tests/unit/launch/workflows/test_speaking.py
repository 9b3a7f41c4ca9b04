"""`auricle speak` with an untrained run, which speaks noise of a fixed length."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from data_pipeline.text.tokenizer import load_tokenizer, write_tokens
from launch.exit_codes import ExitCode
from launch.main import main
from launch.workflows import speaking
from pretrain.generation.text import TextError, sentences
from pretrain.generation.voice import UnitVoice, open_speaker, open_voice
from tests.support.contract_cases import HEADS, SYNTHESIZER, UNITS
from tests.support.training import save


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    symbols = [*" ',abcdefghijklmnopqrstuvwxyz"]
    write_tokens(str(folder / "tokens"), {"kind": "characters", "label": "text", "case": "lower", "symbols": symbols})
    data = {"shards": "synthetic", "micro_batches": 4, "tokens": {"text": str(folder / "tokens")}}
    head = {"name": "synthesis", "vocabulary": len(symbols), "n_mels": 20, "synthesizer": SYNTHESIZER}
    save(folder / "speaks", 4, data=data, heads={"voice": head})
    save(folder / "mel", 4, data=data, heads={"voice": head | {"synthesizer": SYNTHESIZER | {"vocoder": None}}})
    save(folder / "plain", 4)
    more = {"vocabulary": len(symbols)}
    for name in ("words", "flow"):
        made = HEADS[f"synthesis, {name}"] | more
        targets = {"level_0": str(folder / "labels")} if name == "words" else {}
        save(folder / name, 4, data=data | {"targets": targets}, heads={"voice": made})
    for name, units in (("units", HEADS["units, audio"]), ("silent", UNITS), ("reads", HEADS["units, to text"])):
        targets = {"level_0": str(folder / "labels")}
        save(folder / name, 4, data=data | {"targets": targets}, heads={"voice": units | more})
    return folder


def speak(runs: Path, **given: object) -> int:
    fields = {"checkpoint": runs / "speaks", "language": "none"} | given
    return main(["speak", *(f"{name}={value}" for name, value in fields.items())])


def test_a_text_becomes_a_sound_file(runs: Path, tmp_path: Path) -> None:
    assert speak(runs, text="'go on'", out=tmp_path / "new" / "a.wav") == ExitCode.DONE
    wave_T, rate = soundfile.read(tmp_path / "new" / "a.wav", dtype="float32")
    voice = open_voice(str(runs / "speaks"))
    np.testing.assert_allclose(wave_T, voice.speak(voice.tokenizer.encode("go on")), atol=1e-4)
    assert rate == 16_000
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.wav"]


def test_speed_changes_the_length_and_a_voice_the_sound(runs: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "prompt.wav", 0.1 * rng.standard_normal(20_000), 16_000)
    long = "'" + "go on and on " * 3 + "'"
    for name, more in {"a": {}, "slow": {"speed": 0.5}, "voice": {"voice": tmp_path / "prompt.wav"}}.items():
        assert speak(runs, text=long, out=tmp_path / f"{name}.flac", **more) == ExitCode.DONE
    waves = {name: soundfile.read(tmp_path / f"{name}.flac")[0] for name in ("a", "slow", "voice")}
    assert len(waves["slow"]) > 1.3 * len(waves["a"])
    assert len(waves["voice"]) != len(waves["a"]) or not np.array_equal(waves["voice"], waves["a"])


def test_drawn_units_become_audio_equal_for_equal_seeds(runs: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "prompt.wav", 0.1 * rng.standard_normal(20_000), 16_000)
    given = {"checkpoint": runs / "units", "text": "'go on'"}
    cases = {"a": {}, "again": {}, "other": {"seed": 5}, "voice": {"voice": tmp_path / "prompt.wav"}}
    for name, more in cases.items():
        for seed in range(20):  # untrained: for many seeds the end is not drawn within 3 times the predicted length
            code = speak(runs, **given, out=tmp_path / f"{name}.wav", **{"seed": seed} | more)
            if code == ExitCode.DONE or "seed" in more:
                break
    waves = {name: soundfile.read(tmp_path / f"{name}.wav")[0] for name in cases if (tmp_path / f"{name}.wav").exists()}
    np.testing.assert_array_equal(waves["a"], waves["again"])
    assert len(waves["a"]) >= 400
    assert not np.array_equal(waves["a"], waves["voice"])


def spoken(runs: Path, folder: Path, **given: object) -> np.ndarray:
    assert speak(runs, text="'go on'", out=folder / "a.wav", **given) == ExitCode.DONE
    wave_T, _ = soundfile.read(folder / "a.wav")
    return np.asarray(wave_T)


def test_words_set_the_style_and_noise_the_mel_frames_of_a_flow(runs: Path, tmp_path: Path) -> None:
    plain, high = (
        spoken(runs, tmp_path, checkpoint=runs / "words", style=style) for style in ("''", "'a child\\, slow and high'")
    )
    assert len(plain) != len(high) or not np.array_equal(plain, high)
    cases = ({"seed": 1}, {"seed": 1}, {"seed": 2}, {"seed": 1, "steps": 3}, {"temperature": 0, "seed": 1})
    waves = [spoken(runs, tmp_path, checkpoint=runs / "flow", **case) for case in cases]
    np.testing.assert_array_equal(waves[0], waves[1])
    assert all(not np.array_equal(waves[0], wave) for wave in waves[2:])
    np.testing.assert_array_equal(waves[4], spoken(runs, tmp_path, checkpoint=runs / "flow", temperature=0, seed=9))


def test_an_end_that_never_comes_writes_nothing(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    voice = open_speaker(str(runs / "units"))
    assert isinstance(voice, UnitVoice)
    with torch.no_grad():
        voice.head.decoder.out.bias[voice.head.end] = -1e4
    monkeypatch.setattr(speaking, "open_speaker", lambda *_: voice)
    assert speak(runs, checkpoint=runs / "units", text="'go on'", out=tmp_path / "new" / "a.wav") == ExitCode.FAILED
    assert "no end after" in (said := capsys.readouterr().err)
    assert "take another seed" in said
    assert not (tmp_path / "new").exists()
    (tmp_path / "lines.txt").write_text("one\n", encoding="utf-8")
    assert speak(runs, checkpoint=runs / "units", file=tmp_path / "lines.txt", out=tmp_path / "out") == ExitCode.FAILED
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rejects.jsonl"]


def test_each_line_of_a_file_becomes_a_file_and_others_are_listed(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lines.txt").write_text("one\n\nnaïve\nfour. five\n", encoding="utf-8")
    assert speak(runs, file=tmp_path / "lines.txt", out=tmp_path / "out") == ExitCode.FAILED
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0001.wav", "0004.wav", "rejects.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rows] == [2, 3]
    assert "'ï'" in rows[1]["error"] or "ï" in rows[1]["error"]
    assert "2 texts" in capsys.readouterr().err


def test_standard_output_gets_raw_audio_sentence_by_sentence(runs: Path) -> None:
    fields = [f"checkpoint={runs / 'speaks'}", "text='go on. a tool'", "out=-", "language=none", "pause=0.1"]
    done = subprocess.run([sys.executable, "-m", "auricle", "speak", *fields], capture_output=True, check=True)
    voice = open_voice(str(runs / "speaks"))
    parts = [voice.speak(voice.tokenizer.encode(text)) for text in ("go on", "a tool")]
    expected = np.concatenate([parts[0], np.zeros(1_600), parts[1]])
    found = np.frombuffer(done.stdout, "<i2") / 32_768
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"text": "''"}, "has no word to speak"),
        ({"text": "'?!'"}, "has no word to speak"),
        ({"text": "naïve"}, "does not know the symbols ï; write them in another way"),
        ({"text": "'" + "go " * 10_000 + "'"}, "has 10,000 words, and at most max_words=5,000 are spoken; split it"),
        ({"checkpoint": "plain"}, "the run has no head that speaks; it has no heads; train one with"),
        ({"checkpoint": "silent"}, "head voice makes no audio of its units; train it with heads.voice.audio={}"),
        ({"checkpoint": "reads"}, "head voice makes no audio of its units, and writes text"),
        ({"style": "slow"}, "style='slow': the head was trained without style_words"),
        ({"checkpoint": "words", "style": "slwo"}, "the word 'slwo' is not known (did you mean slow?)"),
        ({"checkpoint": "units", "style": "slow"}, "style='slow': the head units takes none"),
        ({"checkpoint": "units", "pitch": "3"}, "pitch=3: the head was trained without pitch"),
        ({"checkpoint": "units", "top_p": "0"}, "top_p"),
        ({"checkpoint": "units", "text": "naïve"}, "does not know the symbols ï"),
        ({"checkpoint": "units", "voice": "short.wav"}, "voice: has 0.50 s, and a second or more is needed"),
        ({"checkpoint": "units", "voice": "silent.wav"}, "voice: is silent"),
        ({"checkpoint": "units", "text": "'" + "go " * 10_000 + "'"}, "has 10,000 words"),
        ({"checkpoint": "speak"}, "did you mean"),
        ({"head": "voices"}, "head=voices: must be one of voice (did you mean voice?)"),
        ({"out": "a.mp3"}, "must end in .wav, .flac, .ogg"),
        ({"speed": "0"}, "speed"),
        ({"pitch": "3"}, "pitch=3: the head was trained without pitch"),
        ({"checkpoint": "mel"}, "vocoder=istft: the head was trained without one; set vocoder=griffin_lim"),
        ({"voice": "short.wav"}, "voice: has 0.50 s, and a second or more is needed"),
        ({"voice": "silent.wav"}, "voice: is silent"),
        ({"voice": "missing.wav"}, "there is no such file"),
        ({"file": "lines.txt"}, "give text=… or file=…, one of them"),
    ],
)
def test_wrong_fields_are_usage_errors_and_leave_nothing(
    runs: Path, tmp_path: Path, given: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "short.wav", np.full(8_000, 0.1), 16_000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(32_000), 16_000)
    fields = {"checkpoint": "speaks", "text": "'go on'", "out": "a.wav"} | given
    fields["checkpoint"], fields["out"] = str(runs / fields["checkpoint"]), str(tmp_path / "new" / fields["out"])
    if "voice" in fields:
        fields["voice"] = str(tmp_path / fields["voice"])
    assert speak(runs, **fields) == ExitCode.USAGE
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists()


def test_a_file_without_a_line_of_text_is_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content, said in ((b" \n\n", "has no line with text"), (b"\xff\xfe\xfa", "cannot be read as text in UTF-8")):
        (tmp_path / "lines.txt").write_bytes(content)
        assert speak(runs, file=tmp_path / "lines.txt", out=tmp_path / "out") == ExitCode.USAGE
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_numbers_are_written_out_and_long_texts_refused(runs: Path) -> None:
    pytest.importorskip("wetext")
    tokenizer = load_tokenizer(str(runs / "tokens"))
    found = sentences("I have 3 dogs. Really?", tokenizer, "en", 100)
    assert [tokenizer.decode(ids) for ids in found] == ["i have three dogs", "really"]
    with pytest.raises(TextError, match="at most max_words=99"):
        sentences("go " * 100, tokenizer, "none", 99)
