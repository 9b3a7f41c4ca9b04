"""TensorBoard events of runs, and their display in a browser."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from data_pipeline.core.schema import dump
from launch.commands.board import command, link
from launch.main import main
from launch.runs.summary import summarise
from pretrain.interfaces.frames import StepContext
from pretrain.monitoring.figures import add_frames, projected
from pretrain.monitoring.snapshot import SnapshotHook
from pretrain.self_supervision.contrastive import nearest_units
from pretrain.self_supervision.masking import FrameMask
from pretrain.train_module import build_model
from tests.support.planted_failures import BEST_RQ, WAV2VEC2, config, run
from tests.support.synthetic_reader import synthetic_batch

HUBERT: dict[str, Any] = {"name": "hubert", "units": 8, "projection_dim": 16}
PAGES = {
    "timeseries": ("data", "/padding_share"),
    "custom_scalars": ("learning", "losses", "health", "deviation of each stage"),
    "images": ("units/spectrogram",),
    "audio": ("audio/heard", "audio/masked_parts_silent"),
    "histograms": ("hist/codes",),
    "text": ("config/text_summary", "git_diff/text_summary"),
    "hparams": ("TABLE VIEW", "objective.name"),
    "projector": ("3 runs found", "1 tensor found", "Total variance described"),
}
"""Texts that each tab of TensorBoard must show."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes short runs of three objectives, each with its config."""
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
def test_all_kinds_of_events_are_written_to_tensorboard(runs: Path, name: str) -> None:
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


@pytest.mark.parametrize("objective", [BEST_RQ, WAV2VEC2, HUBERT], ids=lambda given: str(given["name"]))
def test_a_snapshot_has_targets_predictions_and_labels_of_each_frame(objective: dict[str, Any]) -> None:
    module = build_model(config(objective=objective)).train()
    camera, ctx = SnapshotHook(module.objective), StepContext(0, 3)
    camera.arm()
    phones = torch.arange(100).expand(2, 100)
    batch = dataclasses.replace(synthetic_batch(0, 0), targets={"phones": phones}, labels={"speaker": ("ann", "bob")})
    plan = module.prepare(batch, ctx)
    module(batch, plan, plan.counts_K, ctx)
    snapshot = camera.take()
    assert snapshot is not None
    assert snapshot.targets_N is not None
    assert snapshot.predictions_N is not None
    assert len(snapshot.targets_N) == len(snapshot.predictions_N) == int(snapshot.mask_BF.sum())
    assert set(snapshot.predictions_N.tolist()) <= set(range(16 * 16))
    _, header, rows = projected(snapshot)
    assert header == ["segment", "second", "masked", "unit", "speaker", "phones"]
    first = [row for row in rows if row[0] == "a0-0"]
    assert {row[4] for row in first} == {"ann"}
    # the first row has 100 labels in one second, so that a label is the time of the frame's middle in 10 ms
    assert all(abs(int(row[5]) - 100 * float(row[1])) <= 2 for row in first)


def test_the_projector_keeps_the_frames_of_earlier_starts(tmp_path: Path) -> None:
    for steps in ((4, 8), (8, 12)):  # the second start resumed at step 7
        with SummaryWriter(str(tmp_path)) as board:
            for step in steps:
                add_frames(board, torch.eye(3), [["a", "b"]] * 3, ["phone", "speaker"], "frames", step)
    listed = (tmp_path / "projector_config.pbtxt").read_text()
    assert [listed.count(f"frames:{step:05d}") for step in (4, 8, 12)] == [1, 1, 1]


def test_a_contrastive_prediction_is_the_unit_of_the_nearest_target_of_its_row() -> None:
    mask = FrameMask(torch.ones(2, 2, dtype=torch.bool), torch.arange(4), torch.tensor([[0, 1], [2, 3]]),
                     torch.ones(2, 2, dtype=torch.bool))  # fmt: skip
    targets_ND = torch.eye(4)
    predictions_ND = torch.tensor([[0.1, 0.9, 0, 0], [0, 1.0, 0, 0], [5.0, 0, 0.2, 0.1], [0, 0, 0, 0.01]])
    assert nearest_units(predictions_ND, targets_ND, torch.tensor([7, 8, 9, 6]), mask).tolist() == [8, 8, 9, 6]


def test_runs_and_compare_print_tables_and_write_a_plot(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", str(runs)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("best_rq", "wav2vec2", "hubert"))
    picture = tmp_path / "compare.png"
    assert main(["compare", str(runs / "best_rq"), str(runs / "hubert"), f"--plot={picture}"]) == 0
    printed = capsys.readouterr().out
    assert "objective.name" in printed
    assert "schedule.name" not in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["compare", str(runs / "best_rq")]) == 2
    assert main(["runs", str(tmp_path)]) == 2


def test_runs_with_equal_names_are_distinguished_by_their_parent_folders(tmp_path: Path) -> None:
    folders = [tmp_path / parent / "runs" / "mine" for parent in ("a", "b")]
    for folder in folders:
        (folder / "tb").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    link([*folders, tmp_path / "a" / ".." / "a" / "runs" / "mine"], tmp_path / "home")
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["a-runs-mine", "b-runs-mine"]


def test_the_state_of_a_run_is_running_stopped_or_unhealthy(tmp_path: Path) -> None:
    (tmp_path / "heartbeats").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"train": {"steps": 9}, "objective": {"name": "hubert"}}))
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 3, "time": 1000.0}) + "\n")
    (tmp_path / "heartbeats" / "rank_0.json").write_text("{}")
    assert summarise(tmp_path).state == "running", "updates are slow, but heartbeats are recent"
    assert summarise(tmp_path, time.time() + 1000).state == "stopped"
    (tmp_path / "UNHEALTHY").write_text("loss is NaN")
    assert summarise(tmp_path).state == "unhealthy"


def test_replay_without_a_saved_batch_is_an_error(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(runs / "best_rq")]) == 2
    assert "no batch was saved" in capsys.readouterr().err


@pytest.fixture
def board(runs: Path, tmp_path: Path) -> Iterator[str]:
    """Starts TensorBoard on the runs and returns its address once they are loaded."""
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
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(20)


def wait_for(page: Any, text: str) -> None:
    """Waits until a frame of the page shows the text; some tabs of TensorBoard have nested frames."""
    deadline = time.monotonic() + 60
    while not any(frame.get_by_text(text).filter(visible=True).count() for frame in page.frames):
        assert time.monotonic() < deadline, f"{text!r} is not visible at {page.url}"
        page.wait_for_timeout(200)


def test_a_browser_shows_every_tab(board: str, tmp_path: Path) -> None:
    """Screenshots are kept with AURICLE_SCREENSHOTS=folder."""
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("needs Debian's chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    pictures = Path(os.environ.get("AURICLE_SCREENSHOTS", tmp_path))
    with playwright.sync_playwright() as driver:
        options = ["--no-sandbox", "--disable-quic", "--enable-unsafe-swiftshader"]  # the projector needs WebGL
        browser = driver.chromium.launch(executable_path=chromium, args=options)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        for tab, shown in PAGES.items():
            page.goto("about:blank")
            page.goto(f"{board}#{tab}")
            for text in shown:
                wait_for(page, text)
            page.screenshot(path=pictures / f"{tab}.png")
        browser.close()
