"""Voices: a trained head that speaks, with its tokenizer, from a run."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.text.tokenizer import Tokenizer, load_tokenizer
from pretrain.checkpointing.head_choice import checkpoint_with_heads, chosen_device, chosen_head
from pretrain.checkpointing.token_sets import require_same_tokens
from pretrain.checkpointing.weights import load_checkpoint
from pretrain.config import Config
from pretrain.generation.units import unit_frames
from pretrain.heads.synthesis import Synthesis
from pretrain.heads.units import Units
from pretrain.inference.sampling import Sampling
from pretrain.interfaces.frames import EncoderOutput, Frames
from pretrain.interfaces.models import SpeechModel
from pretrain.models.synthesis.style import words_of
from pretrain.models.synthesis.synthesizer import AS_DRAWN, AS_LEARNED, DECIBEL, Controls, Drawing
from pretrain.models.synthesis.unit_audio import UnitAudio
from pretrain.models.synthesis.vocoder import ISTFTVocoder, griffin_lim
from pretrain.nn.numerics import pad_audio
from pretrain.nn.spectral import LogMel
from pretrain.train_module import TrainModule

SILENT = 1e-4
"""Largest sample of a recording that counts as silent."""
DRAWN = Sampling()
"""How units are drawn."""


@dataclass(frozen=True)
class Speaker:
    """A model in evaluation mode with a head that speaks, and the tokenizer of its texts."""

    model: SpeechModel
    tokenizer: Tokenizer
    name: str
    prompt: EncoderOutput | None = None
    """The encoder's output for the recording whose voice is taken; None: the learned voice."""

    @property
    @abstractmethod
    def log_mel(self) -> LogMel:
        """Definition of the mel frames."""

    @property
    @abstractmethod
    def vocoder(self) -> ISTFTVocoder | None:
        """The trained vocoder, if there is one."""

    @property
    @abstractmethod
    def has_pitch(self) -> bool:
        """Whether `Controls.pitch` changes anything."""

    @abstractmethod
    def mel(self, ids: Sequence[int], controls: Controls = AS_LEARNED) -> Frames:
        """Returns the normalised log-mel frames of a sentence, (1, F, n_mels)."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.log_mel.filters.device

    @torch.inference_mode()
    def encode(self, wave_T: np.ndarray) -> EncoderOutput:
        """Returns the encoder's output for a recording of the wanted voice, (T,) at 16 kHz.

        Raises:
            ConfigError: it is shorter than a second, or silent.
        """
        if len(wave_T) < SAMPLE_RATE:
            raise ConfigError(
                f"voice: has {len(wave_T) / SAMPLE_RATE:.2f} s, and a second or more is needed (3 are good)"
            )
        if not np.abs(wave_T).max() > SILENT:
            raise ConfigError("voice: is silent; give a recording of speech")
        wave_1T = torch.from_numpy(np.ascontiguousarray(wave_T, np.float32))[None].to(self.device)
        length_1 = torch.tensor([wave_1T.shape[1]], device=self.device)
        encoded: EncoderOutput = self.model(pad_audio(wave_1T, self.model.frontend.least_samples()), length_1)
        return encoded

    @torch.inference_mode()
    def wave(self, mel: Frames, vocoder: str = "istft") -> np.ndarray:
        """Returns (T,) audio at 16 kHz of mel frames of one row.

        Args:
            mel: normalised log-mel frames.
            vocoder: "istft", or "griffin_lim".

        Raises:
            ConfigError: the head has no vocoder.
        """
        if vocoder == "griffin_lim":
            made_T = griffin_lim(self.log_mel, mel.x_BFD[0])
        elif self.vocoder is None:
            raise ConfigError("vocoder=istft: the head was trained without one; set vocoder=griffin_lim")
        else:
            made_T = self.vocoder(mel.x_BFD, mel.lengths_B)[0]
        return made_T.clamp(-1.0, 1.0).cpu().numpy()

    def speak(self, ids: Sequence[int], controls: Controls = AS_LEARNED, vocoder: str = "istft") -> np.ndarray:
        """Returns (T,) audio at 16 kHz of one sentence's tokens."""
        return self.wave(self.mel(ids, controls), vocoder)


@dataclass(frozen=True, kw_only=True)
class Voice(Speaker):
    """A voice by the head `synthesis`, without recursion."""

    head: Synthesis
    drawing: Drawing = AS_DRAWN
    """How mel frames are drawn, with decoder=flow."""
    words: tuple[int, ...] = ()
    """The words of the style."""

    @property
    def log_mel(self) -> LogMel:
        return self.head.mel

    @property
    def vocoder(self) -> ISTFTVocoder | None:
        return self.head.synthesizer.vocoder

    @property
    def has_pitch(self) -> bool:
        return bool(self.head.config.pitch)

    def styled(self, style: str) -> Voice:
        """Returns the voice in the style of words, such as "a child, slow and high".

        Raises:
            ConfigError: a word is not known, or the head was trained without words.
        """
        if self.head.words is None:
            raise ConfigError(f"style={style!r}: the head was trained without style_words; leave it out")
        return replace(self, words=words_of(style))

    @torch.inference_mode()
    def mel(self, ids: Sequence[int], controls: Controls = AS_LEARNED) -> Frames:
        tokens_1N = torch.tensor([list(ids)], dtype=torch.int64, device=self.device)
        return self.head.speak(tokens_1N, self.prompt, controls, self.drawing, self.words)


