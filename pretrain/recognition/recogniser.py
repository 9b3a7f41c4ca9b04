"""Recognisers: a trained encoder with CTC, a transducer or an attention decoder, from a run or `auricle finetune`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from data_pipeline.core.json_object import read_object
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
from pretrain.inference.joint_decoding import Decoded, JointConfig
from pretrain.inference.streaming_ctc import silent_frames
from pretrain.inference.windows import Windows, cut_at_pauses, cut_at_quiet, join_windows
from pretrain.inference.word_lm import WordBeamSearch
from pretrain.interfaces.decoding import AlignedSymbol, EndPoints
from pretrain.interfaces.frames import EncoderOutput
from pretrain.interfaces.models import SpeechModel
from pretrain.interfaces.objectives import TextHead, WritingHead
from pretrain.nn.numerics import pad_audio
from pretrain.recognition.config import DecodingConfig
from pretrain.recognition.text_decoder import TextDecoder
from pretrain.recognition.transcript import DecodedPart, Transcript, Word, WordBuilder
from pretrain.train_module import TrainModule, build_speech_model

QUIET_SECONDS = 0.1
"""Audio over which power is averaged to find a place to cut."""
WORD_BEGIN = "▁"
"""Mark of byte-pair units that begin a word, as SentencePiece writes it."""
RESULTS, MODEL = "results.json", "model.safetensors"
"""Files of a model that `auricle finetune` wrote before it wrote runs."""


@dataclass(frozen=True)
class Recogniser:
    """A model in evaluation mode, and the head that gives its symbols."""

    model: SpeechModel
    head: WritingHead
    name: str
    step: int = 0
    """Updates of its run."""
    attention: sequence.Sequence | None = None
    """Attention decoder of the same tokens, where the run has one."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.head.parameters()).device

    def frames(self, wave_T: np.ndarray) -> np.ndarray:
        """Returns what the head's decoder reads, (F, …) float32, of (T,) audio at 16 kHz: ln p of blank and symbols of
        CTC. F is 0 for too short audio. Not for an attention decoder alone, which reads no frames one by one."""
        return self._head_frames(*self._encoded(wave_T))

    @torch.inference_mode()
    def _head_frames(self, encoded: EncoderOutput, n_frames: int) -> np.ndarray:
        assert isinstance(self.head, TextHead)
        frames: np.ndarray = self.head.decoder_frames(encoded)[0, :n_frames].cpu().numpy()
        return frames

    def joint(self, wave_T: np.ndarray, decoding: JointConfig) -> tuple[np.ndarray, Decoded]:
        """Decodes audio with the attention decoder and CTC.

        Args:
            wave_T: (T,) audio at 16 kHz.
            decoding: beam and weights.

        Returns:
            CTC's ln p as in `frames`, and the symbols found, with what decoded them.

        Raises:
            ConfigError: the run has no attention decoder for these symbols.
        """
        encoded, n_frames = self._encoded(wave_T)
        log_probs_FV = self._head_frames(encoded, n_frames)
        found = self._searched(encoded, n_frames, torch.from_numpy(log_probs_FV), len(wave_T), decoding)
        return log_probs_FV, found

    def attend(self, wave_T: np.ndarray, decoding: JointConfig) -> Decoded:
        """Decodes audio with the attention decoder alone.

        Args:
            wave_T: (T,) audio at 16 kHz.
            decoding: beam and bonus.

        Raises:
            ConfigError: the run has no attention decoder for these symbols.
        """
        encoded, n_frames = self._encoded(wave_T)
        return self._searched(encoded, n_frames, None, len(wave_T), decoding)

    @torch.inference_mode()
    def _searched(
        self, encoded: EncoderOutput, n_frames: int, log_probs_FV: Tensor | None, samples: int, decoding: JointConfig
    ) -> Decoded:
        if self.attention is None:
            raise ConfigError(
                "decoder=joint or attention: the run has no head `sequence` over the tokens of the head that "
                "recognises; take greedy or beam"
            )
        if n_frames < 1:
            return Decoded([], 0.0, "attention")
        return joint_decoding.decode(
            self.attention.decoder,
            self.attention.memories(encoded),
            log_probs_FV,
            vocabulary=len(self.head.symbols),
            seconds=samples / SAMPLE_RATE,
            config=decoding,
            text_of=lambda tokens: "".join(self.head.symbols[token] for token in tokens),
        )

    @torch.inference_mode()
    def _encoded(self, wave_T: np.ndarray) -> tuple[EncoderOutput, int]:
        """Returns the encoder's output of one recording, and its number of frames."""
        wave_1T = torch.from_numpy(np.ascontiguousarray(wave_T, np.float32))[None].to(self.device)
        length_1 = torch.tensor([wave_1T.shape[1]], device=self.device)
        frames = int(self.model.frontend.frame_lengths(length_1))
        encoded: EncoderOutput = self.model(pad_audio(wave_1T, self.model.frontend.least_samples()), length_1)
        return encoded, frames

    def transcribe(
        self, name: str, blocks: Iterable[np.ndarray], decoding: DecodingConfig, decode: Decode | None = None
    ) -> Transcript:
        """Returns the text of a recording with word times; memory does not grow with its length.

        Args:
            name: of the recording.
            blocks: (T,) audio at 16 kHz in [-1, 1], block by block.
            decoding: decoder and windows.
            decode: the decoder, if it was made before: a language model takes long to load.

        Raises:
            ConfigError: the run has no head for the decoder.
        """
        by_attention = decoding.decoder == "attention"
        if not isinstance(self.head, TextHead) or (by_attention and not self.head.gives_log_probs):
            return self._by_attention(name, blocks, decoding)
        if not self.head.gives_log_probs or decoding.decoder == "rescoring":
            return self._by_segments(name, blocks, decoding)
        decode = decode or decoder(decoding, self.head.symbols)
        rate_hz, symbols = self.model.shape.rate_hz, self.head.symbols
        windows = Windows.of(rate_hz, SAMPLE_RATE, decoding.window_seconds, decoding.overlap_seconds)
        joint = attention_search(decoding) if by_attention or decoding.decoder == "joint" else None
        counted = _Counted(blocks, keep=joint is not None)
        beyond = self.model.frontend.least_samples()
        words, decoded_parts, offset = WordBuilder(rate_hz), list[DecodedPart](), 0
        parts = join_windows(counted, self.frames, windows)
        silent = functools.partial(silent_frames, symbols)
        for piece_FV in cut_at_pauses(parts, windows.window // windows.hop, silent):
            length = len(piece_FV)
            if joint is None:
                aligned_symbols = align(piece_FV, found := decode(piece_FV))
            else:
                piece_FV, decoded = self.joint(counted.take(length * windows.hop, beyond), joint)
                found = decoded.tokens
                fits = ctc.frames_needed(found) <= len(piece_FV)  # attention alone may write more than CTC could
                aligned_symbols = align(piece_FV, found) if fits else _spread(decoded, length, joint)
                decoded_parts.append(DecodedPart(offset / rate_hz, (offset + length) / rate_hz, decoded.by))
            for symbol, aligned in zip(found, aligned_symbols, strict=True):
                words.add(symbols[symbol], aligned, offset)
            offset += length
            if decoding.lm:  # whole words, without a space after the last one
                words.end_word()
        words.end_word()
        return Transcript(name, counted.samples / SAMPLE_RATE, tuple(words.words), tuple(decoded_parts))

    def _by_attention(self, name: str, blocks: Iterable[np.ndarray], decoding: DecodingConfig) -> Transcript:
        """Decodes a recording with the attention decoder alone, in pieces of at most a window that are cut where it is
        quiet. The symbols of a piece share its time equally, since nothing aligns them."""
        if decoding.lm or decoding.decoder in ("joint", "rescoring"):
            field = f"lm={decoding.lm}" if decoding.lm else f"decoder={decoding.decoder}"
            raise ConfigError(
                f"{field}: the run has an attention decoder alone, without CTC or a transducer; take greedy, beam or "
                "attention, without lm"
            )
        longest, searched = (round(s * SAMPLE_RATE) for s in (decoding.window_seconds, decoding.overlap_seconds))
        words, parts, offset, search = WordBuilder(SAMPLE_RATE), list[DecodedPart](), 0, attention_search(decoding)
        for piece_T in cut_at_quiet(blocks, longest, searched, round(QUIET_SECONDS * SAMPLE_RATE)):
            found, length = self.attend(piece_T, search), len(piece_T)
            for symbol, aligned in zip(found.tokens, _spread(found, length, search), strict=True):
                words.add(self.head.symbols[symbol], aligned, offset)
            words.end_word()
            parts.append(DecodedPart(offset / SAMPLE_RATE, (offset + length) / SAMPLE_RATE, found.by))
            offset += length
        return Transcript(name, offset / SAMPLE_RATE, tuple(words.words), tuple(parts))

    def text_decoder(self, decoding: DecodingConfig, end_points: EndPoints) -> TextDecoder:
        """Returns a decoder of the head's frames, segment by segment.

        Args:
            decoding: decoder and beam.
            end_points: when segments end.

        Raises:
            ConfigError: the run has no head for it, or it decodes neither streams nor transducers.
        """
        if not isinstance(self.head, TextHead):
            raise ConfigError(
                f"head `sequence` of {self.name}: an attention decoder alone needs the whole of a segment and decodes "
                "no streams; train a CTC head or a transducer beside it"
            )
        if decoding.lm or decoding.decoder in ("joint", "attention"):
            field = f"lm={decoding.lm}" if decoding.lm else f"decoder={decoding.decoder}"
            raise ConfigError(
                f"{field}: decodes whole recordings by a CTC head alone; for streams and transducers take greedy, beam "
                "or rescoring, without lm"
            )
        return TextDecoder(self.head, self.attention, self.model.shape.rate_hz, decoding, end_points)

    def _by_segments(self, name: str, blocks: Iterable[np.ndarray], decoding: DecodingConfig) -> Transcript:
        """Decodes a recording like a stream that is cut only where a segment is longer than a window."""
        rate_hz, never = self.model.shape.rate_hz, math.inf
        windows = Windows.of(rate_hz, SAMPLE_RATE, decoding.window_seconds, decoding.overlap_seconds)
        text_decoder = self.text_decoder(decoding, EndPoints(never, never, decoding.window_seconds))

        def compute(wave_T: np.ndarray) -> np.ndarray:
            encoded, n_frames = self._encoded(wave_T)
            return text_decoder.read(encoded)[0, :n_frames]

        counted, state, words = _Counted(blocks), text_decoder.start(), list[Word]()
        for part_FX in join_windows(counted, compute, windows):
            state, found, _ = text_decoder.push(state, part_FX)
            words += found
        words += text_decoder.finish(state)[1]
        return Transcript(name, counted.samples / SAMPLE_RATE, tuple(words))


def _spread(found: Decoded, length: int, search: JointConfig) -> list[AlignedSymbol]:
    """Returns equal parts of `length` for the symbols that attention alone found; log_prob: the mean of all."""
    n = len(found.tokens)
    log_prob = (found.score - search.bonus * n) / (n + 1)
    starts = [number * length // n for number in range(n)]
    stops = [(number + 1) * length // n for number in range(n)]
    return [AlignedSymbol(start, max(stop, start + 1), log_prob) for start, stop in zip(starts, stops, strict=True)]


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
            decoding.lm,
            symbols,
            beam=decoding.beam,
            weight=decoding.lm_weight,
            bonus=decoding.word_bonus,
            words=decoding.words,
        )
    return functools.partial(beam_search, beam=decoding.beam)


def attention_search(decoding: DecodingConfig) -> JointConfig:
    """Returns the search of an attention decoder: with CTC for decoder=joint, else without; greedy keeps one text."""
    return JointConfig(
        beam=1 if decoding.decoder == "greedy" else decoding.beam,
        ctc_weight=decoding.ctc_weight if decoding.decoder == "joint" else 0.0,
        bonus=decoding.token_bonus,
    )


def open_recogniser(given: str, head: str = "", device: str = "cpu") -> Recogniser:
    """Loads a run with a head that writes text, or a model that `auricle finetune` wrote.

    Args:
        given: run folder (its newest checkpoint), checkpoint, or the folder of a fine-tuned model.
        head: name of the head; empty: the only CTC head of the run, or else its only transducer, or else its only
            attention decoder.
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
    chosen = _writing_head(given, module, config, head)
    if chosen.tokens:
        require_same_tokens(folder, config, chosen.tokens)
    made = _opened(module.model, chosen, config.name, device, step)
    if isinstance(chosen, sequence.Sequence):
        return replace(made, attention=chosen)
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
    name, chosen = chosen_head(
        given, module, config, kind=ctc.CTC, head=head, described="that recognises speech", remedy=remedy
    )
    _name_tokens(config, name, chosen)
    return chosen


def _writing_head(given: str, module: TrainModule, config: Config, head: str) -> WritingHead:
    """Returns the head of that name; where it is empty, the only CTC head, the only other head that writes frame by
    frame, or the only attention decoder: the first of these kinds that the run has."""
    found = dict(module.heads.items())
    eligible = [found[head]] if head in found else list(found.values())
    kinds: tuple[type[WritingHead], ...] = (TextHead, sequence.Sequence)
    kind = next((kind for kind in kinds if any(isinstance(kept, kind) for kept in eligible)), None)
    if kind is None or any(isinstance(kept, ctc.CTC) for kept in eligible):
        return recognising_head(given, module, config, head)
    name, chosen = chosen_head(
        given, module, config, kind=kind, head=head, described="that recognises speech", remedy=""
    )
    _name_tokens(config, name, chosen)
    return chosen


def _name_tokens(config: Config, name: str, head: WritingHead) -> None:
    """Names the tokens of a head that writes tokens of the run. Raises ConfigError for phones, which make no words."""
    if not head.tokens:
        return
    tokenizer = load_tokenizer(config.data.tokens[head.tokens])
    if tokenizer.kind == "phones":
        raise ConfigError(
            f"heads.{name}.tokens={head.tokens}: are phones, of which no words are made; choose another head"
        )
    head.name_tokens(tuple(symbol.replace(WORD_BEGIN, " ") for symbol in tokenizer.symbols))


def _opened(model: SpeechModel, head: WritingHead, name: str, device: str, step: int = 0) -> Recogniser:
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
        values = read_object(folder / RESULTS)
        settings, symbols = values["pretrained"], values["finetune"]["symbols"]
    except (ValueError, KeyError, TypeError) as error:
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
