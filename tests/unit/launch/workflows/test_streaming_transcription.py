"""`auricle transcribe stream=true` with an untrained run, and streams of recognition in a batch."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_pipeline.audio.errors import AudioError
from data_pipeline.loader.recordings import live_pcm
from launch.exit_codes import ExitCode
from launch.main import main
from pretrain.interfaces.decoding import EndPoints
from pretrain.nn.attention_patterns import Pattern
from pretrain.nn.block_stack import BlockStack
from pretrain.recognition.config import DecodingConfig
from pretrain.recognition.recogniser import Recogniser
from pretrain.recognition.streaming_recogniser import (
    StreamingRecogniser,
    join_recognitions,
    split_recognitions,
)
from pretrain.recognition.transcript import Word
from tests.support.contract_cases import speech_like
from tests.support.recognition import assert_same_words, updates_of, words_of
from tests.support.streams import pcm


@pytest.mark.parametrize("decoder", ["greedy", "beam"])
def test_words_do_not_depend_on_the_size_of_pushes(recogniser: Recogniser, decoder: str) -> None:
    streams = StreamingRecogniser(
        recogniser, DecodingConfig(decoder=decoder, beam=3), 4, 2, EndPoints(longest_seconds=1.5)  # type: ignore[arg-type]
    )  # fmt: skip
    wave_T = speech_like(5.0, 7)
    expected = words_of(updates_of(streams, wave_T, 80_000))
    assert len(expected) > 3
    for size in (333, 7_000):
        assert_same_words(words_of(updates_of(streams, wave_T, size)), expected)
    assert all(0 <= word.start < word.end <= 5.0 for word in expected)


def test_a_stream_has_the_text_of_the_whole_recording(recogniser: Recogniser) -> None:
    """Without end points, and with the same attention pattern."""
    streams, wave_T = StreamingRecogniser(recogniser, None, 4, 2, EndPoints(1e9, 1e9, 1e9)), speech_like(4.0, 8)
    encoder = recogniser.model.encoder
    assert isinstance(encoder, BlockStack)
    encoder.stream = Pattern(chunk=4, left_chunks=2)
    try:
        expected = recogniser.transcribe("a", [wave_T.numpy()], DecodingConfig())
    finally:
        encoder.stream = None
    assert len(expected.words) > 2
    assert_same_words(words_of(updates_of(streams, wave_T, 1_000)), expected.words)


def test_the_stable_part_begins_the_text_and_is_kept(recogniser: Recogniser) -> None:
    streams = StreamingRecogniser(recogniser, DecodingConfig(decoder="beam", beam=4), 4, 2, EndPoints(1e9, 1e9, 1e9))
    stable = ""
    for update in updates_of(streams, speech_like(3.0, 9), 900)[:-1]:
        assert update.text.startswith(update.stable)
        assert update.stable.startswith(stable)
        stable = update.stable
    assert stable


def test_streams_in_a_batch_have_the_words_they_have_alone(recogniser: Recogniser) -> None:
    streams = StreamingRecogniser(recogniser, None, 4, 2, EndPoints(longest_seconds=1.5))
    waves = [speech_like(3.0, 1), speech_like(3.0, 2)]
    states = [streams.start(), streams.start()]
    found: list[list[Word]] = [[], []]
    for at in range(0, 48_000, 1_600):
        rows = [0, 1] if at >= 16_000 else [0]
        parts = [waves[row][at - 16_000 * row :][:1_600] for row in rows]
        joint, updates = streams.push(join_recognitions([states[row] for row in rows]), parts)
        for row, state, update in zip(rows, split_recognitions(joint), updates, strict=True):
            states[row] = state
            found[row] += update.words
    found[0] += streams.finish(states[0])[1][0].words
    assert_same_words(found[0], words_of(updates_of(streams, waves[0], 1_600)))
    assert len(found[1]) > 0
    assert_same_words(found[1], words_of(updates_of(streams, waves[1][:32_000], 1_600))[: len(found[1])])


def test_raw_audio_from_a_pipe_is_transcribed_while_it_arrives(streaming_run: Path) -> None:
    """The first words come before the pipe is closed."""
    command = [
        sys.executable,
        "-m",
        "auricle",
        "transcribe",
        f"checkpoint={streaming_run}",
        "files=-",
        "stream=true",
    ]
    command += ["chunk=4", "left=2", "partial=true", "format=json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        content = pcm(3.0, 3)
        process.stdin.write(content[:60_001])
        process.stdin.flush()
        first = json.loads(process.stdout.readline())
        assert first["type"] == "partial"
        rest, said = process.communicate(content[60_001:], timeout=60)
    assert process.returncode == ExitCode.DONE
    final = [found for line in rest.splitlines() if (found := json.loads(line))["type"] == "final"]
    assert final
    assert final[-1]["words"]
    assert b"chunk=4 left=2: text 175 ms after" in said
    assert b"3.0 s of audio" in said


def test_ctrl_c_writes_what_was_heard(
    streaming_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is how a stream from a microphone ends."""

    class Microphone(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if not (block := super().read(size)):
                raise KeyboardInterrupt
            return block

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Microphone(pcm(2.0, 3))))
    assert main(["transcribe", f"checkpoint={streaming_run}", "files=-", "stream=true"]) == ExitCode.INTERRUPTED
    heard = capsys.readouterr().out
    assert heard.strip()
    assert set(heard) <= set("ab \n")


