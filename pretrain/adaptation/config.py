"""The config of `auricle finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from data_pipeline.core.schema import about, config


@config
class FinetuneConfig:
    """A fine-tuning: what `auricle finetune` sets of a run."""

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
    shards: Annotated[
        str, about("train on the texts of these shards instead of the manifest's split train; no error rates then")
    ] = ""
    symbols: Annotated[str, about("characters to write; others are left out", min_length=2)] = (
        " 'abcdefghijklmnopqrstuvwxyz"
    )
    steps: Annotated[int, about("updates", ge=1)] = 2_000
    frozen_steps: Annotated[int, about("number of updates at the start in which only the new layer learns", ge=0)] = 200
    lr: Annotated[
        float, about("peak learning rate: tenth of the steps up, 40 % at the peak, then down to 5 % of it", gt=0)
    ] = 3e-4
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

    @property
    def folder(self) -> Path:
        """The run folder."""
        name = Path(self.checkpoint).expanduser().name
        return Path(self.out).expanduser() if self.out else Path("runs") / f"finetune_{name}"
