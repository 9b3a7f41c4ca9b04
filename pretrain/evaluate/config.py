"""The typed schema of `auricle evaluate`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Final, Literal

from data_pipeline.core.schema import ConfigError, about, config, hint, refuse
from pretrain.evaluate import definitions
from pretrain.evaluate.tasks import is_data

MEASURES: Final = ("abx", "pnmi", "rankme")
"""Measures without fitting, on the frame labels of a task."""
WITH_TEXTS: Final = ("asr", "streaming", "synthesis")
"""Tasks of runs with a head whose measures are error rates of texts."""
OF_HEADS: Final = ("asr", "streaming", "separation", "synthesis", "retrieval")
"""Tasks of runs with a head; all other tasks are of encoders."""


def known_tasks() -> tuple[str, ...]:
    """Returns the names of all tasks: definitions (conf/task), measures, and those of heads."""
    return (*definitions.names("task"), *MEASURES, *OF_HEADS)


@config
class ProbeConfig:
    """A logistic regression on standardised frozen features, fitted to convergence by L-BFGS."""

    l2: Annotated[
        tuple[float, ...],
        about(
            "strengths of the penalty on the weights of standardised features, of which the best is chosen",
            min_length=1,
        ),
    ] = (1.0, 1e-1, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
    iterations: Annotated[
        int, about("the most iterations of L-BFGS; a quarter of it where layers and penalty are chosen", ge=1)
    ] = 200
    tolerance: Annotated[float, about("a fit ends when an iteration changes the loss by less", gt=0)] = 5e-6
    choice_vectors: Annotated[
        int,
        about("most vectors of the training split that are used to choose layers; penalties are chosen with all", ge=1),
    ] = 20_000
    least_speakers: Annotated[
        int,
        about(
            "with fewer validation speakers, layers and penalty are chosen by cross-validation; those of ranking and "
            "pairs on train and valid together",
            ge=1,
        ),
    ] = 5
    folds: Annotated[int, about("folds of speakers in that cross-validation", ge=2)] = 5

    def __post_init__(self) -> None:
        if min(self.l2) < 0:
            refuse("l2", self.l2, "must not be negative")


@config
class FewShotConfig:
    """Tasks of kind few_shot: episodes of a few classes, each with a few examples, on frozen features."""

    ways: Annotated[int, about("classes in an episode", ge=2)] = 5
    shots: Annotated[tuple[int, ...], about("examples of each class; several: a measure each", min_length=1)] = (1, 5)
    queries: Annotated[int, about("most recordings of each class that are classified in an episode", ge=1)] = 5
    episodes: Annotated[int, about("episodes of the test speakers", ge=1)] = 600
    choice_episodes: Annotated[
        int, about("episodes of the validation speakers, by which layer, rate and steps are chosen", ge=1)
    ] = 100
    steps: Annotated[int, about("most steps of fine-tuning on the examples", ge=1)] = 5
    rates: Annotated[
        tuple[float, ...], about("learning rates of fine-tuning, of which the best is taken", min_length=1)
    ] = (0.1, 1.0, 10.0, 100.0)

    def __post_init__(self) -> None:
        if min(self.shots) < 1:
            refuse("shots", list(self.shots), "each must be 1 or more")
        if min(self.rates) <= 0:
            refuse("rates", list(self.rates), "each must be above 0")


@config
class TextProbeConfig:
    """Tasks of kind text: a linear layer on frozen features, by CTC."""

    epochs: Annotated[int, about("most passes over the training split", ge=1)] = 60
    patience: Annotated[
        int, about("epochs without fewer character errors on the validation speakers before it ends", ge=1)
    ] = 6
    lr: Annotated[float, about("Adam's learning rate", gt=0)] = 3e-3
    batch: Annotated[int, about("utterances per update", ge=1)] = 16


@config
class SupervisedConfig:
    """Baseline: the same encoder, trained from scratch on the probe's labels only."""

    epochs: Annotated[int, about("most passes over the training split; 0: without this baseline", ge=0)] = 60
    patience: Annotated[
        int, about("passes without a better accuracy on the validation speakers before it ends", ge=1)
    ] = 6
    lr: Annotated[
        float, about("Adam's peak learning rate; halved after a third of the patience without progress", gt=0)
    ] = 1e-3
    batch_seconds: Annotated[float, about("audio per update", gt=0)] = 40.0


