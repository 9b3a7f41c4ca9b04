"""What reaches TensorBoard, and that a browser shows it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.schema import dump
from launch.app import main
from launch.verbs.board import command, link
from tests.unit.test_watch import BEST_RQ, WAV2VEC2, config, run

HUBERT: dict[str, Any] = {"name": "hubert", "units": 8, "projection_dim": 16}
CHROMIUM = [
    "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1400,1000",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three short runs of three objectives, with their config beside."""
    folder = tmp_path_factory.mktemp("runs")
    for objective in (BEST_RQ, WAV2VEC2, HUBERT):
        train = {"steps": 6, "checkpoint_every": 6, "media_every": 4}
        settings = config(objective=objective, train=train)
        name = str(objective["name"])
        (folder / name).mkdir()
        (folder / name / "git.diff").write_text("--- a\n+++ b\n+a line\n")
        (folder / name / "config.json").write_text(json.dumps(dump(settings)))
        run(folder / name, settings)
    return folder


@pytest.mark.parametrize("name", ["best_rq", "wav2vec2", "hubert"])
def test_everything_reaches_tensorboard(runs: Path, name: str) -> None:
    events = EventAccumulator(str(runs / name / "tb"), size_guidance={"audio": 0, "images": 0}).Reload()
    tags = events.Tags()
    assert tags["audio"] == ["audio/heard", "audio/masked_parts_silent"]
    assert tags["images"] == ["units/spectrogram"]
    assert "hist/codes" in tags["histograms"]
    assert {"config/text_summary", "git_diff/text_summary", "custom_scalars__config__"} <= set(tags["tensors"])
    assert "_hparams_/experiment" in events.PluginTagToContent("hparams")
    assert {"loss/total", "opt/lr", "perf/memory_gib", "health/std/stem", "data/padding_share"} <= set(tags["scalars"])
    heard, silent = (events.Audio(tag)[0] for tag in tags["audio"])
    assert heard.step == silent.step == 4
    assert heard.encoded_audio_string != silent.encoded_audio_string
    (metadata,) = (runs / name / "tb").glob("*/frames/metadata.tsv")
    header, *lines = metadata.read_text().splitlines()
    assert header.split("\t")[:4] == ["segment", "second", "masked", "unit"]
    masked = [line.split("\t") for line in lines if line.split("\t")[2] == "yes"]
    assert masked
    assert all(int(line[3]) >= 0 for line in masked)


def test_runs_and_compare(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(runs)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("best_rq", "wav2vec2", "hubert"))
    picture = tmp_path / "compare.png"
    assert main(["compare", str(runs / "best_rq"), str(runs / "hubert"), f"--plot={picture}"]) == 0
    printed = capsys.readouterr().out
    assert "objective.name" in printed
    assert "schedule.name" not in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["compare", str(runs / "best_rq")]) == 1
    assert main(["runs", str(tmp_path)]) == 1


def test_replay_without_a_kept_batch_says_so(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(runs / "best_rq")]) == 1
    assert "no batch was kept" in capsys.readouterr().err


def test_a_browser_shows_the_charts(runs: Path, tmp_path: Path) -> None:
    if not shutil.which("chromium"):
        pytest.skip("needs Debian's chromium")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "board").mkdir()
    link(sorted(path.parent for path in runs.glob("*/config.json")), tmp_path / "board")
    server = subprocess.Popen(
        command(tmp_path / "board", port),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        loaded: list[str] = []
        while time.monotonic() < deadline and len(loaded) < 3:
            time.sleep(1)
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/runs", timeout=5) as answer:
                    loaded = json.load(answer)
            except OSError:
                continue
        assert sorted(loaded) == ["best_rq", "hubert", "wav2vec2"]
        page = subprocess.run(
            [*CHROMIUM, f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=20000", "--dump-dom",
             f"http://127.0.0.1:{port}/#timeseries"],
            capture_output=True, text=True, timeout=120,
        ).stdout  # fmt: skip
    finally:
        server.terminate()
        server.wait(20)
    assert page.count("<scalar-card") + page.count("<card-view") > 3
    assert "loss/total" in page or "loss" in page
