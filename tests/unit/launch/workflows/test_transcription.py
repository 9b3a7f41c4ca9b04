"""`auricle transcribe` with an untrained run, whose text is as fixed as that of a good one."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file

from data_pipeline.core.schema import ConfigError, dump
from data_pipeline.text.tokenizer import write_tokens
from launch.exit_codes import ExitCode
from launch.main import main
from pretrain.checkpointing.weights import load_checkpoint
from pretrain.heads.ctc import frames_needed
from pretrain.inference.joint_decoding import JointConfig
from pretrain.interfaces.decoding import EndPoints
from pretrain.recognition.config import DecodingConfig
from pretrain.recognition.error_rates import Decoders, recognise
from pretrain.recognition.recogniser import Recogniser, open_recogniser
from pretrain.recognition.transcript import DecodedPart, format_transcript
from tests.support.paths import ROOT
from tests.support.tiny_shards import sounds, write_shards
from tests.support.training import save

LOCAL = {
    "frontend": {"name": "log_mel", "normalize": "fixed"},
    "encoder": {
        "name": "transformer",
        "layers": 2,
        "dim": 32,
        "heads": 2,
        "ffn_dim": 64,
        "positions": "rope",
        "attention": "local_global",
        "window": 8,
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    save(folder / "plain", 4)
    save(folder / "reads", 4, heads={"text": {"name": "ctc", "symbols": " ab"}}, **LOCAL)
    save(folder / "two", 4, heads={"one": {"name": "ctc"}, "other": {"name": "ctc"}})
    return folder


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech")
    for seed, seconds in enumerate((2.0, 9.0)):
        wave = np.cumsum(np.random.default_rng(seed).standard_normal(int(16_000 * seconds)))
        wave *= 1 + np.sin(np.arange(len(wave)) / 1500)
        soundfile.write(folder / f"{'ab'[seed]}.wav", 0.3 * wave / np.abs(wave).max(), 16_000)
    (folder / "broken.wav").write_bytes(b"RIFF\x10\0\0\0WAVEnothing")
    return folder


@pytest.fixture(scope="module")
def recogniser(runs: Path) -> Recogniser:
    return open_recogniser(str(runs / "reads"))


def audio(path: Path) -> np.ndarray:
    return np.asarray(soundfile.read(path, dtype="float32")[0])


def test_windows_give_the_text_and_times_of_one_pass(recogniser: Recogniser, speech: Path) -> None:
    wave = audio(speech / "b.wav")
    whole = recogniser.transcribe("b", [wave], DecodingConfig())
    assert len(whole.words) > 5
    blocks = np.array_split(wave, 31)
    cut = recogniser.transcribe("b", blocks, DecodingConfig(window_seconds=4.0, overlap_seconds=2.0))
    assert cut.text == whole.text
    assert [word[1:3] for word in cut.words] == [word[1:3] for word in whole.words]
    assert cut.seconds == whole.seconds == len(wave) / 16_000
    assert recogniser.transcribe("none", [wave[:200]], DecodingConfig()).words == ()


def test_a_folder_gives_a_file_per_recording_and_the_rejects(
    runs: Path, speech: Path, recogniser: Recogniser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["transcribe", f"checkpoint={runs / 'reads'}", f"files={speech}", "format=json", f"out={tmp_path}"]
    assert main(given) == ExitCode.FAILED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json", "rejects.jsonl"]
    found = json.loads((tmp_path / "a.json").read_text())
    expected = recogniser.transcribe("a.wav", [audio(speech / "a.wav")], DecodingConfig())
    assert found["text"] == expected.text
    assert found["words"][0]["start"] == pytest.approx(expected.words[0].start, abs=1e-3)
    [reject] = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert reject["name"] == "broken.wav"
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "left out broken.wav" in shown.err
    assert "2 of 3 recordings, 0.2 minutes of audio" in shown.err
    assert f"left out 1 ({reject['reason']}: 1)" in shown.err


def test_the_text_of_one_file_of_several_and_of_standard_input(
    runs: Path, speech: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["transcribe", f"checkpoint={runs / 'reads'}"]
    assert main([*given, f"files={speech / 'a.wav'}"]) == ExitCode.DONE
    text = capsys.readouterr().out
    assert set(text) <= set(" ab\n")
    assert main([*given, f"files=[{speech / 'a.wav'},{speech / 'b.wav'}]"]) == ExitCode.DONE
    assert capsys.readouterr().out.startswith(f"a.wav\t{text}b.wav\t")
    pcm = (audio(speech / "a.wav") * 32768).astype("<i2").tobytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(pcm)))
    assert main([*given, "files=-"]) == ExitCode.DONE
    assert capsys.readouterr().out == text


def test_shards_are_read_by_key(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path / "shards", [sounds([1.0, 2.0]), sounds([1.5], corpus="b")])
    given = ["transcribe", f"checkpoint={runs / 'reads'}", f"files={tmp_path / 'shards'}", "decoder=beam"]
    assert main([*given, "format=tsv"]) == ExitCode.DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "file\tstart\tend\tword\tconfidence"
    assert len({line.split("\t")[0] for line in lines[1:]}) == 3


def test_names_that_differ_by_their_ending_alone_get_files_of_their_own(
    runs: Path, speech: Path, tmp_path: Path
) -> None:
    for name in ("a.flac", "a.wav", "deep/a.wav"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "in" / name, audio(speech / "a.wav"), 16_000)
    files = f"files=[{tmp_path / 'in'},{speech / 'a.wav'}]"
    given = ["transcribe", f"checkpoint={runs / 'reads'}", files, "format=srt", f"out={tmp_path / 'out'}"]
    assert main(given) == ExitCode.DONE
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.srt")}
    assert names == {"a.srt", "a.wav.srt", "deep/a.srt", "a.wav.2.srt"}


def test_a_word_model_writes_its_words_with_times(
    runs: Path, speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("flashlight.lib.text", reason="needs flashlight-text")
    counts = "\\data\\\nngram 1=4\nngram 2=1\n\n"
    arpa = counts + "\\1-grams:\n-2\t<unk>\n-99\t<s>\n-1\t</s>\n-0.5\tab\n\n\\2-grams:\n-0.5\tab ab\n\n\\end\\\n"
    (tmp_path / "words.arpa").write_text(arpa)
    given = ["transcribe", f"checkpoint={runs / 'reads'}", f"files={speech / 'b.wav'}", "decoder=beam", "word_bonus=9"]
    given += ["window_seconds=3", "overlap_seconds=1", "format=json", f"lm={tmp_path / 'words.arpa'}"]
    assert main(given) == ExitCode.DONE
    found = json.loads(capsys.readouterr().out)
    assert {word["word"] for word in found["words"]} == {"ab"}
    starts = [word["start"] for word in found["words"]]
    assert len(starts) > 5
    assert starts == sorted(starts)
    assert starts[-1] > 6.0


DECODER = {"layers": 1, "heads": 2, "ffn_dim": 32}


def tokens_data(folder: Path, symbols: str = " ab") -> dict[str, Any]:
    """Writes tokens of three characters; returns the `data` of a run that has them."""
    tokens = {"kind": "characters", "label": "text", "case": "lower", "symbols": list(symbols)}
    write_tokens(str(folder / "tokens"), tokens)
    return {"shards": "synthetic", "micro_batches": 4, "tokens": {"text": str(folder / "tokens")}}


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Recogniser:
    """A run with CTC and an attention decoder over the same three characters."""
    folder = tmp_path_factory.mktemp("hybrid")
    over = {"tokens": "text", "vocabulary": 3}
    heads = {"ctc": {"name": "ctc"} | over, "aed": {"name": "sequence", "decoder": DECODER} | over}
    save(folder / "run", 4, heads=heads, data=tokens_data(folder), **LOCAL)
    return open_recogniser(str(folder / "run"))


@pytest.fixture(scope="module")
def attending(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose only head is an attention decoder, as `whisper_like_small` trains it."""
    folder = tmp_path_factory.mktemp("attending")
    heads = {"aed": {"name": "sequence", "decoder": DECODER, "tokens": "text", "vocabulary": 3}}
    save(folder / "run", 4, heads=heads, data=tokens_data(folder, "ab "), **LOCAL)
    return folder / "run"


