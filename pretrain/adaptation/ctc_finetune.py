"""Fine-tunes a checkpoint to a speech recogniser with CTC on characters; reports word and character error rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from data_pipeline.core.atomic_files import write_json
from data_pipeline.core.rng import keyed_rng, keyed_seed
from data_pipeline.core.schema import ConfigError, about, config, dump
from pretrain.checkpointing.tensor_files import save_tensors
from pretrain.evaluate.features import Waves
from pretrain.evaluate.frozen_encoders import Model, open_pretrained
from pretrain.evaluate.hf_encoder import HuggingFaceModel
from pretrain.evaluate.manifest import Utterance, find_manifest, read_manifest, require_disjoint
from pretrain.inference.ctc_decoding import BLANK, NGram, beam_search, greedy
from pretrain.interfaces.frames import EncoderOutput, Frames


@config
class FinetuneConfig:
    checkpoint: Annotated[str, about("run, checkpoint or Hugging Face folder to start from", min_length=1)]
    task: Annotated[Literal["ctc"], about("connectionist temporal classification of characters")] = "ctc"
    random_weights: Annotated[bool, about("the same architecture from scratch, as a baseline")] = False
    manifest: Annotated[
        str,
        about(
            "tab-separated list of the audio: path, speaker, text, corpus, split; empty: manifest.tsv of the folder "
            "that the environment variable AURICLE_SPEECH names"
        ),
    ] = ""
    corpora: Annotated[str, about("take only these corpora, with commas; empty: all that have text")] = "speechocean762"
    symbols: Annotated[str, about("characters to write; others are left out", min_length=2)] = (
        " 'abcdefghijklmnopqrstuvwxyz"
    )
    steps: Annotated[int, about("updates", ge=1)] = 2_000
    frozen_steps: Annotated[int, about("at first only the new layer learns, for so many updates", ge=0)] = 200
    lr: Annotated[float, about("peak learning rate: tenth of the steps up, then linearly to 0", gt=0)] = 3e-4
    batch_seconds: Annotated[float, about("audio per update", gt=0)] = 40.0
    mask_time: Annotated[float, about("share of features replaced by zeros in spans of 10 frames", ge=0, lt=1)] = 0.1
    max_utterances: Annotated[int, about("at most so many per split; 0 takes all", ge=0)] = 0
    beam: Annotated[int, about("prefixes kept in beam search; 0: greedy only", ge=0)] = 16
    ngram: Annotated[int, about("order of the character n-gram of the training texts; 0: none", ge=0, le=10)] = 5
    ngram_weight: Annotated[float, about("its weight beside the acoustics", ge=0)] = 0.5
    seed: Annotated[int, about("keys every random draw", ge=0)] = 0
    device: Annotated[str, about("cpu, or cuda where there is one", min_length=1)] = "cpu"
    out: Annotated[str, about("folder for the model and results.json; empty: print only")] = ""


@dataclass(frozen=True)
class Errors:
    """Error rates of one decoder on the test speakers."""

    decoder: str
    wer: float
    cer: float
    utterances: int


class Recogniser(nn.Module):
    """Encoder and a linear layer to characters."""

    def __init__(self, model: Model, symbols: str) -> None:
        super().__init__()
        self.model, self.symbols = model, symbols
        self.linear = nn.Linear(model.shape.dim, len(symbols) + 1)

    def forward(self, wave_BT: Tensor, lengths_B: Tensor, dropped_BF: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns ln p of each symbol, (B, F, V), and the frames of each row. dropped_BF: features set to 0."""
        encoded = self._encode(wave_BT, lengths_B, dropped_BF)
        return self.linear(encoded.final.x_BFD).float().log_softmax(-1), encoded.lengths_B

    def _encode(self, wave_BT: Tensor, lengths_B: Tensor, dropped_BF: Tensor | None) -> EncoderOutput:
        if isinstance(self.model, HuggingFaceModel):
            encoded: EncoderOutput = self.model(wave_BT, lengths_B, dropped_BF)
            return encoded
        features = self.model.frontend.extract(wave_BT, lengths_B)
        if dropped_BF is not None:
            x_BFD = features.x_BFD.masked_fill(dropped_BF[:, : features.x_BFD.shape[1], None], 0.0)
            features = Frames(x_BFD, features.lengths_B, features.rate_hz, features.raw_BFD)
        masked: EncoderOutput = self.model.encoder(self.model.frontend.project(features))
        return masked

    def feature_lengths(self, lengths_B: Tensor) -> Tensor:
        """Returns the features of audio of so many samples."""
        where = self.model if isinstance(self.model, HuggingFaceModel) else self.model.frontend
        return where.feature_lengths(lengths_B)


