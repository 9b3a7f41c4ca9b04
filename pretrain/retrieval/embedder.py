"""Vectors of recordings, texts and images, by the joint embedding of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import IMAGE, Batch, Images
from data_pipeline.images import decoding
from data_pipeline.labels.store import pad
from data_pipeline.loader.pieces import Piece
from data_pipeline.loader.recordings import Unusable
from data_pipeline.text.tokenizer import Tokenizer, load_tokenizer
from pretrain.checkpointing.head_choice import checkpoint_with_heads, chosen_device, chosen_head
from pretrain.checkpointing.stored import read_state
from pretrain.checkpointing.weights import MODEL, load_checkpoint
from pretrain.config import Config
from pretrain.heads.joint_embedding import SPEECH, JointEmbedding
from pretrain.heads.joint_embedding import Config as HeadConfig
from pretrain.interfaces.models import SpeechModel
from pretrain.nn.numerics import pad_audio
from pretrain.retrieval.vectors import Vectors, VectorTable


@dataclass(frozen=True)
class TowerInput:
    """A tower of the head, and what prepares its input. tokenizer: of a tower for texts.  image: side and channels."""

    name: str
    tokenizer: Tokenizer | None = None
    tokens: str = ""
    image: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Embedder:
    """A model in evaluation mode, its head, and the towers by kind of input."""

    model: SpeechModel
    head: JointEmbedding
    towers: dict[str, TowerInput]
    name: str
    """sha256 of the weights and name of the head."""
    title: str
    """Name of the run and its updates."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.head.parameters()).device

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of input that have a tower."""
        return (SPEECH, *self.towers)

    def table(
        self,
        found: Iterable[Piece | Unusable],
        batch: int,
        reject: Callable[[Unusable], None],
        done: Callable[[], None],
    ) -> VectorTable:
        """Embeds pieces, in their order.

        Args:
            found: the pieces.
            batch: pieces that are computed together, of one kind.
            reject: receives what cannot be embedded.
            done: called after each piece.
        """
        rows: list[tuple[str, str, str]] = []  # without their content, which can be large
        vectors: dict[int, Vectors] = {}
        waiting: dict[str, list[tuple[int, object]]] = {}

        def compute(kind: str) -> None:
            numbered = waiting.pop(kind)
            made = self._embed(kind, [value for _, value in numbered])
            vectors.update({number: vector for (number, _), vector in zip(numbered, made, strict=True)})

        for piece in found:
            done()
            if isinstance(piece, Unusable):
                reject(piece)
                continue
            ready = self._prepared(piece)
            if isinstance(ready, Unusable):
                reject(ready)
                continue
            waiting.setdefault(piece.kind, []).append((len(rows), ready))
            rows.append((piece.kind, piece.name, piece.place))
            if len(waiting[piece.kind]) >= batch:
                compute(piece.kind)
        for kind in list(waiting):
            compute(kind)
        stacked = [vectors[number] for number in range(len(rows))]
        vectors_NE = np.stack(stacked) if rows else np.zeros((0, self._width), np.float32)
        kinds, names, places = zip(*rows, strict=True) if rows else ((), (), ())
        return VectorTable(self.name, kinds, names, places, vectors_NE)

    @property
    def _width(self) -> int:
        return self.head.config.embedding_dim

    def _prepared(self, piece: Piece) -> object | Unusable:
        """Returns the audio, tokens or pixels of a piece, or why it has none."""
        if piece.kind == SPEECH:
            assert piece.wave is not None
            length = torch.tensor([len(piece.wave)])
            if int(self.model.frontend.frame_lengths(length)) < 1:
                return Unusable(piece.name, "too_short", "is too short for a single frame")
            return piece.wave
        tower = self.towers.get(piece.kind)
        if tower is None:
            return Unusable(
                piece.name, "no_tower", f"the run has no tower for {piece.kind}, only {', '.join(self.kinds)}"
            )
        if tower.tokenizer is None:
            try:
                return decoding.pixels(decoding.decode(piece.image), *tower.image)
            except decoding.ImageError as error:
                return Unusable(piece.name, error.reason, str(error))
        ids = np.array(tower.tokenizer.encode(piece.text), np.int64)
        if not self._present(tower, ids):
            return Unusable(piece.name, "no_tokens", "has no token of the run, or too many")
        return ids

    def _present(self, tower: TowerInput, value: object) -> bool:
        data = self._batch_of(tower, [value])
        column = self.head.kinds.index(tower.name)
        return bool(self.head.present(data, data.lengths_B)[:, column].all())

    @torch.inference_mode()
    def _embed(self, kind: str, values: Sequence[object]) -> Vectors:
        if kind == SPEECH:
            made = self._speech([np.asarray(value, np.float32) for value in values])
        else:
            made = self.head.embed(self.towers[kind].name, self._batch_of(self.towers[kind], values))
        return made.float().cpu().numpy()

    def _speech(self, waves: Sequence[np.ndarray]) -> Tensor:
        lengths_B = torch.tensor([len(wave) for wave in waves])
        wave_BT = torch.zeros(len(waves), int(lengths_B.max()))
        for row, wave in zip(wave_BT, waves, strict=True):
            row[: len(wave)] = torch.from_numpy(wave)
        wave_BT = pad_audio(wave_BT.to(self.device), self.model.frontend.least_samples())
        return self.head.embed_speech(self.model(wave_BT, lengths_B))

    def _batch_of(self, tower: TowerInput, values: Sequence[object]) -> Batch:
        """Returns tokens (N,) or pixels (C, H, W) as a batch without audio."""
        rows = len(values)
        data = Batch(torch.zeros(rows, 0), torch.zeros(rows, dtype=torch.int64), ("",) * rows, 0)
        if tower.tokenizer is not None:
            tokens = {tower.tokens: torch.from_numpy(pad([np.asarray(value) for value in values]))}
            data = Batch(data.wave_BT, data.lengths_B, data.keys, 0, tokens=tokens)
        else:
            pixels_BCHW = torch.from_numpy(np.stack([np.asarray(value) for value in values]))
            images = {IMAGE: Images(pixels_BCHW, torch.ones(rows, dtype=torch.bool))}
            data = Batch(data.wave_BT, data.lengths_B, data.keys, 0, images=images)
        return data.to(str(self.device))


def open_embedder(given: str, head: str = "", device: str = "cpu") -> Embedder:
    """Loads a run with a head `joint_embedding`.

    Args:
        given: run folder (its newest checkpoint) or checkpoint.
        head: name of the head; empty: the only one of its kind.
        device: torch device for the model, or "auto".

    Raises:
        ConfigError: there is no such checkpoint, or it has no such head.
        ValueError: the checkpoint is damaged; names the file and the remedy.
    """
    device, folder = chosen_device(device), checkpoint_with_heads(given)
    module, config, step = load_checkpoint(folder)
    remedy = "train one, for example with `auricle pretrain +experiment=joint_embedding_tiny`"
    name, chosen = chosen_head(
        given, module, config, kind=JointEmbedding, head=head, described="joint_embedding", remedy=remedy
    )
    weights: str = read_state(folder)["sha256"][MODEL]
    return Embedder(
        module.model.eval().to(device),
        chosen.eval().to(device),
        _towers(config, chosen.config),
        name=f"{weights} {name}",
        title=f"{config.name} (step {step})",
    )


def _towers(config: Config, head: HeadConfig) -> dict[str, TowerInput]:
    """Returns the towers for texts and images by the kind of piece; the first one of each."""
    found: dict[str, TowerInput] = {}
    for name, tower in sorted(head.towers.items()):
        for tokens in tower.embedding.needed_tokens:
            if tokens not in config.data.tokens:
                raise ConfigError(f"data.tokens.{tokens}: the run's config names no folder, so texts have no tokens")
            found.setdefault("text", TowerInput(name, load_tokenizer(config.data.tokens[tokens]), tokens))
        if any(tower.embedding.image_shape):
            found.setdefault("image", TowerInput(name, image=tower.embedding.image_shape))
    return found