def test_a_stream_that_gets_too_long_ends_alone(
    streaming_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seconds in (("long", 3.0), ("short", 1.0)):
        soundfile.write(tmp_path / f"{name}.wav", speech_like(seconds, 3).numpy(), 16_000)
    fields = [f"checkpoint={streaming_run}", f"files={tmp_path}", "stream=true", "chunk=8", "left=-1"]
    assert main(["transcribe", *fields, "max_minutes=0.03"]) == ExitCode.FAILED
    shown = capsys.readouterr()
    assert [line.partition("\t")[0] for line in shown.out.splitlines()] == ["long.wav", "short.wav"]
    assert re.search(r"long\.wav: ended after 1\.\d s: left=-1: .* longer than max_minutes=0\.03", shown.err)


def test_a_closed_standard_input_is_named(
    streaming_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    for stream in ("true", "false"):
        given = ["transcribe", f"checkpoint={streaming_run}", "files=-", f"stream={stream}"]
        assert main(given) == ExitCode.USAGE
        assert "files=-: standard input is closed" in capsys.readouterr().err


def test_files_are_streamed_too(streaming_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "a.wav", speech_like(2.0, 3).numpy(), 16_000)
    (tmp_path / "b.wav").write_bytes(b"RIFF\x10\0\0\0WAVEnothing")
    given = [
        "transcribe",
        f"checkpoint={streaming_run}",
        f"files={tmp_path}",
        "stream=true",
        "chunk=8",
        "left=2",
        "format=tsv",
    ]
    assert main(given) == ExitCode.FAILED
    shown = capsys.readouterr()
    assert shown.out.startswith("file\tstart\tend\tword\tconfidence\na.wav\t")
    assert "left out b.wav" in shown.err


def test_a_file_called_stdin_is_not_taken_for_the_pipe(
    streaming_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    soundfile.write(tmp_path / "stdin", speech_like(2.0, 3).numpy(), 16_000, format="WAV")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(pcm(1.0, 4))))
    given = [
        "transcribe",
        f"checkpoint={streaming_run}",
        f"files=[{tmp_path / 'stdin'},-]",
        "stream=true",
        "chunk=8",
        "left=2",
    ]
    assert main(given) == ExitCode.DONE
    said = capsys.readouterr().err
    assert said.index("stdin: 2.0 s of audio") < said.index("stdin: 1.0 s of audio")


def test_live_audio() -> None:
    content = pcm(1.0, 1)
    whole = np.concatenate(list(live_pcm(io.BufferedReader(io.BytesIO(content + b"x")), 16_000)))
    assert np.array_equal(whole, np.frombuffer(content, "<i2").astype(np.float32) / 32768)
    assert len(np.concatenate(list(live_pcm(io.BytesIO(content), 8_000)))) == pytest.approx(32_000, abs=2)
    assert len(np.concatenate(list(live_pcm(io.BytesIO(content[:10]), 16_000)))) == 5
    with pytest.raises(AudioError, match="empty"):
        list(live_pcm(io.BytesIO(b""), 16_000))
    file = io.BytesIO()
    soundfile.write(file, speech_like(1.0, 1).numpy(), 16_000, format="WAV")
    with pytest.raises(AudioError, match=r"begins like a sound file \(riff|wav"):
        list(live_pcm(io.BytesIO(file.getvalue()), 16_000))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"chunk": "5"}, "chunk=5: the encoder was trained with 4, 8"),
        ({"left": "1"}, "left=1: the encoder was trained with 2, -1"),
        ({"format": "srt"}, 'format="srt": needs the whole recording'),
        ({"out": "x"}, 'out="x": with stream=true everything goes to standard output'),
        ({"stream": "false", "partial": "true"}, "partial=true: has an effect with stream=true only"),
    ],
)
def test_wrong_fields_are_usage_errors(
    streaming_run: Path, given: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"checkpoint": str(streaming_run), "files": "-", "stream": "true"} | given
    assert main(["transcribe", *(f"{name}={value}" for name, value in fields.items())]) == ExitCode.USAGE
    assert said in " ".join(capsys.readouterr().err.split())
