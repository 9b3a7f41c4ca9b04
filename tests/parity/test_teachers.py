"""data2vec, data2vec 2.0 and DinoSR computed in NumPy from their papers: targets, losses, decoder, averages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import erf

from data_pipeline.core.schema import load
from data_pipeline.core.types import Batch
from pretrain.config import Config
from pretrain.interfaces.frames import Frames, StepContext
from pretrain.objectives.data2vec import Data2Vec
from pretrain.objectives.data2vec2 import Data2Vec2
from pretrain.objectives.dinosr import DinoSR
from pretrain.train_module import TrainModule, build_model
from tests.support.hugging_face import ragged_batch
from tests.support.parity_table import Parity

Array = np.ndarray[Any, np.dtype[np.float64]]
CTX = StepContext(seed=0, step=0)
TOP = 2


def made(objective: str, **more: Any) -> TrainModule:
    """Builds a model without dropout, whose teacher differs from the student."""
    encoder = {"name": "transformer", "dim": 32, "layers": 3, "heads": 2, "ffn_dim": 48, "positions": "rope"}
    encoder |= {"dropout": 0.0, "attention_dropout": 0.0, "layer_drop": 0.0}
    values = {
        "data": {"shards": "none"},
        "frontend": {"name": "log_mel", "subsampling": 4, "dropout": 0.0},
        "encoder": encoder,
        "objective": {"name": objective, "top_layers": TOP} | more,
    }
    module = build_model(load(Config, values))
    generator = torch.Generator().manual_seed(1)
    assert isinstance(module.objective, Data2Vec | Data2Vec2 | DinoSR)
    assert module.objective.teacher is not None
    for weight in module.objective.teacher.parameters():
        weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return module.train()


def batch() -> Batch:
    wave_BT, lengths_B = ragged_batch(ragged=True)
    return Batch(wave_BT, lengths_B, ("a", "b", "c"), 0)


def numpy(x: torch.Tensor) -> Array:
    return x.detach().double().numpy()


def project(module: TrainModule, given: Batch) -> Frames:
    frames: Frames = module.model.frontend.project(module.model.frontend.extract(given.wave_BT, given.lengths_B))
    return frames


def instance_normed(x_FD: Array) -> Array:
    return (x_FD - x_FD.mean(0)) / np.sqrt(x_FD.var(0) + 1e-5)


def teacher_layers(module: TrainModule, frames: Frames) -> list[list[Array]]:
    """Returns, by utterance, the instance-normed feed-forward outputs of the teacher's last blocks.

    Each utterance is computed alone; a hook on the last linear layer of the feed-forward part records the outputs.
    """
    teacher = module.objective.teacher.copy  # type: ignore[union-attr]
    found: list[list[Array]] = []
    for row, length in enumerate(frames.lengths_B.tolist()):
        seen: list[Array] = []
        hooks = [
            block.ffn_out.register_forward_hook(lambda _, __, out, seen=seen: seen.append(numpy(out[0])))
            for block in teacher.blocks
        ]
        with torch.no_grad():
            teacher(Frames(frames.x_BFD[row : row + 1, :length], torch.tensor([length]), frames.rate_hz))
        for hook in hooks:
            hook.remove()
        found.append([instance_normed(layer) for layer in seen[-TOP:]])
    return found


def relative(mine: float | torch.Tensor, other: float) -> float:
    return abs(float(torch.as_tensor(mine).detach()) - other) / abs(other)


def test_data2vec(parity: Parity) -> None:
    """Loss: ‖prediction − mean of the teacher's top layers‖² over masked frames, divided by √D as in fairseq."""
    module, given = made("data2vec"), batch()
    objective = module.objective
    assert isinstance(objective, Data2Vec)
    plan = objective.prepare(module.model, given, CTX)
    frames = project(module, given)
    total, weight_DD, bias_D = 0.0, numpy(objective.regression.weight), numpy(objective.regression.bias)
    for row, layers in enumerate(teacher_layers(module, frames)):
        length = int(frames.lengths_B[row])
        hidden = numpy(plan.mask.mask_BF[row, :length]).astype(bool)
        target_FD = np.mean(layers, axis=0)
        found = objective.targets(frames)[row, :length]
        parity("data2vec: targets against NumPy", 1e-4, float(np.abs(numpy(found) - target_FD).max()))
        x_FD = frames.x_BFD[row, :length].detach().clone()
        x_FD[torch.from_numpy(hidden)] = objective.mask_embedding.detach()
        encoded = module.model.encoder(Frames(x_FD[None], torch.tensor([length]), frames.rate_hz))
        prediction_FD = numpy(encoded.final.x_BFD[0]) @ weight_DD.T + bias_D
        total += float(((prediction_FD - target_FD)[hidden] ** 2).sum()) / np.sqrt(32)
    loss, _ = objective(module.model, given, plan, CTX)
    parity("data2vec: loss against NumPy", 1e-5, relative(loss.total, total))


