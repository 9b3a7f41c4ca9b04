"""Recognisers: a trained encoder with a CTC head, from a run or from a model of `auricle finetune`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.schema import load as load_config
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.text.tokenizer import load_tokenizer
from pretrain.checkpointing.head_choice import checkpoint_with_heads, chosen_device, chosen_head
from pretrain.checkpointing.token_sets import require_same_tokens
from pretrain.checkpointing.weights import fill, load_checkpoint
from pretrain.config import Config
from pretrain.heads import ctc, sequence
from pretrain.inference import joint_decoding
from pretrain.inference.ctc_alignment import align
from pretrain.inference.ctc_decoding import beam_search, greedy
from pretrain.inference.joint_decoding import JointConfig
from pretrain.inference.windows import Windows, cut_at_pauses, join_windows
from pretrain.inference.word_lm import WordBeamSearch
from pretrain.interfaces.frames import EncoderOutput
from pretrain.interfaces.models import SpeechModel
from pretrain.nn.numerics import pad_audio
from pretrain.nn.text_targets import BLANK
from pretrain.recognition.config import DecodingConfig
from pretrain.recognition.transcript import Transcript, WordBuilder
from pretrain.train_module import TrainModule, build_speech_model

WORD_BEGIN = "▁"
"""Of byte-pair units, as SentencePiece writes it."""
RESULTS, MODEL = "results.json", "model.safetensors"
"""Files of a model that `auricle finetune` wrote before it wrote runs."""


@dataclass(frozen=True)
class Recogniser:
    """A model in evaluation mode, and the head that gives its symbols."""

    model: SpeechModel
    head: ctc.CTC
    name: str
    step: int = 0
    """Updates of its run."""
    attention: sequence.Sequence | None = None
    """Attention decoder of the same tokens, where the run has one."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.head.parameters()).device

    def silent(self, log_probs_FV: np.ndarray) -> np.ndarray:
        """Returns which frames most probably hold a blank or a space, (F,) bool."""
        spaces = [number + 1 for number, symbol in enumerate(self.head.symbols) if symbol == " "]
        return np.isin(log_probs_FV.argmax(1), [BLANK, *spaces])

    def log_probs(self, wave_T: np.ndarray) -> np.ndarray:
        """Returns ln p of blank and symbols, (F, V) float32, for (T,) audio at 16 kHz; F is 0 for too short audio."""
        return self._encoded(wave_T)[0]

    def joint(self, wave_T: np.ndarray, decoding: JointConfig) -> tuple[np.ndarray, list[int]]:
        """Decodes audio with the attention decoder and CTC.

        Args:
            wave_T: (T,) audio at 16 kHz.
            decoding: beam and weights.

        Returns:
            CTC's ln p as in `log_probs`, and the symbols found.

        Raises:
            ConfigError: the run has no attention decoder for these symbols.
        """
        if self.attention is None:
            raise ConfigError(
                "decoder=joint: the run has no head `sequence` over the tokens of its CTC head; take greedy or beam"
            )
        log_probs_FV, encoded = self._encoded(wave_T)
        if not len(log_probs_FV):
            return log_probs_FV, []
        with torch.inference_mode():
            found = joint_decoding.decode(
                self.attention.decoder,
                self.attention.memories(encoded),
                torch.from_numpy(log_probs_FV),
                vocabulary=len(self.head.symbols),
                seconds=len(wave_T) / SAMPLE_RATE,
                config=decoding,
                text_of=lambda tokens: "".join(self.head.symbols[token] for token in tokens),
            )
        return log_probs_FV, found.tokens

    @torch.inference_mode()
    def _encoded(self, wave_T: np.ndarray) -> tuple[np.ndarray, EncoderOutput]:
        wave_1T = torch.from_numpy(np.ascontiguousarray(wave_T, np.float32))[None].to(self.device)
        length_1 = torch.tensor([wave_1T.shape[1]], device=self.device)
        frames = int(self.model.frontend.frame_lengths(length_1))
        padded_1T = pad_audio(wave_1T, self.model.frontend.least_samples())
        encoded: EncoderOutput = self.model(padded_1T, length_1)
        log_probs_BFV: Tensor = self.head.log_probs(encoded)
        return log_probs_BFV[0, :frames].cpu().numpy(), encoded

    def transcribe(
        self, name: str, blocks: Iterable[np.ndarray], decoding: DecodingConfig, decode: Decode | None = None
    ) -> Transcript:
        """Returns the text of a recording with word times; memory does not grow with its length.

        Args:
            name: of the recording.
            blocks: (T,) audio at 16 kHz in [-1, 1], block by block.
            decoding: decoder and windows.
            decode: the decoder, if it was made before: a language model takes long to load.
        """
        decode = decode or decoder(decoding, self.head.symbols)
        rate_hz, symbols = self.model.shape.rate_hz, self.head.symbols
        windows = Windows.of(rate_hz, SAMPLE_RATE, decoding.window_seconds, decoding.overlap_seconds)
        joint = JointConfig(beam=decoding.beam, ctc_weight=decoding.ctc_weight) if decoding.decoder == "joint" else None
        counted = _Counted(blocks, keep=joint is not None)
        beyond = self.model.frontend.least_samples()
        words, offset = WordBuilder(rate_hz), 0
        parts = join_windows(counted, self.log_probs, windows)
        for piece_FV in cut_at_pauses(parts, windows.window // windows.hop, self.silent):
            length = len(piece_FV)
            if joint is None:
                found = decode(piece_FV)
            else:
                piece_FV, found = self.joint(counted.take(length * windows.hop, beyond), joint)
            for symbol, aligned in zip(found, align(piece_FV, found), strict=True):
                words.add(symbols[symbol], aligned, offset)
            offset += length
            if decoding.lm:  # whole words, without a space after the last one
                words.end_word()
        words.end_word()
        return Transcript(name, counted.samples / SAMPLE_RATE, tuple(words.words))


class _Counted:
    """Passes blocks of audio on and counts their samples."""

    def __init__(self, blocks: Iterable[np.ndarray], keep: bool = False) -> None:
        self._blocks, self._keep, self.samples = blocks, keep, 0
        self._kept: list[np.ndarray] = []

    def __iter__(self) -> Iterator[np.ndarray]:
        for block in self._blocks:
            self.samples += len(block)
            if self._keep:
                self._kept.append(block)
            yield block

    def take(self, samples: int, beyond: int) -> np.ndarray:
        """Returns the next `samples` samples that were passed on and the `beyond` ones after them, and forgets the
        former. A remainder that is not longer is returned whole."""
        kept = np.concatenate(self._kept)
        self._kept = [kept[samples:].copy()]
        return kept if len(kept) <= samples + 2 * beyond else kept[: samples + beyond]


Decode = Callable[[np.ndarray], list[int]]
"""Finds symbols in CTC output: ln p (F, V) of blank (0) and symbol i (class i + 1)."""


def decoder(decoding: DecodingConfig, symbols: Sequence[str]) -> Decode:
    """Returns a decoder for a recogniser's symbols.

    Raises:
        ConfigError: the language model cannot be used.
    """
    if decoding.decoder == "greedy":
        return greedy
    if decoding.lm:  # not with the attention decoder, see DecodingConfig
        return WordBeamSearch(
            decoding.lm, symbols, decoding.beam, decoding.lm_weight, decoding.word_bonus, decoding.words
        )
    return functools.partial(beam_search, beam=decoding.beam)


def open_recogniser(given: str, head: str = "", device: str = "cpu") -> Recogniser:
    """Loads a run with a CTC head, or a model that `auricle finetune` wrote.

    Args:
        given: run folder (its newest checkpoint), checkpoint, or the folder of a fine-tuned model.
        head: name of the head; empty: the only one of the run that recognises.
        device: torch device for the model.

    Raises:
        ConfigError: there is no such checkpoint or head, the run has none that recognises, or its tokens changed.
        ValueError: the checkpoint is damaged; names the file and the remedy.
    """
    path = Path(given).expanduser()
    if (path / RESULTS).is_file() and (path / MODEL).is_file():
        return _opened(*_earlier_finetune(path), path.name, device)
    folder = checkpoint_with_heads(given, f"`auricle finetune checkpoint={given}` trains one")
    module, config, step = load_checkpoint(folder)
    chosen = recognising_head(given, module, config, head)
    if chosen.tokens:
        require_same_tokens(folder, config, chosen.tokens)
    made = _opened(module.model, chosen, config.name, device, step)
    beside = [found for found in module.heads.values() if isinstance(found, sequence.Sequence)]
    fitting = [found for found in beside if found.config.tokens == chosen.tokens]
    return replace(made, attention=fitting[0].eval().to(made.device)) if fitting else made


def recognising_head(given: str, module: TrainModule, config: Config, head: str = "") -> ctc.CTC:
    """Returns the CTC head of a run that writes text, with the names of its symbols.

    Args:
        given: the run, for messages.
        module, config: the loaded run.
        head: name of the head; empty: the only one.

    Raises:
        ConfigError: there is no such head, or several to choose from.
    """
    remedy = f"train one with `auricle finetune checkpoint={given}`, or with heads.NAME.name=ctc in `auricle pretrain`"
    name, chosen = chosen_head(given, module, config, ctc.CTC, head, "that recognises speech", remedy)
    _name_tokens(config, name, chosen)
    return chosen


def _name_tokens(config: Config, name: str, head: ctc.CTC) -> None:
    """Names the tokens of a head that writes tokens of the run. Raises ConfigError for phones, which make no words."""
    if not head.tokens:
        return
    tokenizer = load_tokenizer(config.data.tokens[head.tokens])
    if tokenizer.kind == "phones":
        raise ConfigError(
            f"heads.{name}.tokens={head.tokens}: are phones, of which no words are made; choose another head"
        )
    head.name_tokens(tuple(symbol.replace(WORD_BEGIN, " ") for symbol in tokenizer.symbols))


def _opened(model: SpeechModel, head: ctc.CTC, name: str, device: str, step: int = 0) -> Recogniser:
    device = chosen_device(device)
    return Recogniser(model.eval().to(device), head.eval().to(device), name, step)


class _EarlierModel(nn.Module):
    """Weights by the names in models of an earlier `auricle finetune`."""

    def __init__(self, model: SpeechModel, head: ctc.CTC) -> None:
        super().__init__()
        self.model, self.linear = model, head.linear


def _earlier_finetune(folder: Path) -> tuple[SpeechModel, ctc.CTC]:
    """Loads the model of an earlier `auricle finetune`: results.json with its config, and model.safetensors."""
    try:
        values = json.loads((folder / RESULTS).read_bytes())
        settings, symbols = values["pretrained"], values["finetune"]["symbols"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / RESULTS}: not the results of a fine-tuning ({error})") from None
    if "model_type" in settings:
        raise ConfigError(f"{folder}: fine-tuned from a Hugging Face model by an earlier version; fine-tune it again")
    config = load_config(Config, settings)
    model = build_speech_model(config)
    head = ctc.build(load_config(ctc.Config, {"name": "ctc", "symbols": symbols}), model.shape)
    try:
        weights = load_file(folder / MODEL)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / MODEL}: cannot be read ({error})") from None
    fill(_EarlierModel(model, head), weights, str(folder / MODEL))
    return model, head