@config
class NeuralConfig:
    """Baseline: a network with as many weights as the encoder, on log-mel with context."""

    epochs: Annotated[int, about("most passes over the training split; 0: without this baseline", ge=0)] = 20
    patience: Annotated[int, about("passes without a better accuracy on the validation speakers", ge=1)] = 3
    lr: Annotated[float, about("Adam's learning rate", gt=0)] = 5e-4
    batch: Annotated[int, about("vectors per update", ge=1)] = 256
    dropout: Annotated[float, about("dropout of the hidden layers", ge=0, lt=1)] = 0.2


@config
class AsrConfig:
    """Task asr: which head of a recogniser, and how its output is decoded."""

    head: Annotated[str, about("name of the head that writes the text; empty: the only one that can")] = ""
    beam: Annotated[int, about("prefixes kept in beam search; 0: greedy only", ge=0)] = 16
    token_bonus: Annotated[float, about("added per token where an attention decoder takes part")] = 0.0
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
    decoder: Annotated[
        Literal["greedy", "beam", "rescoring"], about("as in `auricle transcribe`, with asr.beam prefixes")
    ] = "greedy"


@config
class SeparationConfig:
    """Task separation: mixtures of several speakers of the split, the same for every checkpoint."""

    head: Annotated[str, about("name of the head that separates; empty: the only one that can")] = ""
    mixtures: Annotated[int, about("number of mixtures", ge=1)] = 100
    seconds: Annotated[float, about("length of each", gt=0, le=60)] = 4.0
    snr_db: Annotated[tuple[float, float], about("level of the first speaker over each other one, from and to")] = (
        -5.0,
        5.0,
    )

    def __post_init__(self) -> None:
        if self.snr_db[0] > self.snr_db[1]:
            refuse("snr_db", list(self.snr_db), "the first must not be the larger one")


@config
class SynthesisConfig:
    """Task synthesis: which voice is measured, and the recognisers that transcribe it."""

    head: Annotated[str, about("name of the head that speaks; empty: the only one")] = ""
    listener: Annotated[
        Literal["language_model", "words"],
        about("PocketSphinx with its language model of English, or any sequence of the words of the texts"),
    ] = "language_model"
    recogniser: Annotated[str, about("run or checkpoint of a further recogniser; empty: none")] = ""
    language: Annotated[Literal["en", "zh", "none"], about("as in `auricle speak`")] = "none"


@config
class RetrievalConfig:
    """Task retrieval: which joint embedding of speech, texts and images is measured."""

    head: Annotated[str, about("name of the head that embeds; empty: the only one")] = ""