def convolved(x_FD: Array, weight_EDK: Array, bias_E: Array, groups: int) -> Array:
    """Returns a grouped convolution with zero padding at both ends."""
    width, inner, taps = weight_EDK.shape
    padded = np.pad(x_FD, ((taps // 2, taps // 2), (0, 0)))
    out = np.zeros((len(x_FD), width))
    for channel in range(width):
        first = channel // (width // groups) * inner
        for tap in range(taps):
            out[:, channel] += padded[tap : tap + len(x_FD), first : first + inner] @ weight_EDK[channel, :, tap]
    return out + bias_E


def decoded(decoder: Any, x_FD: Array) -> Array:
    """Convolution → layer norm without weights → GELU, residuals from the second on; then a linear layer."""
    for number, conv in enumerate(decoder.convs):
        y_FD = convolved(x_FD, numpy(conv.weight), numpy(conv.bias), conv.groups)
        y_FD = (y_FD - y_FD.mean(1, keepdims=True)) / np.sqrt(y_FD.var(1, keepdims=True) + 1e-5)
        y_FD = y_FD * (1 + erf(y_FD / np.sqrt(2))) / 2
        x_FD = x_FD + y_FD if number else y_FD
    return x_FD @ numpy(decoder.linear.weight).T + numpy(decoder.linear.bias)


def test_data2vec2(parity: Parity) -> None:
    """Only the kept frames of each copy are encoded; noise fills the gaps, where the decoder's error counts."""
    module, given = made("data2vec2", masks=2, decoder_dim=48), batch()
    objective = module.objective.eval()
    assert isinstance(objective, Data2Vec2)
    plan = objective.prepare(module.model, given, CTX)
    frames = project(module, given)
    total = 0.0
    for row, layers in enumerate(teacher_layers(module, frames)):
        length = int(frames.lengths_B[row])
        target_FD = np.mean(layers, axis=0)
        for copy in (2 * row, 2 * row + 1):
            hidden = plan.mask_RF[copy, :length]
            kept = (~hidden).nonzero()[:, 0]
            seen = Frames(frames.x_BFD[row : row + 1, kept], torch.tensor([len(kept)]), 25.0, places_BF=kept[None])
            filled_FD = numpy(plan.noise_RFD[copy, :length]).copy()
            filled_FD[kept.numpy()] = numpy(module.model.encoder(seen).final.x_BFD[0])
            prediction_FD = decoded(objective.decoder, filled_FD)
            total += float(((prediction_FD - target_FD)[hidden.numpy()] ** 2).sum()) / np.sqrt(32)
            mine = objective.decoder(torch.from_numpy(filled_FD).float()[None], torch.tensor([length]))
            parity("data2vec 2.0: decoder against NumPy", 1e-5, float(np.abs(numpy(mine[0]) - prediction_FD).max()))
    loss, _ = objective(module.model, given, plan, CTX)
    parity("data2vec 2.0: loss against NumPy", 1e-5, relative(loss.total, total))


def test_data2vec2_decoder_has_the_released_shape() -> None:
    """Four grouped convolutions of 7 taps, 384 channels and 16 groups, between layers of the encoder's 768 channels."""
    from pretrain.objectives.data2vec2 import Config as Shape
    from pretrain.objectives.data2vec2 import ConvDecoder

    shapes = [tuple(weight.shape) for weight in ConvDecoder(768, Shape()).parameters() if weight.ndim > 1]
    assert shapes == [(384, 48, 7), *[(384, 24, 7)] * 3, (768, 384)]


def test_dinosr(parity: Parity) -> None:
    """Labels, loss, and codes after an update (eq. 3-6): only sums and sizes of codes with assigned frames decay."""
    module, given = made("dinosr", n_codes=12), batch()
    objective = module.objective
    assert isinstance(objective, DinoSR)
    plan = objective.prepare(module.model, given, CTX)
    frames = project(module, given)
    sums, sizes = numpy(objective.sums_LVD).copy(), numpy(objective.sizes_LV).copy()
    layers, total, other = teacher_layers(module, frames), 0.0, 0
    new_sums, new_sizes, logits = np.zeros_like(sums), np.zeros_like(sizes), []
    for row, length in enumerate(frames.lengths_B.tolist()):
        x_FD = frames.x_BFD[row, :length].detach().clone()
        hidden = plan.mask.mask_BF[row, :length]
        x_FD[hidden] = objective.mask_embedding.detach()
        encoded = module.model.encoder(Frames(x_FD[None], torch.tensor([length]), frames.rate_hz))
        logits.append(numpy(encoded.final.x_BFD[0])[hidden.numpy()])
    found_LN = objective.eval().labels(frames, plan.mask).numpy()
    for layer in range(TOP):
        codes = sums[layer] / sizes[layer][:, None]
        weight, bias = numpy(objective.classifiers[layer].weight), numpy(objective.classifiers[layer].bias)
        labels = []
        for row, length in enumerate(frames.lengths_B.tolist()):
            hidden = plan.mask.mask_BF[row, :length].numpy()
            x_ND = layers[row][layer][hidden]
            nearest = ((x_ND[:, None] - codes[None]) ** 2).sum(2).argmin(1)
            np.add.at(new_sums[layer], nearest, x_ND)
            np.add.at(new_sizes[layer], nearest, 1)
            scores = logits[row] @ weight.T + bias
            scores -= scores.max(1, keepdims=True)
            total -= float((scores - np.log(np.exp(scores).sum(1, keepdims=True)))[np.arange(len(x_ND)), nearest].sum())
            labels.append(nearest)
        other += int((np.concatenate(labels) != found_LN[layer]).sum())
    parity("DinoSR: labels against NumPy: how many differ", 0, other)
    loss, _ = objective.train()(module.model, given, plan, CTX)
    parity("DinoSR: loss against NumPy", 1e-5, relative(loss.total, total))
    objective.after_step(module.model, CTX)
    came = new_sizes > 0
    assert came.any()
    assert not came.all()
    decay = np.where(came, 0.9, 1.0)
    sizes = sizes * decay + (1 - decay) * new_sizes
    sums = sums * decay[:, :, None] + (1 - decay)[:, :, None] * new_sums
    error = max(np.abs(numpy(objective.sums_LVD) - sums).max(), np.abs(numpy(objective.sizes_LV) - sizes).max())
    parity("DinoSR: codes' sums and sizes after an update against NumPy", 1e-4, float(error))


@pytest.mark.parametrize("objective", ["data2vec", "data2vec2", "dinosr"])
def test_teachers_are_the_ema_of_the_student(objective: str, parity: Parity) -> None:
    """τ rises linearly from 0.999 to its final value; blocks and norm become τ·teacher + (1 − τ)·student."""
    module = made(objective, ema_steps=100)
    assert isinstance(module.objective, Data2Vec | Data2Vec2 | DinoSR)
    assert module.objective.teacher is not None
    end = 0.99999 if objective == "data2vec2" else 0.9999
    student = {name: numpy(weight) for name, weight in module.model.encoder.named_parameters()}
    expected = {name: numpy(weight).copy() for name, weight in module.objective.teacher.copy.named_parameters()}
    for step in (0, 25, 300):
        decay = 0.999 + (end - 0.999) * min(step / 100, 1)
        expected = {name: decay * weight + (1 - decay) * student[name] for name, weight in expected.items()}
        module.objective.after_step(module.model, StepContext(0, step))
    for name, weight in module.objective.teacher.copy.named_parameters():
        error = float(np.abs(numpy(weight) - expected[name]).max())
        parity("data2vec, data2vec 2.0, DinoSR: averaged teacher against NumPy", 1e-6, error)
