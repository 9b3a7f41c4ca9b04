"""Records exchanged by the stages of the data pipeline. They are frozen; times are integer numbers of samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:  # preprocessing workers start faster without torch
    from torch import Tensor

SAMPLE_RATE = 16_000
"""Hz. All shards and all models use this rate."""


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a recording that the corpus marks; it becomes a separate segment."""

    start: int
    """First sample, at the output rate, like `stop`."""
    stop: int | None
    """None: to the end of the recording."""
    speaker: str = ""
    text: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    language: str = ""
    """Set if it differs from the recording's, like `split`."""
    split: str = ""
    channel: int | None = None
    """The channel to use, from 0; None: the mean of all."""
    row: int = 0
    """Row of the table that names it, from 1; 0 without a table."""
    image: str = ""
    """Path or URL of an image of it; "" without one."""


@dataclass(frozen=True, slots=True)
class AudioFile:
    """One recording of a corpus, as discovered, before decoding."""

    path: str
    """Local path or fsspec URL."""
    file_id: str
    """Unique inside the corpus and stable between machines (the path below the corpus root)."""
    corpus: str
    speaker: str = ""
    language: str = ""
    text: str = ""
    split: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    """Duration in seconds according to the corpus; 0 if unknown."""
    size: int = 0
    """Bytes of the file."""
    mtime: str = ""
    """Time of the last change, from the file system (an ETag on object stores)."""
    spans: tuple[Span, ...] = ()
    """The parts to use, sorted by start, possibly overlapping. Empty: the whole recording."""
    image: str = ""
    """Path or URL of an image of it; "" without one."""
    part: tuple[int, int | None] | None = None
    """(begin, end) in seconds of a part of a long recording, which counts as a recording; end None: to its end."""

    @property
    def source_id(self) -> str:
        """`file_id` of the whole recording."""
        return self.file_id if self.part is None else self.file_id.removesuffix(part_suffix(self.part))