@dataclass(frozen=True, kw_only=True)
class UnitVoice(Speaker):
    """A voice by the head `units`: units are drawn one by one."""

    head: Units
    audio: UnitAudio
    sampling: Sampling = DRAWN

    @property
    def log_mel(self) -> LogMel:
        return self.audio.mel

    @property
    def vocoder(self) -> ISTFTVocoder | None:
        return self.audio.vocoder

    @property
    def has_pitch(self) -> bool:
        return False

    @torch.inference_mode()
    def mel(self, ids: Sequence[int], controls: Controls = AS_LEARNED) -> Frames:
        """Returns the normalised log-mel frames of a sentence, (1, F, n_mels).

        Raises:
            ConfigError: the sentence is longer than those of training.
            NoEndError: the end of the units was not drawn.
        """
        made = self.mel_of(unit_frames(self.head, ids, self.prompt, self.sampling, controls.speed))
        return made._replace(x_BFD=made.x_BFD + controls.energy * DECIBEL)

    @torch.inference_mode()
    def mel_of(self, levels: Sequence[Sequence[int]]) -> Frames:
        """Returns the normalised log-mel frames, (1, F, n_mels), of frame labels of each level."""
        rows = [torch.tensor([list(labels)], dtype=torch.int64, device=self.device) for labels in levels]
        frames = max(1, round(rows[0].shape[1] * self.audio.mel.rate_hz / self.audio.rate_hz))
        prompt = self.head.no_prompt(1) if self.prompt is None else self.head.prompt_of(self.prompt)
        mel_1FD, _ = self.audio(rows, prompt, frames)
        return Frames(mel_1FD, torch.tensor([frames], device=self.device), 100.0)


def open_voice(given: str, head: str = "", device: str = "cpu") -> Voice:
    """Loads a run with the head `synthesis`; arguments and errors as of `open_speaker`."""
    found = open_speaker(given, head, device, kinds=(Synthesis,))
    assert isinstance(found, Voice)
    return found


def open_speaker(
    given: str, head: str = "", device: str = "cpu", kinds: tuple[type[Synthesis | Units], ...] = (Synthesis, Units)
) -> Voice | UnitVoice:
    """Loads a run with a head that speaks.

    Args:
        given: run folder (its newest checkpoint) or checkpoint.
        head: name of the head; empty: the only one of the first kind that the run has.
        device: torch device, or "auto".
        kinds: kinds of heads.

    Raises:
        ConfigError: there is no such checkpoint or head, or the tokens or mel frames are not those of training.
        ValueError: the checkpoint is damaged; names the file and the remedy.
    """
    device, folder = chosen_device(device), checkpoint_with_heads(given)
    module, config, _ = load_checkpoint(folder)
    found = voice_of(given, module, config, head, kinds)
    require_same_tokens(folder, config, found.head.config.tokens)
    found.model.to(device)
    found.head.to(device)
    return found


def voice_of(
    given: str,
    module: TrainModule,
    config: Config,
    head: str = "",
    kinds: tuple[type[Synthesis | Units], ...] = (Synthesis, Units),
) -> Voice | UnitVoice:
    """Returns the voice of a loaded run, in evaluation mode.

    Args:
        given: the run, for messages.
        module, config: the loaded run.
        head: name of the head; empty: the only one of the first kind that the run has.
        kinds: kinds of heads.

    Raises:
        ConfigError: there is no such head, or the tokens or mel frames are not those of training.
    """
    remedy = "train one with heads.NAME.name=synthesis in `auricle pretrain`"
    found = [module.heads[head]] if head in module.heads else list(module.heads.values())
    kind = next((kind for kind in kinds if any(isinstance(one, kind) for one in found)), kinds[0])
    name, chosen = chosen_head(given, module, config, kind=kind, head=head, described="that speaks", remedy=remedy)
    audio = chosen.audio if isinstance(chosen, Units) else None
    if isinstance(chosen, Units) and audio is None:
        reads = "" if chosen.config.speaks else ", and writes text"
        raise ConfigError(
            f"checkpoint={given}: head {name} makes no audio of its units{reads}; train it with "
            f"heads.{name}.audio={{}} and direction=text_to_units"
        )
    tokens = config.data.tokens[chosen.config.tokens]
    tokenizer = load_tokenizer(tokens)
    if tokenizer.size != chosen.config.vocabulary:
        raise ConfigError(
            f"heads.{name}.vocabulary={chosen.config.vocabulary}: {tokens} has {tokenizer.size} tokens and is not what "
            "the checkpoint was trained with; restore it"
        )
    model = module.model.eval()
    if isinstance(chosen, Synthesis):
        chosen.require_same_mel()
        return Voice(model, tokenizer, config.name, head=chosen.eval())
    assert audio is not None
    audio.require_same_mel()
    return UnitVoice(model, tokenizer, config.name, head=chosen.eval(), audio=audio.eval())
