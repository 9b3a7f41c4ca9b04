"""Documented commands: those that a slow test runs, in order, and those that are composed only, with the reason.

A pattern (fnmatch) stands for the command as it is documented, without the word `auricle`. Each documented command
belongs to the first pattern that fits it.
"""

from __future__ import annotations

import fnmatch
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile

from tests.support.contract_cases import speech_like
from tests.support.foreign_tars import write_foreign

TRAINING = (
    "train.steps=2", "train.checkpoint_every=2", "train.media_every=0", "schedule.warmup_steps=1", "launcher=local",
    "launcher.processes=1", "engine.name=torch", "device=cpu", "data.batch_seconds=8", "data.micro_batches=2",
    "data.min_seconds=0.3", "data.max_seconds=4", "data.workers=0", "health.on_collapse=warn",
)  # fmt: skip
"""Overrides that make a training short."""
TUNING = ("steps=2", "batch_seconds=8", "data.workers=0", "corpora=made", "launcher.processes=1")
MEASURING = ("corpora=made", "seeds=1", "bootstrap=100")
FEW_SHOT = (
    "corpora=made",
    "bootstrap=100",
    "few_shot.episodes=10",
    "few_shot.choice_episodes=3",
    "few_shot.queries=1",
    "few_shot.ways=2",
)
FEDERATED = (
    "train.steps=2", "train.checkpoint_every=2", "train.media_every=0", "schedule.warmup_steps=1", "device=cpu",
    "launcher.devices=3", "data.shards=devices", "data.batch_seconds=12", "data.micro_batches=3", "data.max_seconds=2",
    "health.on_collapse=warn", "engine.federated.per_round=3", "engine.federated.min_devices=3",
    "engine.federated.wait_seconds=300",
)  # fmt: skip
"""Overrides that make a federated run short, with three devices on this machine."""
DEVICES = tuple(
    ("preprocess", "corpus=path", "corpus.path=speech", f"out=devices/phone_{number}") for number in (1, 2, 3)
)
PROBING = (*MEASURING, "supervised.epochs=0", "neural.epochs=0")


@dataclass(frozen=True)
class Run:
    """Commands that are run.

    more: overrides or options that are added.  names: words that are replaced.  flower: whether Flower is needed.
    """

    pattern: str
    more: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=dict)
    flower: bool = False


def _named(name: str) -> dict[str, str]:
    return {"NAME": name}


SPLIT = ("preprocess", "corpus=manifest", "corpus.path=speech/manifest.tsv", "out=split", "split.valid=0.2")
"""Shards of training and validation speakers."""
STREAMING = (
    "pretrain", "frontend=log_mel", "frontend.normalize=fixed", "encoder=transformer_tiny", "objective=best_rq",
    "encoder.attention=chunked", "encoder.chunk_frames=[8]", "encoder.left_chunks=[8]", "add_head@heads.text=ctc",
    "data.labels=[text]", "data.shards=shards", "name=streaming", *TRAINING,
)  # fmt: skip
"""A run that can stream, for docs/streaming.md and docs/export.md."""