def test_a_run_with_an_attention_decoder_alone_is_transcribed(
    attending: Path, speech: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default, and in pieces of a window; the symbols of a piece share its time."""
    recogniser, wave = open_recogniser(str(attending)), audio(speech / "b.wav")
    assert recogniser.attention is recogniser.head
    given = ["transcribe", f"checkpoint={attending}", f"files={speech / 'b.wav'}", "format=json"]
    for fields, search in (
        ([], JointConfig(beam=1)),
        (["decoder=attention", "beam=3", "token_bonus=2"], JointConfig(beam=3, bonus=2.0)),
    ):
        assert main([*given, *fields]) == ExitCode.DONE
        found = json.loads(capsys.readouterr().out)
        expected = recogniser.attend(wave, search)
        assert expected.by == "attention"
        text = "".join(recogniser.head.symbols[token] for token in expected.tokens)
        assert found["text"] == " ".join(text.split())
        assert found["parts"] == [{"start": 0.0, "end": 9.0, "by": "attention"}]
        assert [word["start"] for word in found["words"]] == pytest.approx(
            [9.0 * at / len(text) for at, symbol in enumerate(text) if symbol != " " and text[:at][-1:] in ("", " ")],
            abs=1e-3,
        )
    assert found["text"]  # the bonus prefers long texts
    cut = DecodingConfig(decoder="beam", beam=2, token_bonus=2.0, window_seconds=3.0, overlap_seconds=1.0)
    parts = recogniser.transcribe("b", np.array_split(wave, 17), cut).parts
    assert len(parts) > 3
    assert [part.end for part in parts] == [*(part.start for part in parts[1:]), 9.0]
    assert all(2.0 <= part.end - part.start <= 3.0 for part in parts[:-1])
    assert recogniser.transcribe("none", [wave[:200]], cut).words == ()


@pytest.mark.parametrize("field", ["decoder=joint", "decoder=rescoring"])
def test_what_an_attention_decoder_alone_cannot_do_is_refused(
    attending: Path, speech: Path, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["transcribe", f"checkpoint={attending}", f"files={speech / 'a.wav'}", field]
    assert main(given) == ExitCode.USAGE
    assert f"{field}: the run has an attention decoder alone" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ConfigError, match="decodes no streams; train a CTC head or a transducer"):
        open_recogniser(str(attending)).text_decoder(DecodingConfig(), EndPoints())


def test_the_transcript_shows_where_a_loop_was_decoded_by_ctc(hybrid: Recogniser, speech: Path) -> None:
    """A large bonus makes the untrained decoder repeat itself up to its longest text."""
    wave = audio(speech / "b.wav")
    loop = DecodingConfig(decoder="attention", beam=2, token_bonus=20.0)
    for decoding, by in ((loop, "ctc"), (replace(loop, token_bonus=-20.0), "attention")):
        found = hybrid.transcribe("b", [wave], decoding)
        assert [part.by for part in found.parts] == [by]
        assert json.loads(format_transcript(found, "json"))["parts"] == [{"start": 0.0, "end": 8.96, "by": by}]
    frames_FV, most = hybrid.joint(wave[:4_800], JointConfig(beam=2, ctc_weight=0.0, bonus=20.0))
    assert frames_needed(most.tokens) > len(frames_FV), "more symbols than CTC could align"
    assert [part.by for part in hybrid.transcribe("b", [wave[:4_800]], loop).parts] == ["attention"]
    assert "parts" not in json.loads(format_transcript(hybrid.transcribe("b", [wave], DecodingConfig()), "json"))


def test_error_rates_of_an_attention_decoder_alone(attending: Path, speech: Path) -> None:
    recogniser, wave = open_recogniser(str(attending)), audio(speech / "a.wav")
    found = dict(recognise(recogniser, [wave], Decoders(beam=2, token_bonus=2.0)))
    assert list(found) == ["greedy", "beam 2"]
    tokens = recogniser.attend(wave, JointConfig(beam=2, bonus=2.0)).tokens
    assert found["beam 2"][0].split() == "".join(recogniser.head.symbols[token] for token in tokens).split()


def test_joint_decoding_of_long_recordings(hybrid: Recogniser, speech: Path) -> None:
    """A recording of one window is decoded at once; pieces of a longer one have the times of the whole recording."""
    wave = audio(speech / "b.wav")
    whole = hybrid.transcribe("b", [wave], DecodingConfig(decoder="joint", beam=3))
    _, found = hybrid.joint(wave, JointConfig(beam=3))
    assert whole.text == " ".join("".join(hybrid.head.symbols[number] for number in found.tokens).split())
    assert whole.parts == (DecodedPart(0.0, len(hybrid.frames(wave)) / hybrid.model.shape.rate_hz, found.by),)
    short = DecodingConfig(decoder="joint", beam=3, window_seconds=3.0, overlap_seconds=1.0)
    cut = hybrid.transcribe("b", np.array_split(wave, 17), short)
    starts = [word.start for word in cut.words]
    assert starts == sorted(starts)
    assert cut.words[-1].end <= 9.0
    assert cut.seconds == 9.0


def test_other_tokens_than_those_of_the_training_are_refused(
    hybrid: Recogniser, tmp_path: Path, speech: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = {"kind": "characters", "label": "text", "case": "lower"}
    write_tokens(str(tmp_path / "tokens"), tokens | {"symbols": [" ", "a", "b"]})
    data = {"shards": "synthetic", "micro_batches": 4, "tokens": {"text": str(tmp_path / "tokens")}}
    heads = {"ctc": {"name": "ctc", "tokens": "text", "vocabulary": 3}}
    save(tmp_path / "run", 4, heads=heads, data=data, **LOCAL)
    given = ["transcribe", f"checkpoint={tmp_path / 'run'}", f"files={speech / 'a.wav'}"]
    assert main(given) == ExitCode.DONE
    capsys.readouterr()
    (tmp_path / "tokens" / "tokens.json").unlink()
    write_tokens(str(tmp_path / "tokens"), tokens | {"symbols": ["b", "a", " "]})
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000004"
    export = ["export", str(checkpoint), str(tmp_path / "edge"), "--to", "edge"]
    for command in (given, export):
        assert main(command) == ExitCode.USAGE
        assert "data.tokens.text=" in (said := capsys.readouterr().err)
        assert "was trained with" in " ".join(said.split())


def test_joint_decoding_without_an_attention_decoder_is_refused(
    runs: Path, speech: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["transcribe", f"checkpoint={runs / 'reads'}", f"files={speech / 'a.wav'}", "decoder=joint"]
    assert main(given) == ExitCode.USAGE
    assert "the run has no head `sequence`" in capsys.readouterr().err


def test_a_model_of_an_earlier_fine_tuning_is_read(runs: Path, tmp_path: Path, speech: Path) -> None:
    """Until 0.1, `auricle finetune` wrote the encoder's weights, one linear layer and its settings."""
    module, config, _ = load_checkpoint(runs / "reads" / "checkpoints" / "step_00000004")
    weights = {f"model.{name}": weight for name, weight in module.model.state_dict().items()}
    weights |= {name.removeprefix("text."): weight for name, weight in module.heads.state_dict().items()}
    save_file({name: weight.contiguous() for name, weight in weights.items()}, tmp_path / "model.safetensors")
    described = {"finetune": {"symbols": " ab"}, "pretrained": dump(config)}
    (tmp_path / "results.json").write_text(json.dumps(described))
    one, other = (open_recogniser(str(path)) for path in (tmp_path, runs / "reads"))
    wave = audio(speech / "a.wav")
    assert np.array_equal(one.frames(wave), other.frames(wave))
    assert one.head.symbols == (" ", "a", "b")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"checkpoint": "plain"}, "has no head that recognises speech; it has no heads"),
        ({"checkpoint": "two"}, "head='': must be one of one, other; the run has one (ctc), other (ctc)"),
        ({"head": "tex"}, "head=tex: must be one of text (did you mean text?)"),
        ({"checkpoint": "read"}, "did you mean"),
        ({"files": "missing.wav"}, "files=missing.wav: there is no such file or folder"),
        ({"format": "srt"}, "subtitles of 3 recordings need a folder; set out=FOLDER"),
        ({"overlap_seconds": "20"}, "overlap_seconds=20.0: at most 15, half of a window"),
        ({"files": "[]"}, "files"),
        ({"lm": "words.arpa"}, 'lm="words.arpa": decoder=greedy has no use for it; set decoder=beam'),
        ({"lm": "words.arpa", "decoder": "beam"}, "lm=words.arpa: there is no such file"),
    ],
)
def test_wrong_fields_are_usage_errors(
    runs: Path, speech: Path, given: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"checkpoint": "reads", "files": str(speech)} | given
    fields["checkpoint"] = str(runs / fields["checkpoint"])
    assert main(["transcribe", *(f"{name}={value}" for name, value in fields.items())]) == ExitCode.USAGE
    assert said in " ".join(capsys.readouterr().err.split())


def test_ctrl_c_ends_with_one_line(runs: Path) -> None:
    given = ["transcribe", f"checkpoint={runs / 'reads'}", "files=-"]
    program = [sys.executable, "-m", "launch.main", *given]
    process = subprocess.Popen(
        program,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": "."},
    )
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.write(b"\0" * (1 << 18))  # more than a pipe holds: it is being read when this returns
    process.send_signal(signal.SIGINT)
    said = process.stderr.read().decode()
    assert process.wait(30) == ExitCode.INTERRUPTED
    ending = "auricle transcribe: stopped; texts that were written stay; the same command starts over"
    assert said.splitlines()[-1] == ending
    assert "Traceback" not in said
