"""Voices: a trained synthesis head with its tokenizer, from a run."""

from __future__ import annotations

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
from pretrain.heads.synthesis import Synthesis
from pretrain.interfaces.frames import EncoderOutput, Frames
from pretrain.interfaces.models import SpeechModel
from pretrain.models.synthesis.synthesizer import AS_LEARNED, Controls
from pretrain.models.synthesis.vocoder import griffin_lim
from pretrain.nn.numerics import pad_audio
from pretrain.train_module import TrainModule

SILENT = 1e-4
"""Largest sample of a recording that counts as silent."""


@dataclass(frozen=True)
class Voice:
    """A model in evaluation mode, its synthesis head, and the tokenizer of its texts."""

    model: SpeechModel
    head: Synthesis
    tokenizer: Tokenizer
    name: str
    prompt: EncoderOutput | None = None
    """The encoder's output for the recording whose voice is taken; None: the learned voice."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.head.mel_sha256.device

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
    def mel(self, ids: Sequence[int], controls: Controls = AS_LEARNED) -> Frames:
        """Returns the normalised log-mel frames of a sentence, (1, F, n_mels)."""
        tokens_1N = torch.tensor([list(ids)], dtype=torch.int64, device=self.device)
        return self.head.speak(tokens_1N, self.prompt, controls)

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
            made_T = griffin_lim(self.head.mel, mel.x_BFD[0])
        elif self.head.synthesizer.vocoder is None:
            raise ConfigError("vocoder=istft: the head was trained without one; set vocoder=griffin_lim")
        else:
            made_T = self.head.synthesizer.vocoder(mel.x_BFD, mel.lengths_B)[0]
        return made_T.clamp(-1.0, 1.0).cpu().numpy()

    def speak(self, ids: Sequence[int], controls: Controls = AS_LEARNED, vocoder: str = "istft") -> np.ndarray:
        """Returns (T,) audio at 16 kHz of one sentence's tokens."""
        return self.wave(self.mel(ids, controls), vocoder)


def open_voice(given: str, head: str = "", device: str = "cpu") -> Voice:
    """Loads a run with a synthesis head.

    Args:
        given: run folder (its newest checkpoint) or checkpoint.
        head: name of the head; empty: the only one that speaks.
        device: torch device, or "auto".

    Raises:
        ConfigError: there is no such checkpoint or head, or the tokens or mel frames are not those of training.
        ValueError: the checkpoint is damaged; names the file and the remedy.
    """
    device, folder = chosen_device(device), checkpoint_with_heads(given)
    module, config, _ = load_checkpoint(folder)
    found = voice_of(given, module, config, head)
    require_same_tokens(folder, config, found.head.config.tokens)
    return replace(found, model=found.model.to(device), head=found.head.to(device))


def voice_of(given: str, module: TrainModule, config: Config, head: str = "") -> Voice:
    """Returns the voice of a loaded run, in evaluation mode.

    Args:
        given: the run, for messages.
        module, config: the loaded run.
        head: name of the head; empty: the only one that speaks.

    Raises:
        ConfigError: there is no such head, or the tokens or mel frames are not those of training.
    """
    remedy = "train one with heads.NAME.name=synthesis in `auricle pretrain`"
    name, chosen = chosen_head(given, module, config, kind=Synthesis, head=head, described="that speaks", remedy=remedy)
    chosen.require_same_mel()
    tokens = config.data.tokens[chosen.config.tokens]
    tokenizer = load_tokenizer(tokens)
    if tokenizer.size != chosen.config.vocabulary:
        raise ConfigError(
            f"heads.{name}.vocabulary={chosen.config.vocabulary}: {tokens} has {tokenizer.size} tokens and is not what "
            "the checkpoint was trained with; restore it"
        )
    return Voice(module.model.eval(), chosen.eval(), tokenizer, config.name)