def finetune(settings: FinetuneConfig, say: Callable[[str], None] = print) -> list[Errors]:
    """Fine-tunes on the manifest's train split and decodes its test split.

    Args:
        settings: checkpoint, manifest and training settings.
        say: receives a line of progress at a time.

    Returns:
        Error rates of each decoder.

    Raises:
        ValueError: the splits have no text, or the checkpoint cannot be used.
    """
    train, test = _utterances(settings)
    pretrained = open_pretrained(settings.checkpoint)
    model = pretrained.fresh(settings.seed) if settings.random_weights else pretrained.model
    torch.manual_seed(keyed_seed(settings.seed, "finetune"))
    net = Recogniser(model, settings.symbols).to(settings.device)
    waves = Waves()
    _fit(net, train, waves, settings, say)
    found = recognise(net, train, test, waves, settings)
    if settings.out:
        folder = Path(settings.out).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(
            {name: value.contiguous() for name, value in net.state_dict().items()}, folder / "model.safetensors"
        )
        rows = [{"decoder": e.decoder, "wer": e.wer, "cer": e.cer, "utterances": e.utterances} for e in found]
        described = {"finetune": dump(settings), "pretrained": pretrained.settings, "step": pretrained.step}
        write_json(folder / "results.json", {"errors": rows, **described})
    return found


def written(text: str, symbols: str) -> str:
    """Returns the text in the recogniser's symbols: lower case, other characters dropped, single spaces."""
    return " ".join("".join(symbol for symbol in text.lower() if symbol in symbols).split())