RUNS: tuple[Run | tuple[str, ...], ...] = (
    Run("doctor"),
    Run("recipes"),
    Run("completion *"),
    Run("plan-run *"),
    Run("pretrain*--cfg"),
    Run("pretrain*--help"),
    Run("pipeline *--dry-run"),
    # with Flower, in a test of their own; the device runs beside the server after it
    Run("device *", ("name=own",), {"phone_1": "devices/phone_1"}, flower=True),
    Run("pretrain +experiment=federated_tiny device=cpu", (*FEDERATED, "launcher.devices=2"), flower=True),
    Run("pretrain *launcher.devices=8", (*FEDERATED, "name=beside"), {"DEVICES": "devices"}, flower=True),
    Run("pretrain *tune.name=lora", (*FEDERATED, "name=few"), {"BASE": "federated_tiny"}, flower=True),
    Run("pretrain *secure=true *", (*FEDERATED, "name=secure"), flower=True),
    Run(
        "pretrain *federated.noise=1 *",
        (*FEDERATED, "name=private", "train.steps=1"),
        {"devices=1000": "devices=3"},
        flower=True,
    ),
    # data
    SPLIT,
    Run("preprocess corpus=manifest *image_side=256", ("min_shards=2",)),
    Run("preprocess corpus=manifest *splits=*train* *", ("out=other/train_split",)),
    Run("preprocess corpus=manifest *calls/manifest.tsv *", ("out=other/calls",)),
    Run("preprocess corpus=manifest *inicio*", ("out=other/inicio",)),
    Run("preprocess corpus=manifest *units_per_second*", ("out=other/units",)),
    Run("preprocess corpus=manifest *channel*", ("out=other/channel",)),
    Run("preprocess corpus=path corpus.path=/data/podcasts *", ("out=other/podcasts",)),
    Run("preprocess corpus=path *", ("out=other/path",)),
    Run("preprocess corpus=webdataset *", ("out=other/tars",)),
    Run("shards index /data/tars"),
    Run("shards *"),
    Run("data plan *"),
    Run("tokens * kind=bpe *", ("size=40",), {"bpe": "bpe"}),
    Run("tokens *letters *"),
    Run("tokens *characters"),
    Run("targets *features=mfcc*", ("classes=20",)),
    Run("targets *features=pitch"),
    Run("targets *kmeans=labels/mfcc *", ("classes=20",)),
    # training
    STREAMING,
    Run("pretrain *launcher=local launcher.processes=2", TRAINING),
    Run("pretrain *schedule.continue=rewarm", (*TRAINING, "train.steps=3")),
    Run("pretrain *name=further *", TRAINING),
    Run("pretrain *--multirun", TRAINING),
    Run("pretrain *mix_alpha=0.5", (*TRAINING, "name=mixed"), {"shards/*": "split/*"}),
    Run("pretrain *librispeech*", (*TRAINING, "data.shards=[shards,other/podcasts]", "name=several")),
    Run("pretrain *data.reader=webdataset*", (*TRAINING, "name=tars"), {"127": "002"}),
    Run("pretrain *best_rq_tiny *data.valid=*", (*TRAINING, "name=held_out")),
    Run("pretrain *heads.apart*", (*TRAINING, "name=apart")),
    Run("pretrain *tune.name=lora*", (*TRAINING, "name=tuned"), _named("best_rq_tiny")),
    Run("pretrain *joint_embedding_tiny*", TRAINING),
    Run("pretrain *synthesis_tiny*", TRAINING),
    # reading runs
    Run("runs"),
    Run("jobs list"),
    Run("jobs status *", names=_named("best_rq_tiny")),
    Run("jobs logs*", names={"NAME": "best_rq_tiny", "-f": ""}),
    Run("compare * runs/b", names={"runs/a": "runs/best_rq_tiny", "runs/b": "runs/further"}),
    # smaller models, exports
    Run("compress runs/best_rq_tiny *"),
    Run("export * --to torchscript", names=_named("best_rq_tiny")),
    Run("export * onnx_folder --to onnx", names={"onnx_folder": "onnx_best_rq"}),
    Run("export runs/NAME model_folder --to onnx", names={"NAME": "best_rq_tiny", "model_folder": "another_onnx"}),
    Run("export * --to onnx_synthesis", names={"NAME": "synthesis_tiny"}),
    Run("export * --to onnx_stream *", names={"NAME": "streaming", "model_folder": "stream_folder"}),
    Run("export runs/NAME edge/ --to edge", names={"NAME": "streaming", "edge/": "another_edge/"}),
    # what runs are for
    Run("adapt *", ("--steps", "2"), _named("best_rq_tiny")),
    Run("finetune *task=classify *", (*TUNING, "out=runs/classes"), _named("best_rq_tiny")),
    Run("finetune *task=sequence *", (*TUNING, "out=runs/sequence"), _named("best_rq_tiny")),
    Run("finetune *tune=adapter *", TUNING, _named("best_rq_tiny")),
    Run("finetune *out=recogniser", TUNING, _named("best_rq_tiny")),
    Run("finetune checkpoint=runs/best_rq_tiny *", (*TUNING, "out=runs/letters")),
    Run("transcribe *tuned *", names=_named("best_rq_tiny")),
    Run("transcribe *stream=true *", names=_named("streaming")),
    Run("transcribe *files=shards/ *", names={"NAME": "finetune_best_rq_tiny"}),
    Run("transcribe *", names={"NAME": "finetune_best_rq_tiny"}),
    Run("evaluate *moods.yaml", ("seeds=1", "bootstrap=100"), _named("best_rq_tiny")),
    Run("evaluate *task=phones *", PROBING, _named("best_rq_tiny")),
    Run(
        "evaluate *task=few_shot *",
        FEW_SHOT,
        {"NAME": "best_rq_tiny", "speech_commands_v1": "made", "[1,5]": "[1]", "ways=3": "ways=2"},
    ),
    Run("evaluate *task=asr *", MEASURING, {"finetune_NAME": "finetune_best_rq_tiny"}),
    Run("evaluate *task=streaming *streaming.left=*", MEASURING, {"NAME": "streaming", "8,16": "8", "8,-1": "8"}),
    Run("evaluate *task=streaming *", MEASURING, _named("streaming")),
    Run("embed *"),
    Run("search *"),
    Run("evaluate *task=retrieval *", ("corpora=made", "bootstrap=100"), {"test.tsv": "speech/manifest.tsv"}),
    Run("speak *", names=_named("synthesis_tiny")),
    # devices that keep their audio
    *DEVICES,
    Run("pretrain *transport=ray*", (*FEDERATED, "launcher.devices=0", "name=tasks"), {"DEVICES": "devices"}),
)
"""In the order in which they run: later commands read what earlier ones wrote. Tuples are the test's own commands."""

