"""One base that serves many tasks at once: rows of a batch go through it together, each with the prompts of its task.

Tasks that train prompts or heads alone leave the base's weights as they are, so that one pass serves all of them. A
task with other weights (LoRA, adapters, biases, all) has a model of its own, through which its rows go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data_pipeline.core.schema import ConfigError, dump, hint
from pretrain.checkpointing.head_choice import checkpoint_with_heads, chosen_device
from pretrain.checkpointing.weights import load_checkpoint
from pretrain.heads.classifier import Classifier
from pretrain.interfaces.frames import EncoderOutput
from pretrain.interfaces.models import SpeechModel
from pretrain.interfaces.objectives import Head
from pretrain.nn.numerics import pad_audio


class Class(NamedTuple):
    """A class of a recording, and its probability among the head's classes."""

    label: str
    probability: float


@dataclass(frozen=True)
class TunedTask:
    """Heads of a tuned run, the number of its model, and its prompts, (L, P, D), if it has any."""

    heads: Mapping[str, Head]
    model: int
    prompts_LPD: Tensor | None


class Tasks:
    """Tuned runs that share the weights of their base where they can.

    Args:
        models: in evaluation mode.
        tasks: by a name of the user's.
    """

    def __init__(self, models: Sequence[SpeechModel], tasks: Mapping[str, TunedTask]) -> None:
        self.models, self.tasks = models, tasks

    @torch.inference_mode()
    def encode(self, waves: Sequence[np.ndarray], tasks: Sequence[str]) -> list[EncoderOutput]:
        """Encodes recordings, each for its task; rows of tasks with the same base and as many prompts are one batch.

        Args:
            waves: (T,) audio at 16 kHz in [-1, 1].
            tasks: the task of each.

        Returns:
            All layers of each recording, (1, F, D).

        Raises:
            ConfigError: there is no such task.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for row, name in enumerate(tasks):
            task = self._task(name)
            count = 0 if task.prompts_LPD is None else task.prompts_LPD.shape[1]
            groups.setdefault((task.model, count), []).append(row)
        found: dict[int, EncoderOutput] = {}
        for (number, count), rows in groups.items():
            encoded = self._batch(number, count, [waves[row] for row in rows], [tasks[row] for row in rows])
            for place, row in enumerate(rows):
                frames = max(1, int(encoded.lengths_B[place]))
                layers = tuple(layer_BFD[place : place + 1, :frames] for layer_BFD in encoded.layers)
                found[row] = EncoderOutput(layers, encoded.lengths_B[place : place + 1], encoded.rate_hz)
        return [found[row] for row in range(len(waves))]

    @torch.inference_mode()
    def classify(self, waves: Sequence[np.ndarray], tasks: Sequence[str]) -> list[Class]:
        """Returns the most probable class of each recording in its task; arguments and errors are those of `encode`.

        Raises:
            ConfigError: a task has no classifier.
        """
        found = []
        for encoded, name in zip(self.encode(waves, tasks), tasks, strict=True):
            head = next((head for head in self._task(name).heads.values() if isinstance(head, Classifier)), None)
            if head is None:
                raise ConfigError(f"task {name}: the run has no head `classifier`; train one with task=classify")
            factor = head.config.scale if head.config.loss == "aam" else 1.0
            probabilities_C = (factor * head.logits(encoded)[0]).softmax(0)
            best = int(probabilities_C.argmax())
            found.append(Class(list(head.ids)[best], float(probabilities_C[best])))
        return found

    def _task(self, name: str) -> TunedTask:
        if name not in self.tasks:
            raise ConfigError(f"task={name}: must be one of {', '.join(self.tasks)}{hint(name, self.tasks)}")
        return self.tasks[name]

    def _batch(self, number: int, count: int, waves: Sequence[np.ndarray], tasks: Sequence[str]) -> EncoderOutput:
        model = self.models[number]
        device = next(model.parameters()).device
        lengths_B = torch.tensor([len(wave) for wave in waves])
        rows = [torch.from_numpy(np.ascontiguousarray(wave, np.float32)) for wave in waves]
        wave_BT = pad_audio(pad_sequence(rows, batch_first=True), model.frontend.least_samples()).to(device)
        frames = model.project(model.extract(wave_BT, lengths_B))
        found = [prompts for name in tasks if (prompts := self.tasks[name].prompts_LPD) is not None]
        encoded: EncoderOutput = model.encoder(frames, prompts_BLPD=torch.stack(found) if count else None)
        return encoded


def open_tasks(runs: Mapping[str, str], device: str = "auto") -> Tasks:
    """Opens tuned runs, or folders of tuned weights, to be used at once.

    Args:
        runs: run folder, checkpoint or folder of tuned weights of each task, by a name of your choice.
        device: torch device; auto: a GPU where there is one.

    Raises:
        ConfigError: there is no such run.
        ValueError: a checkpoint is damaged, or tuned weights belong to another base.
    """
    place = chosen_device(device)
    models: list[SpeechModel] = []
    kinds: list[dict[str, Any]] = []
    tasks: dict[str, TunedTask] = {}
    for name, given in runs.items():
        module, config, _ = load_checkpoint(checkpoint_with_heads(given))
        model = module.model.eval().to(place)
        prompts_LPD = model.encoder.take_prompts()
        kind = {part: dump(getattr(config, part)) for part in ("frontend", "encoder", "engine")}
        same = (n for n, other in enumerate(models) if kinds[n] == kind and _equal(model, other))
        number = next(same, len(models))
        if number == len(models):
            models.append(model)
            kinds.append(kind)
        heads = {key: head.eval().to(place) for key, head in module.heads.items() if isinstance(head, Head)}
        tasks[name] = TunedTask(heads, number, prompts_LPD)
    return Tasks(models, tasks)


def _equal(one: SpeechModel, other: SpeechModel) -> bool:
    """Returns whether two models of the same config have the same weights."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