def _utterances(settings: FinetuneConfig) -> tuple[list[Utterance], list[Utterance]]:
    corpora = [c.strip() for c in settings.corpora.split(",") if c.strip()]
    chosen = [
        u
        for u in read_manifest(find_manifest(settings.manifest))
        if written(u.text, settings.symbols) and (not corpora or u.corpus in corpora)
    ]
    train, test = ([u for u in chosen if u.split == split] for split in ("train", "test"))
    if not train or not test:
        named = f"corpora={settings.corpora}" if corpora else "any corpus"
        raise ConfigError(f"manifest={settings.manifest}: no text in the splits train and test of {named}")
    require_disjoint(train, test)
    most = settings.max_utterances
    if most:
        train, test = (part[:: -(-len(part) // most)] for part in (train, test))
    return train, test


def _fit(
    net: Recogniser, train: Sequence[Utterance], waves: Waves, settings: FinetuneConfig, say: Callable[[str], None]
) -> None:
    ids = {symbol: i + 1 for i, symbol in enumerate(settings.symbols)}
    targets = [torch.tensor([ids[s] for s in written(u.text, settings.symbols)]) for u in train]
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.lr, betas=(0.9, 0.98))
    warmup = max(1, settings.steps // 10)
    net.train()
    every = max(1, settings.steps // 20)
    for step in track(range(settings.steps), "fine-tuning", transient=True):
        chosen = _draw(train, waves, settings, step)
        wave_BT = nn.utils.rnn.pad_sequence([waves(train[i]) for i in chosen], batch_first=True).to(settings.device)
        lengths_B = torch.tensor([len(waves(train[i])) for i in chosen], device=settings.device)
        rate = min((step + 1) / warmup, (settings.steps - step) / max(1, settings.steps - warmup))
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * rate
        net.model.requires_grad_(step >= settings.frozen_steps)
        log_probs_BFV, frames_B = net(wave_BT, lengths_B, _dropped(net, lengths_B, settings, step))
        goal_B = torch.tensor([len(targets[i]) for i in chosen], device=settings.device)
        flat = torch.cat([targets[i] for i in chosen]).to(settings.device)
        loss = F.ctc_loss(log_probs_BFV.transpose(0, 1), flat, frames_B, goal_B, BLANK, "sum", zero_infinity=True)
        loss = loss / goal_B.sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            say(f"step {step + 1}/{settings.steps}  loss {float(loss.detach()):.3f} per character")


def _draw(train: Sequence[Utterance], waves: Waves, settings: FinetuneConfig, step: int) -> list[int]:
    """Draws the utterances of one update, up to its seconds of audio."""
    order = keyed_rng(settings.seed, step, "utterances").permutation(len(train))
    chosen: list[int] = []
    seconds = 0.0
    for i in order.tolist():
        seconds += len(waves(train[i])) / 16_000
        if chosen and seconds > settings.batch_seconds:
            break
        chosen.append(i)
    return chosen


def _dropped(net: Recogniser, lengths_B: Tensor, settings: FinetuneConfig, step: int) -> Tensor | None:
    """Draws spans of features to set to 0, as SpecAugment does (arXiv 1904.08779)."""
    if not settings.mask_time:
        return None
    frames = net.feature_lengths(lengths_B).tolist()
    dropped_BF = torch.zeros(len(frames), max(frames), dtype=torch.bool)
    rng = keyed_rng(settings.seed, step, "dropped")
    for row, n in enumerate(frames):
        for first in rng.integers(0, max(1, n - 10), int(settings.mask_time * n / 10 + rng.random())).tolist():
            dropped_BF[row, first : first + 10] = True
    return dropped_BF.to(settings.device)


@torch.inference_mode()
def recognise(
    net: Recogniser, train: Sequence[Utterance], test: Sequence[Utterance], waves: Waves, settings: FinetuneConfig
) -> list[Errors]:
    """Decodes `test` greedily, by beam search, and by beam search with an n-gram of the training texts."""
    net.eval()
    references = [written(u.text, settings.symbols) for u in test]
    outputs: list[np.ndarray] = []
    for utterance in track(test, "recognising", transient=True):
        wave_T = waves(utterance).to(settings.device)
        log_probs_BFV, frames_B = net(wave_T[None], torch.tensor([len(wave_T)], device=settings.device))
        outputs.append(log_probs_BFV[0, : int(frames_B[0])].cpu().numpy())
    ids = {symbol: i for i, symbol in enumerate(settings.symbols)}

    def spelled(symbols: Sequence[int]) -> str:
        return "".join(settings.symbols[i] for i in symbols)

    found = [errors("greedy", references, [spelled(greedy(o)) for o in outputs])]
    if settings.beam:
        texts = [spelled(beam_search(o, settings.beam)) for o in outputs]
        found.append(errors(f"beam {settings.beam}", references, texts))
    if settings.beam and settings.ngram:
        model = NGram([[ids[s] for s in written(u.text, settings.symbols)] for u in train], settings.ngram, len(ids))
        texts = [
            spelled(beam_search(o, settings.beam, model, settings.ngram_weight, bonus=settings.ngram_weight))
            for o in outputs
        ]
        found.append(errors(f"beam {settings.beam} + {settings.ngram}-gram", references, texts))
    return found


def errors(decoder: str, references: Sequence[str], texts: Sequence[str]) -> Errors:
    """Returns word and character error rates by jiwer. Raises ValueError where it is not installed."""
    try:
        import jiwer
    except ImportError as error:
        raise ValueError(f"error rates need jiwer: pip install 'auricle[evaluate]' ({error})") from error
    pairs = list(references), list(texts)
    return Errors(decoder, float(jiwer.wer(*pairs)), float(jiwer.cer(*pairs)), len(texts))
