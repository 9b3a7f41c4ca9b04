"""The model card of an export, README.md in the folder: what the run's files record about it, and no other value."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.core.atomic_files import write_atomically
from data_pipeline.core.json_object import read_object
from data_pipeline.core.schema import ABSENT, load
from data_pipeline.core.text import visible
from launch.runs import data_record
from launch.runs.data_record import DataRecord
from launch.runs.summary import audio_hours, find_run, number, rows
from pretrain.checkpointing.locate import find_checkpoint
from pretrain.checkpointing.stored import read_state
from pretrain.config import Config
from pretrain.monitoring.config_pages import NOT_COMPARED, differences
from pretrain.recognition.recogniser import RESULTS

UNKNOWN = "not recorded"
CARD = "README.md"
HUB_LICENCES = re.compile(
    r"apache-2\.0|mit|isc|zlib|unlicense|bsd|bsd-[23]-clause|mpl-2\.0|agpl-3\.0|gpl-[23]\.0|lgpl-(2\.1|3\.0)|openrail|"
    r"cc0-1\.0|cc-by(-sa|-nd|-nc|-nc-sa|-nc-nd)?-4\.0|cc-by(-sa|-nc|-nc-sa|-nc-nd)?-3\.0|odbl|odc-by|pddl|"
    r"cdla-permissive-[12]\.0|cdla-sharing-1\.0"
)
"""Identifiers of licences on the Hugging Face Hub, which shows other licences by their name."""
_SPECIAL = re.compile(r"([\\`*_\[\]<>|&~#])")
LOADING = {
    "hugging_face": "`AutoModel.from_pretrained(FOLDER)`; of a recogniser `AutoModelForCTC`",
    "onnx": "onnxruntime, with the sizes and the normalisation in `features.json`",
    "torchscript": "`torch.jit.load`, with the sizes and the normalisation in `features.json`",
    "onnx_stream": "`run.py`, chunk by chunk, with numpy and onnxruntime",
    "onnx_synthesis": "onnxruntime, `text.onnx` and then `audio.onnx`; `synthesis.json` describes them",
    "wenet": "sherpa-onnx, as a streaming model in WeNet's layout",
    "edge": "`run.py`, with numpy and onnxruntime",
}
"""How to load each format."""


def write_card(folder: Path, given: str, form: str, licence: str = "") -> None:
    """Writes the model card of an export.

    Args:
        folder: the exported folder.
        given: the run: its folder, a checkpoint, or its name below runs/.
        form: format of the export, a key of LOADING.
        licence: licence of the weights; "": not stated.
    """
    path = Path(given).expanduser()
    checkpoint = find_checkpoint(str(path if path.exists() else find_run(given)))
    state = read_state(checkpoint)
    text = card(checkpoint.parent.parent, load(Config, state["config"]), int(state["step"]), form, licence)
    write_atomically(folder / CARD, text)


def card(run: Path, config: Config, step: int, form: str, licence: str) -> str:
    """Returns the text of the model card in Markdown, with the header that the Hugging Face Hub reads.

    Args:
        run: the run folder.
        config: config of the run.
        step: updates of the exported checkpoint.
        form: the export's format, as of `auricle export --to`.
        licence: of the weights, as the user gave it.
    """
    data = data_record.read(run, config.data.shards)
    logged = [row for row in rows(run) if number(row, "step", 0.0) <= step]
    environment = _environment(run)
    commit = environment.get("git_sha") or UNKNOWN
    facts = [
        ("recipe", f"objective {config.objective.name}, front end {config.frontend.name}, encoder {_sizes(config)}"),
        ("data", f"{data.hours:,.2f} h" if data.hours else UNKNOWN),
        ("corpora", _plain(", ".join(data.corpora)) or UNKNOWN),
        ("languages", _plain(", ".join(data.languages)) or UNKNOWN),
        ("training", f"{step:,} updates, {audio_hours(logged)[-1]:,.2f} h of audio" if logged else f"{step:,} updates"),
        ("start", _plain(Path(config.init).name) if config.init else "random weights"),
        ("seed", str(config.seed)),
        ("precision", config.engine.precision),
        ("code", f"auricle {_plain(environment.get('version') or UNKNOWN)}, commit {_plain(commit)}"),
        ("started", _plain(environment.get("started") or UNKNOWN)),
        ("licence", _plain(licence) or f"{UNKNOWN}; that of the weights depends on that of the data"),
        ("licence of the data", _licence_of_data(data)),
        ("loading", LOADING[form]),
    ]
    header = ["---", *_licence_lines(licence), "tags:", "- speech", "- self-supervised"]
    header += ["language:", *(f"- {json.dumps(language)}" for language in data.languages)] if data.languages else []
    header += ["library_name: transformers"] if form == "hugging_face" else []
    changed = [
        (_plain(path), _plain(json.dumps(value, ensure_ascii=False)))
        for path, _, value in differences(config)
        if value is not ABSENT and not path.startswith(NOT_COMPARED)
    ]
    return "\n".join(
        [
            *header,
            "---",
            "",
            f"# {_plain(config.name)}",
            "",
            "A speech encoder for audio at 16 kHz, trained with auricle.",
            "",
            *_table(("", ""), facts),
            "",
            "## Figures",
            "",
            *_figures(run, step, logged),
            "",
            "## Settings that differ from the defaults",
            "",
            *(_table(("field", "value"), changed) if changed else ["None."]),
            "",
        ]
    )


def _licence_lines(licence: str) -> list[str]:
    """Returns the lines of the header that name a licence as the Hugging Face Hub does."""
    if not licence:
        return ["license: unknown"]
    if HUB_LICENCES.fullmatch(licence.lower()):
        return [f"license: {licence.lower()}"]
    return ["license: other", f"license_name: {json.dumps(licence)}"]


def _licence_of_data(data: DataRecord) -> str:
    """Returns the recorded licences with their corpora: "CC-BY-4.0 (a, b); not recorded (c)"."""
    named = [
        f"{_plain(name or UNKNOWN)} ({_plain(', '.join(corpora))})"
        for name, corpora in sorted(data.licences.items(), key=lambda item: (not item[0], item[0]))
    ]
    return "; ".join(named) if any(data.licences) else UNKNOWN


def _sizes(config: Config) -> str:
    return f"{config.encoder.name} of {config.encoder.layers} blocks with {config.encoder.dim} channels"


def _environment(run: Path) -> dict[str, Any]:
    try:
        return read_object(run / "environment.json")
    except (OSError, ValueError):
        return {}


def _figures(run: Path, step: int, logged: Sequence[dict[str, Any]]) -> list[str]:
    """Returns a table of the evaluations of this checkpoint, its error rates, and its last losses."""
    found = []
    for row in rows(run, "evaluations.jsonl"):
        if row.get("step") == step:
            between = f" ({row['low']:.4g} to {row['high']:.4g})" if number(row, "low") == number(row, "low") else ""
            value = f"{number(row, 'value'):.4g}{between}"
            named = ", ".join(_plain(row.get(part, "")) for part in ("task", "measure", "who"))
            found.append((named, value))
    try:
        errors = read_object(run / RESULTS)["errors"]
        for row in errors:
            rates = f"WER {row['wer']:.2%}, CER {row['cer']:.2%} on {row['utterances']} utterances"
            found.append((f"recognition, {_plain(row['decoder'])}", rates))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    last = logged[-1] if logged else {}
    for name, tag in (("loss", "loss/total"), ("held-out loss", "valid/loss/total"), ("accuracy", "metric/accuracy")):
        having = [row for row in logged if tag in row]
        if having:
            at = "" if having[-1] is last else f" at update {having[-1].get('step')}"
            found.append((f"{name}, last logged{at}", f"{number(having[-1], tag):.4f}"))
    return _table(("measure", "value"), found) if found else [f"{UNKNOWN[0].upper()}{UNKNOWN[1:]}."]


def _plain(text: object) -> str:
    """Returns text from outside so that Markdown shows it as it is."""
    return _SPECIAL.sub(r"\\\1", visible(str(text)))


def _table(head: tuple[str, str], lines: Sequence[tuple[str, str]]) -> list[str]:
    body = [f"| {name} | {value} |" for name, value in lines]
    return [f"| {head[0]} | {head[1]} |", "| --- | --- |", *body]
