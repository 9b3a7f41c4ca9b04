"""The typed schema of `auricle evaluate`."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from data_pipeline.core.schema import ConfigError, about, config, hint, refuse

TASKS: Final = ("phones", "keywords", "digits", "speaker", "language", "abx", "pnmi", "rankme", "asr", "streaming")


@config
class ProbeConfig:
    """A linear classifier on frozen features, with learned weights of the layers."""

    epochs: Annotated[int, about("passes over the training split", ge=1)] = 8
    min_updates: Annotated[int, about("least number of updates; small training splits get more passes", ge=1)] = 600
    lr: Annotated[float, about("Adam's peak learning rate, with a cosine to 0", gt=0)] = 2e-3
    batch: Annotated[int, about("frames (or utterances) per update", ge=1)] = 512
    weight_decay: Annotated[float, about("decoupled weight decay", ge=0)] = 1e-4


@config
class SupervisedConfig:
    """Baseline: the same encoder, trained from scratch on the probe's labels only."""

    epochs: Annotated[int, about("passes over the training split; 0: without this baseline", ge=0)] = 10
    lr: Annotated[float, about("Adam's peak learning rate", gt=0)] = 1e-3
    batch_seconds: Annotated[float, about("audio per update", gt=0)] = 40.0


@config
class AsrConfig:
    """Task asr: which head of a recogniser, and how its output is decoded."""

    head: Annotated[str, about("name of the head that writes the text; empty: the only one that can")] = ""
    beam: Annotated[int, about("prefixes kept in beam search; 0: greedy only", ge=0)] = 16
    ngram: Annotated[int, about("order of the n-gram of symbols of split train; 0: none", ge=0, le=10)] = 5
    ngram_weight: Annotated[float, about("its weight beside the acoustics", ge=0)] = 0.5
    lm: Annotated[str, about("also with an n-gram model of words, in ARPA or KenLM's binary format")] = ""
    words: Annotated[str, about("lm: file with the words, one per line; empty: those of the ARPA file")] = ""
    lm_weight: Annotated[float, about("lm: weight of its log10 p beside the acoustics' ln p", ge=0)] = 2.0
    word_bonus: Annotated[float, about("lm: added per word")] = 0.0

    def __post_init__(self) -> None:
        if self.lm and not self.beam:
            refuse("lm", self.lm, "needs a beam search; set asr.beam")


@config
class StreamingConfig:
    """Task streaming: which streams of a recogniser are measured; `asr.head` chooses its head."""

    chunks: Annotated[str, about("frames per chunk, with commas, among those trained; empty: all of them")] = ""
    left: Annotated[str, about("earlier chunks attended to, likewise; -1: all")] = ""
    push_ms: Annotated[float, about("audio per push", ge=10, le=10_000)] = 100.0


@config
class EvaluateConfig:
    """One evaluation: checkpoints and baselines × tasks."""

    checkpoint: Annotated[
        str, about("checkpoint folder, run folder or Hugging Face folder; several with commas", min_length=1)
    ]
    task: Annotated[str, about(f"{', '.join(TASKS)}; several with commas", min_length=1)] = "phones"
    manifest: Annotated[
        str,
        about(
            "tab-separated list of the audio: path, speaker, text, label, language, corpus, split; empty: manifest.tsv "
            "of the folder that the environment variable AURICLE_SPEECH names"
        ),
    ] = ""
    phones: Annotated[
        str, about("tab-separated alignment: path, start_s, end_s, phone; relative to the manifest's folder")
    ] = "phones/auto_pocketsphinx.tsv"
    corpora: Annotated[str, about("use only these corpora, with commas; empty: the task's default corpora")] = ""
    ask: Annotated[
        Literal["test", "valid"],
        about("split that is evaluated: valid while settings are chosen, test for final figures"),
    ] = "test"
    layers: Annotated[str, about("layers to use, with commas; 0 is the first block's input; empty: all")] = ""
    seeds: Annotated[
        int, about("number of probes, random encoders and supervised runs, each with its own seed", ge=1)
    ] = 3
    baselines: Annotated[bool, about("also evaluate log-mel with context, random weights and supervised training")] = (
        True
    )
    bootstrap: Annotated[int, about("bootstrap resamplings of the test speakers for the intervals", ge=100)] = 2_000
    max_utterances: Annotated[int, about("maximum number of utterances per split; 0: all", ge=0)] = 0
    out: Annotated[str, about("folder for results.json and the table; empty: print only")] = ""
    follow: Annotated[
        bool, about("follow a training run: evaluate each new checkpoint, write results to its TensorBoard")
    ] = False
    follow_minutes: Annotated[
        float,
        about("follow: end after this many minutes without a heartbeat of the run; 0: wait forever", ge=0, le=525_600),
    ] = 60.0
    every: Annotated[int, about("follow: evaluate only checkpoints at multiples of this step", ge=1)] = 1
    device: Annotated[str, about("cpu or cuda", min_length=1)] = "cpu"
    probe: ProbeConfig = ProbeConfig()
    supervised: SupervisedConfig = SupervisedConfig()
    asr: AsrConfig = AsrConfig()
    streaming: StreamingConfig = StreamingConfig()


def items(text: str) -> list[str]:
    """Returns the parts of a comma-separated field."""
    return [part.strip() for part in text.split(",") if part.strip()]


def task_names(config: EvaluateConfig) -> list[str]:
    """Returns the tasks of a config. Raises ConfigError for an unknown task, or if there is none."""
    names = items(config.task)
    for name in names or [config.task]:
        if name not in TASKS:
            raise ConfigError(f"task={name}: there is no such task{hint(name, TASKS)}; there are: {', '.join(TASKS)}")
    return names


def layer_numbers(config: EvaluateConfig) -> list[int]:
    """Returns the layers of a config, empty for all. Raises ConfigError for a text that is not a layer number."""
    for layer in items(config.layers):
        if not layer.isdecimal():
            raise ConfigError(
                f"layers={config.layers}: {layer!r} is not the number of a layer, from 0, as in layers=0,6"
            )
    return [int(layer) for layer in items(config.layers)]