@config
class EvaluateConfig:
    """One evaluation: checkpoints and baselines × tasks."""

    checkpoint: Annotated[
        str, about("checkpoint folder, run folder or Hugging Face folder; several with commas", min_length=1)
    ]
    task: Annotated[
        str,
        about(
            "definitions of conf/task, YAML files of your own, manifests with one column of label, text or phones, or "
            f"folders of CLASS/FILE; measures ({', '.join(MEASURES)}); or tasks of runs with a head "
            f"({', '.join(OF_HEADS)}); several with commas",
            min_length=1,
        ),
    ] = "phones"
    manifest: Annotated[
        str,
        about(
            "list of the audio (TSV, CSV, JSON lines): path, speaker, text, label, language, corpus, split; empty: "
            "manifest.tsv of the folder that the environment variable AURICLE_SPEECH names"
        ),
    ] = ""
    data: Annotated[
        dict[str, str],
        about("task -> its manifest, folder of audio or folder of shards, where it is not `manifest`"),
    ] = dataclasses.field(default_factory=dict)
    phones: Annotated[
        str,
        about(
            "frame labels, instead of the task's: a table, CTM, folder of TextGrids, ending such as .TextGrid, or a "
            "column of the manifest with a file per row; empty: the column phones, if it names files, else the task's"
        ),
    ] = ""
    label_set: Annotated[
        str,
        about(
            "silence and folding of the frame labels, instead of the task's: a file of conf/label_set or a YAML file"
        ),
    ] = ""
    frames: Annotated[
        str, about(f"task of kind frames whose labels {', '.join(MEASURES)} are measured with", min_length=1)
    ] = "phones"
    abx: Annotated[
        Literal["own", "fastabx"],
        about("ABX by this project or by the package fastabx (Python 3.12); same cells for the same speakers"),
    ] = "own"
    corpora: Annotated[
        str, about("use only these corpora, with commas; empty: the task's, where the data has them")
    ] = ""
    ask: Annotated[
        Literal["test", "valid"],
        about("split that is evaluated: valid while settings are chosen, test for final figures"),
    ] = "test"
    layers: Annotated[str, about("layers to use, with commas; 0 is the first block's input; empty: all")] = ""
    seeds: Annotated[
        int, about("number of probes, random encoders and supervised runs, each with its own seed", ge=1)
    ] = 3
    baselines: Annotated[bool, about("also evaluate log-mel, random weights and supervised training")] = True
    bootstrap: Annotated[int, about("bootstrap resamplings of the test speakers for the intervals", ge=100)] = 2_000
    max_utterances: Annotated[int, about("maximum number of utterances per split; 0: all", ge=0)] = 0
    out: Annotated[str, about("folder for results.json, the table and report.html; empty: print only")] = ""
    follow: Annotated[
        bool, about("follow a training run: evaluate each new checkpoint, write results to its TensorBoard")
    ] = False
    follow_minutes: Annotated[
        float,
        about("follow: end after this many minutes without a heartbeat of the run; 0: wait forever", ge=0, le=525_600),
    ] = 60.0
    every: Annotated[int, about("follow: evaluate only checkpoints at multiples of this step", ge=1)] = 1
    device: Annotated[str, about("cpu or cuda", min_length=1)] = "cpu"
    threads: Annotated[
        int, about("most threads of the CPU; single utterances and small probes gain nothing from many", ge=1)
    ] = 2
    probe: ProbeConfig = ProbeConfig()
    text: TextProbeConfig = TextProbeConfig()
    few_shot: FewShotConfig = FewShotConfig()
    supervised: SupervisedConfig = SupervisedConfig()
    neural: NeuralConfig = NeuralConfig()
    asr: AsrConfig = AsrConfig()
    streaming: StreamingConfig = StreamingConfig()
    separation: SeparationConfig = SeparationConfig()
    synthesis: SynthesisConfig = SynthesisConfig()
    retrieval: RetrievalConfig = RetrievalConfig()


def items(text: str) -> list[str]:
    """Returns the parts of a comma-separated field."""
    return [part.strip() for part in text.split(",") if part.strip()]


def task_names(config: EvaluateConfig) -> list[str]:
    """Returns the tasks of a config. Raises ConfigError for an unknown task, or if there is none."""
    names = items(config.task)
    known = known_tasks()
    for name in names or [config.task]:
        if name.endswith(definitions.ENDINGS):
            definitions.find("task", name)
        elif name not in known and not is_data(name):
            raise ConfigError(f"task={name}: there is no such task{hint(name, known)}; there are: {', '.join(known)}")
    return names


def layer_numbers(config: EvaluateConfig) -> list[int]:
    """Returns the layers of a config, empty for all. Raises ConfigError for a text that is not a layer number."""
    for layer in items(config.layers):
        if not layer.isdecimal():
            raise ConfigError(
                f"layers={config.layers}: {layer!r} is not the number of a layer, from 0, as in layers=0,6"
            )
    return [int(layer) for layer in items(config.layers)]
