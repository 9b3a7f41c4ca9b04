"""Synthesis head: pitch labels, what it shows, and what a checkpoint keeps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import Batch
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.heads.synthesis import Synthesis, octaves
from pretrain.interfaces.frames import StepContext
from pretrain.models.synthesis.waveform_loss import own_speech
from pretrain.monitoring.figures import add_media
from pretrain.monitoring.metrics_writer import MetricsWriter
from pretrain.train_module import TrainModule
from tests.support.contract_cases import SYNTHESIS, TEXTS, batch, labelled, make
from tests.support.training import config


def module_of(**more: object) -> TrainModule:
    return make("none", heads={"voice": SYNTHESIS | more})


def run(module: TrainModule, data: Batch, step: int = 5) -> tuple[torch.Tensor, dict[str, float]]:
    ctx = StepContext(seed=3, step=step)
    torch.manual_seed(17)
    plan = module.prepare(data, ctx)
    loss, metrics = module(data, plan, plan.counts_K, ctx)
    return loss, {name: float(total) / max(float(count), 1.0) for name, (total, count) in metrics.items()}


def head_of(module: TrainModule) -> Synthesis:
    head = module.heads["voice"]
    assert isinstance(head, Synthesis)
    return head


def with_pitch(data: Batch, first: int = 30) -> Batch:
    labels_BF = torch.full((2, 100), first)
    labels_BF[:, ::3] = 0
    labels_BF[1, 70:] = -1
    return dataclasses.replace(data, targets={"pitch": labels_BF})


def test_pitch_labels_become_octaves_above_100_hertz() -> None:
    found = octaves(torch.tensor([[-1, 0, 1, 25, 49]]))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.0, -1.0, 0.0, 1.0]]))


def test_pitch_is_learned_from_its_labels() -> None:
    module = module_of(pitch="pitch")
    low, high = (run(module.eval(), with_pitch(labelled(batch()), first))[1] for first in (30, 90))
    assert high["metric/voice/pitch"] > low["metric/voice/pitch"] > 0
    run(module.train(), with_pitch(labelled(batch())))[0].backward()
    without = [name for name, weight in module.heads.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert without == []
    unlabelled = run(module.eval(), labelled(batch()))[1]
    assert unlabelled["metric/voice/pitch"] == 0.0


def test_the_loss_is_the_sum_of_the_logged_parts() -> None:
    found = run(module_of().eval(), labelled(batch()))[1]
    parts = ("mel", "alignment", "duration", "energy", "waveform")
    assert found["loss/voice"] == pytest.approx(sum(found[f"metric/voice/{part}"] for part in parts), rel=1e-5)


def test_a_text_with_more_tokens_than_mel_frames_is_no_target() -> None:
    module = module_of().eval()
    frames = 1 + (11_200 - 400) // 160
    for letters, rows in ((frames - 2, 2), (frames - 1, 1)):
        data = labelled(batch(), (TEXTS[0], "a" * letters))
        assert int(module.prepare(data, StepContext(0, 0)).heads["voice"].rows_B.sum()) == rows


def test_recorded_media_show_the_first_row_that_counts(tmp_path: Path) -> None:
    module = module_of().eval()
    head = head_of(module)
    plain = run(module, labelled(batch(), ("", TEXTS[1])))[0]
    assert head.take_media() is None
    head.record_next()
    assert torch.equal(run(module, labelled(batch(), ("", TEXTS[1])))[0], plain)
    media = head.take_media()
    assert media is not None
    frames, tokens = 1 + (11_200 - 400) // 160, len(TEXTS[1]) + 2
    assert media.images["alignment"].shape == (tokens, frames)
    assert media.images["mel_predicted"].shape == media.images["mel_recorded"].shape == (20, frames)
    assert len(media.audio["spoken"]) == len(media.audio["recorded"]) == 160 * frames
    assert head.take_media() is None
    with SummaryWriter(str(tmp_path)) as board:
        add_media(board, "voice", media, 3)
    events = EventAccumulator(str(tmp_path), {"images": 0, "audio": 0})
    events.Reload()
    assert events.Tags()["images"] == [f"media/voice/{name}" for name in media.images]
    assert events.Tags()["audio"] == ["media/voice/recorded", "media/voice/spoken"]


def test_training_batches_are_shown_at_the_updates_of_media_every_alone(tmp_path: Path) -> None:
    module, folder = module_of(), RunFolder(tmp_path)
    folder.claim()
    settings = config(train={"steps": 200, "log_every": 10, "media_every": 100})
    with MetricsWriter(folder, settings, module, resumed_at=0) as writer:
        for step in (10, 100, 110):
            writer.expect(step)
            run(module, labelled(batch()), step)
            writer.log(step, {}, {})
    events = EventAccumulator(str(folder.tensorboard), {"images": 0, "audio": 0}).Reload()
    assert [event.step for event in events.Images("media/voice/alignment")] == [100]
    assert [event.step for event in events.Audio("media/voice/spoken")] == [100]


def test_held_out_sentences_are_shown_at_every_measurement(tmp_path: Path) -> None:
    """The same sentence each time, at steps at which no training batch is due."""
    module, folder = module_of().eval(), RunFolder(tmp_path)
    folder.claim()
    settings = config(train={"steps": 200, "log_every": 10, "media_every": 100})
    with MetricsWriter(folder, settings, module, resumed_at=0) as writer:
        for step in (20, 40):
            writer.expect_held_out()
            run(module, labelled(batch()), step)
            writer.log(step, {}, {})
    events = EventAccumulator(str(folder.tensorboard), {"images": 0, "audio": 0}).Reload()
    for name in ("alignment", "mel_recorded", "mel_predicted"):
        assert [event.step for event in events.Images(f"media/voice/{name}")] == [20, 40]
    first, second = (event.encoded_audio_string for event in events.Audio("media/voice/recorded"))
    assert first == second


def test_weights_trained_with_other_mel_frames_are_refused() -> None:
    module = module_of()
    state = module.state_dict()
    state["heads.voice.mel_sha256"] = state["heads.voice.mel_sha256"] + 1
    module.load_state_dict(state)
    with pytest.raises(ConfigError, match="this version defines mel frames as 20 bands on HTK's scale"):
        module.prepare(labelled(batch()), StepContext(0, 0))


def test_of_a_mixture_the_part_that_the_text_belongs_to_is_learned() -> None:
    data = labelled(batch())
    assert data.sources_BST is not None
    assert torch.equal(own_speech(data), data.sources_BST[:, 0])
    assert own_speech(dataclasses.replace(data, sources_BST=None)) is data.wave_BT
    without_partner = dataclasses.replace(data, sources_BST=torch.zeros_like(data.sources_BST))
    assert torch.equal(own_speech(without_partner), data.wave_BT)
