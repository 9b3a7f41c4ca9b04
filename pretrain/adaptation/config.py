"""The configs of `auricle finetune` and `auricle adapt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from data_pipeline.core.schema import about, config, refuse

Tune = Literal["full", "head", "bias", "prompt", "lora", "adapter"]
LEARNING_RATES: dict[str, float] = {
    "full": 3e-4, "head": 3e-3, "bias": 3e-3, "prompt": 3e-3, "lora": 3e-3, "adapter": 3e-3,
}  # fmt: skip
"""Peak learning rate of each way to tune: new weights learn faster than trained ones."""


@config
class FinetuneConfig:
    """A fine-tuning: what `auricle finetune` sets of a run."""

    checkpoint: Annotated[str, about("run, checkpoint or Hugging Face folder to start from", min_length=1)]
    task: Annotated[
        Literal["ctc", "sequence", "classify"],
        about(
            "ctc: connectionist temporal classification of characters; sequence: an attention decoder beside it; "
            "classify: classes of whole recordings"
        ),
    ] = "ctc"
    tune: Annotated[
        Tune,
        about(
            "what learns beside the new layers: full: all weights; head: none; prompt, lora, adapter: a few new ones; "
            "bias: the biases. Their sizes are fields of the run: tune.prompts, tune.rank …"
        ),
    ] = "full"
    label: Annotated[str, about("classify: column of the manifest that holds the class", min_length=1)] = "label"
    classes: Annotated[tuple[str, ...], about("classify: the classes; empty: those of split train")] = ()
    random_weights: Annotated[bool, about("the same architecture from scratch, as a baseline")] = False
    manifest: Annotated[
        str,
        about(
            "tab-separated list of the audio: path, speaker, text, corpus, split; empty: manifest.tsv of the folder "
            "that the environment variable AURICLE_SPEECH names"
        ),
    ] = ""
    corpora: Annotated[str, about("take only these corpora, with commas; empty: all")] = ""
    shards: Annotated[
        str,
        about("train on the labels of these shards instead of the manifest's split train; nothing is measured"),
    ] = ""
    symbols: Annotated[str, about("characters to write; others are left out", min_length=2)] = (
        " 'abcdefghijklmnopqrstuvwxyz"
    )
    steps: Annotated[int, about("updates", ge=1)] = 2_000
    frozen_steps: Annotated[
        int, about("tune=full: number of updates at the start in which only the new layers learn", ge=0)
    ] = 200
    lr: Annotated[
        float | None,
        about(
            "peak learning rate: tenth of the steps up, 40 % at the peak, then down to 5 % of it; null: "
            f"{LEARNING_RATES['full']:g} with tune=full, else {LEARNING_RATES['head']:g}",
            gt=0,
        ),
    ] = None
    batch_seconds: Annotated[float, about("audio per update", gt=0)] = 40.0
    mask_time: Annotated[float, about("share of features replaced by zeros in spans of 10 frames", ge=0, lt=1)] = 0.1
    max_utterances: Annotated[int, about("largest number of utterances per split; 0 takes all", ge=0)] = 0
    beam: Annotated[int, about("prefixes kept in beam search; 0: greedy only", ge=0)] = 16
    ngram: Annotated[int, about("order of the character n-gram of the training texts; 0: none", ge=0, le=10)] = 5
    ngram_weight: Annotated[float, about("its weight beside the acoustics", ge=0)] = 0.5
    seed: Annotated[int, about("keys every random draw", ge=0)] = 0
    device: Annotated[Literal["auto", "cpu", "cuda"], about("auto takes a GPU where there is one")] = "auto"
    out: Annotated[
        str, about("run folder, with results.json at the end; empty: runs/finetune_ and the checkpoint's name")
    ] = ""

    def __post_init__(self) -> None:
        if self.task == "classify" and self.shards and not self.classes:
            refuse("classes", [], "task=classify with shards= needs the classes, such as classes=[yes,no]")
        if self.random_weights and self.tune != "full":
            refuse("tune", self.tune, "leaves random weights as they are; with random_weights=true take tune=full")

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of segments that the heads read; an attention decoder reads tokens of the text."""
        return {"ctc": ("text",), "sequence": (), "classify": (self.label,)}[self.task]

    @property
    def chosen_corpora(self) -> list[str]:
        """Names of the corpora to use; empty: all."""
        return [name.strip() for name in self.corpora.split(",") if name.strip()]

    @property
    def peak_lr(self) -> float:
        """The peak learning rate."""
        return self.lr if self.lr is not None else LEARNING_RATES[self.tune]

    @property
    def folder(self) -> Path:
        """The run folder."""
        name = Path(self.checkpoint).expanduser().name
        return Path(self.out).expanduser() if self.out else Path("runs") / f"finetune_{name}"