def part_suffix(part: tuple[int, int | None]) -> str:
    """Returns the end of the `file_id` of a part of a recording: a media fragment, such as #t=1800,3600."""
    begin, end = part
    return f"#t={begin}" if end is None else f"#t={begin},{end}"


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of one recording, in samples of the output rate; becomes one sample of a shard."""

    key: str
    """Unique in the data set; no dots, since a dot ends the key in WebDataset."""
    file_id: str
    start: int
    length: int
    sample_rate: int
    corpus: str
    speaker: str = ""
    language: str = ""
    text: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cursor:
    """Position of a reader. `step` counts the global steps of `epoch` already consumed."""

    plan_hash: str
    epoch: int
    step: int


class Images(NamedTuple):
    """One image per sample.  pixels_BCHW: uint8.  present_B: bool, False for samples without one; theirs is black."""

    pixels_BCHW: Tensor
    present_B: Tensor


LINE = "line of {}"
"""Name in `Batch.tokens` of the tokens of lines, given the name of these tokens in `data.tokens`."""

IMAGE = "image"
"""Name in `Batch.images` of the images that shards hold."""

WAY, PART = "way", "part"
"""Names in `Batch.labels` of an episode: the class of each row, "0", "1" …, and `SUPPORT` or `QUERY`."""
SUPPORT, QUERY = "support", "query"


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch.

    wave_BT: float32 in [-1, 1], zero after each sample's length.  lengths_B: int64 samples, always on the host: they
    decide about shapes, and reading them from a GPU would make the host wait for it.
    micro_batch: its number in the global step, 0 … V-1; with (seed, step) it keys draws that belong to no single
    sample (dropout), so that they do not depend on the number of ranks.
    targets: frame labels by name, (B, F) int64, padded with -1.  labels: per-sample metadata by name: `data.labels` in
    their order, then speaker, language and corpus where the shards' index has them.
    """

    wave_BT: Tensor
    lengths_B: Tensor
    keys: tuple[str, ...]
    micro_batch: int
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    """Tokens of texts by their name in `data.tokens`, (B, N) int64, padded with -1; a row without text, or with only a
    part of its segment, is all -1. Always on the host."""
    images: Mapping[str, Images] = field(default_factory=dict)
    """Images by name. Always on the host."""
    sources_BST: Tensor | None = None
    """Clean parts of each row of `wave_BT`, where `data.sources` keeps them. A part that is not there is silent; all
    are where a row was to be mixed and no partner was found."""

    def to(self, device: str) -> Batch:
        """Returns the batch with audio and targets on `device`; lengths, tokens and images are read on the host."""
        targets = {name: tensor.to(device, non_blocking=True) for name, tensor in self.targets.items()}
        wave_BT = self.wave_BT.to(device, non_blocking=True)
        sources_BST = None if self.sources_BST is None else self.sources_BST.to(device, non_blocking=True)
        rest = (self.labels, self.tokens, self.images, sources_BST)
        return Batch(wave_BT, self.lengths_B, self.keys, self.micro_batch, targets, *rest)

    def label_values(self, name: str) -> tuple[str, ...]:
        """Returns the label of each sample; "" for samples, or a whole batch, without it."""
        return self.labels.get(name, ("",) * len(self.keys))

    def token_rows(self, name: str) -> Tensor:
        """Returns the tokens of each sample, (B, N) int64, padded with -1; N is 0 for a whole batch without them."""
        found = self.tokens.get(name)
        return self.lengths_B.new_full((len(self.keys), 0), -1) if found is None else found

    def line_rows(self, name: str) -> Tensor:
        """Returns the tokens of a line of `data.lines` for each sample, as `token_rows` does; N is 0 without lines."""
        return self.token_rows(LINE.format(name))

    @property
    def has_lines(self) -> bool:
        """Whether samples come with lines of `data.lines`."""
        return any(LINE.format(name) in self.tokens for name in self.tokens)

    def take(self, rows: Sequence[int]) -> Batch:
        """Returns some rows as a batch, without the padding that they do not need."""
        index_N = self.lengths_B.new_tensor(list(rows))
        longest = int(self.lengths_B[index_N].max()) if len(rows) else 0
        there_N = index_N.to(self.wave_BT.device)
        return replace(
            self,
            wave_BT=self.wave_BT[there_N, :longest],
            lengths_B=self.lengths_B[index_N],
            keys=tuple(self.keys[row] for row in rows),
            targets={name: target[there_N] for name, target in self.targets.items()},
            labels={name: tuple(values[row] for row in rows) for name, values in self.labels.items()},
            tokens={name: ids[index_N] for name, ids in self.tokens.items()},
            images={name: Images(*(part[index_N] for part in images)) for name, images in self.images.items()},
            sources_BST=None if self.sources_BST is None else self.sources_BST[there_N, :, :longest],
        )

    @property
    def is_empty(self) -> bool:
        """Whether it is one of `emptied`."""
        return not any(self.keys)

    def emptied(self, micro_batch: int) -> Batch:
        """Returns a batch of one row without audio, labels and targets, which adds nothing to any sum.

        Ranks that do not divide the micro-batches fill their last round with it: each rank has to run the same number
        of forward and backward passes.
        """
        return replace(
            self,
            wave_BT=self.wave_BT.new_zeros(1, 0),
            lengths_B=self.lengths_B.new_zeros(1),
            keys=("",),
            micro_batch=micro_batch,
            targets={name: target.new_full((1, 0), -1) for name, target in self.targets.items()},
            tokens={name: ids.new_full((1, 0), -1) for name, ids in self.tokens.items()},
            images={
                name: Images(
                    images.pixels_BCHW.new_zeros(1, *images.pixels_BCHW.shape[1:]), images.present_B.new_zeros(1)
                )
                for name, images in self.images.items()
            },
            labels=dict.fromkeys(self.labels, ("",)),
            sources_BST=None
            if self.sources_BST is None
            else self.sources_BST.new_zeros(1, self.sources_BST.shape[1], 0),
        )


@dataclass(frozen=True, slots=True)
class Step:
    """One rank's part of a global step: its micro-batches in accumulation order."""

    batches: tuple[Batch, ...]
    samples: int
    """Unpadded audio samples of the whole global step, over all ranks."""
    padded_samples: int
    """The same with padding."""
    after: Cursor
    """The cursor to save after this step."""
    skipped: int = 0
    """Segments of this rank that were skipped because their shard is bad (only with on_bad_shard=skip)."""


class StepReader(Protocol):
    """Yields global steps without end, epoch after epoch, from a cursor on."""

    plan_hash: str

    def steps(self, cursor: Cursor | None = None) -> Iterator[Step]:
        """Yields steps from `cursor` on (default: the start). Raises ConfigError if the cursor is of another plan."""
        ...

    def close(self) -> None:
        """Stops worker processes."""
        ...