COMPOSED = {
    "*maml_words_tiny*": "tests/end_to_end/test_meta_learning.py runs docs/meta_learning.md",
    "preprocess *out=words *": "as the commands of maml_words_tiny",
    "*runs/T*": "begins with a trained teacher; tests/end_to_end/test_small_models.py runs docs/compression.md",
    "*runs/S*": "as runs/T",
    "preprocess corpus=manifest corpus.path=MANIFEST out=shards": "tests/end_to_end/test_small_models.py",
    "*name=[ST] *": "makes the teachers of docs/compression.md; tests/end_to_end/test_small_models.py",
    "*runs/phone *": "a student of runs/S; tests/end_to_end/test_small_models.py",
    "bench phone": "as runs/phone",
    "evaluate *task=separation": "needs a run with the head separation; tests/evaluate/test_separation.py",
    "*launcher=slurm*": "needs SLURM; tests/faults submits to a simulated one",
    "*launcher=ray*": "needs a Ray cluster; tests/faults starts one",
    "jobs cancel *": "needs a job that runs; tests/unit/launch/commands/test_jobs.py",
    "jobs requeue *": "needs a job that failed; tests/unit/launch/commands/test_jobs.py",
    "serve *": "serves until it is stopped; tests/unit/launch/serving",
    "board *": "serves until it is stopped; tests/board",
    "pretrain *engine.name=meta*": "tests/end_to_end/test_meta_learning.py runs it",
    "preprocess corpus=common_voice *": "needs a corpus of this layout; "
    "tests/unit/data_pipeline/corpora/test_layouts.py",
    "preprocess corpus=librispeech *": "needs a corpus of this layout; "
    "tests/unit/data_pipeline/corpora/test_layouts.py",
    "preprocess corpus=mls *": "needs a corpus of this layout; tests/unit/data_pipeline/corpora/test_layouts.py",
    "preprocess corpus=lhotse *": "needs lhotse's manifests or recipes; tests/unit/data_pipeline/corpora",
    "tokens *kind=phones": "needs a pronouncing dictionary; tests/unit/data_pipeline/text",
    "data find-caps *": "takes minutes; tests/unit/launch/commands",
    "bands *": "five trainings; tests/unit/launch/runs/test_bands.py",
    "*--bands*": "needs the bands of five trainings; tests/unit/launch/runs/test_bands.py",
    "compress runs/prune_tiny *": "needs a trained run with gates; tests/end_to_end/test_small_models.py",
    "export *--int8*": "refuses a model of two updates as inaccurate; tests/unit/pretrain/compression",
    "bench * *int8*": "needs an INT8 export; tests/end_to_end/test_small_models.py",
    "export runs/NAME hf_folder": "needs a front end with a counterpart in transformers; tests/parity/test_export.py",
    "evaluate *follow=true": "follows a run that trains; tests/evaluate/test_evaluate.py",
    "evaluate checkpoint=runs/a,runs/b,hf_folder *": "compares with a Hugging Face folder; tests/parity/test_export.py",
    "evaluate *task=synthesis*": "needs a voice that speaks; tests/evaluate/test_synthesis.py",
    "pretrain *supernet_tiny *": "needs a teacher; tests/end_to_end/test_small_models.py",
    "compress runs/supernet_tiny *": "needs a supernet; tests/end_to_end/test_small_models.py",
    "bench --table *--subnets *": "exports each subnet; tests/end_to_end/test_small_models.py",
    "search-architecture *": "needs optuna and a table; tests/end_to_end/test_small_models.py",
    "pretrain *dice_hubert_tiny *": "a chain of the two commands after it, which are run",
    "pretrain *frontend.mel=kaldi *": "another field of a run that can stream; tests/end_to_end/test_small_models.py",
    "export *--to wenet *": "needs a recogniser with frontend.mel=kaldi; tests/end_to_end/test_small_models.py",
    "replay *": "needs the batches of a failed update; tests/end_to_end/test_replay.py",
    "targets *features=runs/hubert-it1 *": "the clusters of another layer; as features=runs/T",
    "pretrain *units_tiny *": "its head is trained and writes in tests/unit/pretrain/heads/test_units.py",
    "speak *units_tiny *": "its audio is tested in tests/unit/launch/workflows/test_speaking.py",
    "transcribe *listener *": "needs a head of units; tests/unit/launch/workflows/test_unit_transcription.py",
    "pretrain *style_words*": "needs labels of sex and age; tests/contract/test_heads.py trains it",
    "speak *style=*": "needs style_words; tests/unit/launch/workflows/test_speaking.py",
    "pretrain *decoder=flow*": "another field of a recipe that is run; tests/contract/test_heads.py trains it",
    "pretrain *hubert_tiny *data.valid_targets*": "needs labels of both parts; "
    "tests/unit/launch/workflows/test_pipeline.py",
    "pretrain *multitask*": "needs labels of seven languages; tests/end_to_end/test_recipes.py composes the recipe",
    "pretrain *best_rq_base*": "a recipe of days; tests/contract/test_recipes.py builds its model",
    "pretrain *wav2vec2_base*": "a recipe of days; tests/contract/test_recipes.py builds its model",
    "pretrain *conformer_aed_base*": "a recipe of days; tests/contract/test_recipes.py builds its model",
    "pretrain *whisper_like_small*": "a recipe of days; tests/contract/test_recipes.py builds its model",
}
"""Patterns of commands that are composed and validated only, and why; they go before RUNS."""


