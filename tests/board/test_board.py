"""TensorBoard events of runs, and their display in a browser."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from data_pipeline.core.schema import dump
from launch.commands.board import command, link
from launch.main import main
from launch.runs.summary import summarise
from pretrain.interfaces.frames import StepContext
from pretrain.monitoring.config_pages import compared_fields
from pretrain.monitoring.figures import add_frames, coloured_by, colours, projected, scatter
from pretrain.monitoring.snapshot import SnapshotHook
from pretrain.monitoring.tag_descriptions import description
from pretrain.self_supervision.contrastive import nearest_units
from pretrain.self_supervision.masking import FrameMask
from pretrain.train_module import build_model
from tests.support.planted_failures import BEST_RQ, WAV2VEC2, config, run
from tests.support.synthetic_reader import synthetic_batch

HUBERT: dict[str, Any] = {"name": "hubert", "units": 8, "projection_dim": 16}
PAGES = {
    "timeseries": ("data", "/padding_share"),
    "custom_scalars": ("learning", "losses", "health", "deviation of each stage"),
    "images": ("units/spectrogram", "frames/principal_axes"),
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
        train = {"steps": 6, "checkpoint_every": 6, "media_every": None}
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
    assert sorted(tags["images"]) == ["frames/principal_axes", "units/spectrogram"]
    assert "hist/codes" in tags["histograms"]
    assert {"config/text_summary", "git_diff/text_summary", "custom_scalars__config__"} <= set(tags["tensors"])
    assert "_hparams_/experiment" in events.PluginTagToContent("hparams")
    assert {"loss/total", "opt/lr", "perf/memory_gib", "health/std/stem", "data/padding_share"} <= set(tags["scalars"])
    heard, silent = (events.Audio(tag)[0] for tag in tags["audio"])
    assert [event.step for event in events.Audio("audio/heard")] == [1], "a run of six steps shows its first update"
    assert heard.step == silent.step == 1
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


def test_frames_of_several_micro_batches_are_coloured_by_speaker() -> None:
    """A micro-batch of one speaker has no other label to be coloured by; the units of further ones are not known."""
    module = build_model(config(objective=BEST_RQ)).train()
    camera, ctx = SnapshotHook(module.objective), StepContext(0, 3)
    for speakers, column, micro_batches in ((("ann", "bob"), "speaker", 2), (("ann", "ann"), "unit", 1)):
        camera.arm()
        batches = [dataclasses.replace(synthetic_batch(0, j), labels={"speaker": (speakers[j],) * 2}) for j in (0, 1)]
        for batch in batches:
            plan = module.prepare(batch, ctx)
            module(batch, plan, plan.counts_K, ctx)
        snapshot = camera.take()
        assert snapshot is not None
        frames_ND, header, rows = projected(snapshot)
        assert header[coloured_by(header, rows)] == column
        assert len(frames_ND) == len(rows)
        assert {row[0] for row in rows} == {key for batch in batches[:micro_batches] for key in batch.keys}
        assert {row[3] == "" for row in rows if row[0] in batches[1].keys} == ({True} if micro_batches == 2 else set())


def test_media_come_at_the_first_update_and_every_tenth_of_a_run(tmp_path: Path) -> None:
    train = {"steps": 32, "checkpoint_every": 32, "media_every": None}
    run(tmp_path, config(objective=BEST_RQ, train=train))
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"audio": 0}).Reload()
    assert [event.step for event in events.Audio("audio/heard")] == [1, 10, 20, 30]


def test_tags_have_descriptions_and_the_text_page_the_differences(runs: Path) -> None:
    events = EventAccumulator(str(runs / "hubert" / "tb")).Reload()
    for tag in ("loss/total", "metric/perplexity", "units/spectrogram", "audio/heard"):
        assert events.SummaryMetadata(tag).summary_description == description(tag) != ""
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    table = text.partition("## All fields")[0]
    assert "| objective.units | 100 | **8** |" in table.replace("\\", "")
    assert "objective.mask" not in table, "fields at their default are not in the table"
    compared = compared_fields(config(objective=HUBERT), runs / "hubert")
    assert compared["objective.units"] == 8
    assert compared["objective.name"] == "hubert"
    same = {"optimizer.eps", "schedule.hold_fraction", "data.shards"}
    assert not same & compared.keys(), "fields that are alike in all runs and at their default are left out"


def test_frames_are_coloured_by_a_label_with_a_legend() -> None:
    header = ["segment", "second", "masked", "unit", "speaker"]
    rows = [["s", "0.1", "no", str(n), f"speaker{n % 2}"] for n in range(6)]
    assert header[coloured_by(header, rows)] == "speaker"
    assert header[coloured_by(header, [[*row[:4], "ann" * (n % 2)] for n, row in enumerate(rows)])] == "unit"
    assert header[coloured_by(header[:4], [row[:4] for row in rows])] == "unit"
    assert len(np.unique(colours([row[4] for row in rows]), axis=0)) == 2
    figure = scatter(torch.randn(6, 4), header, rows)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["speaker0 (3)", "speaker1 (3)"]
    assert "principal axis 1" in figure.axes[0].get_xlabel()


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_tensorboard_and_removes_its_folder(runs: Path, tmp_path: Path, number: int) -> None:
    line = [sys.executable, "-m", "launch.main", "board", str(runs), "--port", "0"]
    started = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(tmp_path)})
    try:
        assert started.stdout is not None
        assert "runs at http://localhost:" in started.stdout.readline()
        children: list[psutil.Process] = []
        while not children:
            time.sleep(0.05)
            children = psutil.Process(started.pid).children(recursive=True)
        assert list(tmp_path.glob("auricle-board-*"))
        started.send_signal(number)
        started.wait(20)
    finally:
        started.kill()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    assert not list(tmp_path.glob("auricle-board-*"))


def test_a_busy_port_is_said_before_the_address(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["board", str(runs), "--port", str(taken.getsockname()[1])]) == 2
    said = capsys.readouterr()
    assert "http://" not in said.out
    assert "--port 0" in said.err


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