def run_of(shown: str) -> Run | None:
    """Returns how a documented command is run; None if it is composed only. Raises KeyError if neither is listed."""
    only_composed = any(fnmatch.fnmatchcase(shown, pattern) for pattern in COMPOSED)
    if only_composed and not {"--help", "--cfg", "--dry-run"} & set(shown.split()):
        return None
    for run in RUNS:
        if isinstance(run, Run) and fnmatch.fnmatchcase(shown, run.pattern):
            return run
    raise KeyError(shown)


def write_home(home: Path) -> None:
    """Writes what documented commands read: recordings with speakers, texts and images, in several kinds of lists."""
    from PIL import Image

    speech = home / "speech"
    speech.mkdir(parents=True)
    rows = []
    for number in range(36):
        speaker, text = number % 12, ("go on", "a tool", "and on", "two", "no", "one")[number // 6]
        split = (*("train",) * 8, "valid", "valid", "test", "test")[speaker]
        soundfile.write(speech / f"{number}.wav", speech_like(1.0 + 0.02 * number, number).numpy(), 16_000)
        pixels = np.full((16, 16, 3), 7 * number, np.uint8)
        Image.fromarray(pixels).save(speech / f"{number}.png")
        rows.append((f"{number}.wav", f"s{speaker}", text, text.split()[0], "en", "made", split, f"{number}.png"))
    columns = ("path", "speaker", "text", "label", "language", "corpus", "split", "image")
    (speech / "manifest.tsv").write_text("".join("\t".join(row) + "\n" for row in (columns, *rows)))
    phones = "".join(
        f"{row[0]}\t{0.2 * n:.1f}\t{0.2 * n + 0.2:.1f}\t{('AA', 'S', 'T', 'IY', 'SIL')[(number + n) % 5]}\n"
        for number, row in enumerate(rows)
        for n in range(5)
    )
    (speech / "phones").mkdir()
    (speech / "phones" / "auto_pocketsphinx.tsv").write_text("path\tstart_s\tend_s\tphone\n" + phones)
    for folder in ("data/calls", "data/podcasts", "data/speech", "clips/yes", "clips/no", "recordings", "pictures"):
        (home / folder).mkdir(parents=True)
    for number in range(4):
        content = (speech / f"{number}.wav").read_bytes()
        for name in ("data/calls", "data/podcasts", "data/speech", "recordings", f"clips/{('yes', 'no')[number % 2]}"):
            (home / name / f"{number}.wav").write_bytes(content)
        (home / "pictures" / f"{number}.png").write_bytes((speech / f"{number}.png").read_bytes())
    for name in ("a.wav", "b.wav", "talk.mp3", "talk.wav", "new1.wav", "new2.wav", "prompt.wav"):
        form = "MP3" if name.endswith("mp3") else "WAV"
        soundfile.write(home / name, speech_like(1.5, 40).numpy(), 16_000, format=form)
    (home / "b.png").write_bytes((speech / "1.png").read_bytes())
    (home / "data/calls/manifest.tsv").write_text("path\tspeaker\n0.wav\tann\n1.wav\tbob\n")
    (home / "calls.csv").write_text("path,inicio,fim\nspeech/0.wav,0.1,0.9\nspeech/1.wav,0,1\n")
    (home / "ted.csv").write_text("path,start,end\nspeech/0.wav,1600,14400\n")
    (home / "tv.csv").write_text("path,channel\nspeech/0.wav,ARD\n")
    (home / "moods.csv").write_text(
        "path,speaker,split,mood\n" + "".join(f"speech/{row[0]},{row[1]},{row[6]},{row[3]}\n" for row in rows)
    )
    (home / "moods.yaml").write_text("kind: utterances\ndata: moods.csv\nlabel: [mood]\n")
    (home / "lines.txt").write_text("go on\na tool\n")
    (home / "widths.json").write_text(json.dumps([[4, 1024], [4, 512], [2, 512], [2, 256]]))
    write_foreign(home / "data" / "tars", tars=3, per_tar=4)
    for number in range(3):  # `data.shards=/data/part-…`
        (home / "data" / f"part-{number:03d}.tar").write_bytes(
            (home / "data" / "tars" / f"part-{number:03d}.tar").read_bytes()
        )
