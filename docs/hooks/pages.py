"""MkDocs hooks: pages made from the code and from files at the root of the checkout, so that facts have one source."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data_pipeline.core.schema import REQUIRED, FieldDoc, document  # noqa: E402
from data_pipeline.corpora.config import CORPORA  # noqa: E402
from data_pipeline.text.artefact import TokensConfig  # noqa: E402
from launch.config import LAUNCHERS, EvaluateJob, FinetuneJob, PreprocessJob, PretrainJob, TargetsJob  # noqa: E402
from launch.serving.config import ServeConfig  # noqa: E402
from launch.workflows.pipeline import PipelineConfig  # noqa: E402
from pretrain import registry  # noqa: E402
from pretrain.federated.config import DeviceConfig  # noqa: E402
from pretrain.generation.config import SpeakConfig  # noqa: E402
from pretrain.recognition.config import TranscribeConfig  # noqa: E402
from pretrain.retrieval.config import EmbedConfig, SearchConfig  # noqa: E402

COMMANDS = {
    "preprocess": PreprocessJob,
    "targets": TargetsJob,
    "tokens": TokensConfig,
    "pretrain": PretrainJob,
    "evaluate": EvaluateJob,
    "finetune": FinetuneJob,
    "device": DeviceConfig,
    "speak": SpeakConfig,
    "transcribe": TranscribeConfig,
    "embed": EmbedConfig,
    "search": SearchConfig,
    "serve": ServeConfig,
    "pipeline": PipelineConfig,
}
PLUGINS = {
    "frontend": "frontends",
    "encoder": "encoders",
    "objective": "objectives",
    "heads.NAME": "heads",
    "heads.NAME.towers.KIND.embedding": "embeddings",
}
"""Config group -> plug-in kind."""
ROOT_PAGES = re.compile(r"\((ARCHITECTURE|CONTRIBUTING|CHANGELOG)\.md")
"""Links to files at the root that are pages of the site, in lower case there."""
REFERENCE, INCLUDE = "<!-- configuration reference -->", "<!-- include "


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces the two kinds of placeholder; called by MkDocs for every page."""
    if markdown.startswith(INCLUDE):
        name = markdown[len(INCLUDE) :].split()[0]
        text = (ROOT / name).read_text(encoding="utf-8").replace("(docs/", "(")
        return ROOT_PAGES.sub(lambda link: f"({link[1].lower()}.md", text)
    return markdown.replace(REFERENCE, "\n".join(configuration())) if REFERENCE in markdown else markdown


def configuration() -> Iterator[str]:
    """Yields the reference as Markdown: a section per command, then one per plug-in, corpus and launcher."""
    for command, kind in COMMANDS.items():
        yield f"\n## auricle {command}\n"
        yield from tables(row for row in document(kind) if not row.path.endswith(".name"))
    for group, kind_name in PLUGINS.items():
        choices = {name: registry.config_type(kind_name, name) for name in registry.names(kind_name)}
        yield from choice_sections(group, choices)
    yield from choice_sections("corpus", CORPORA)
    yield from choice_sections("launcher", LAUNCHERS)


def choice_sections(group: str, choices: dict[str, type[Any]]) -> Iterator[str]:
    """Yields a section with one table per choice of a config group."""
    yield f"\n## {group}=…\n"
    for name, kind in sorted(choices.items()):
        yield f"\n### {group}={name}\n"
        rows = [row for row in document(kind, f"{group}.") if row.path != f"{group}.name"]
        yield from table(rows) if rows else ["No fields."]


def tables(rows: Iterable[FieldDoc]) -> Iterator[str]:
    """Yields one table per top-level group of fields, those without a group first."""
    ordered = sorted(rows, key=lambda row: row.path.partition(".")[0] if "." in row.path else "")
    for group, members in groupby(ordered, key=lambda row: row.path.partition(".")[0] if "." in row.path else ""):
        yield f"\n### {group}\n" if group else ""
        yield from table(members)


def table(rows: Iterable[FieldDoc]) -> Iterator[str]:
    """Yields a Markdown table of fields."""
    yield "\n| field | type | default | meaning and limits |\n|---|---|---|---|"
    for row in rows:
        default = "*(required)*" if row.default == REQUIRED else f"`{cell(row.default)}`"
        meaning = "; ".join(filter(None, (row.description, row.limits)))
        yield f"| `{row.path}` | {row.type} | {default} | {cell(meaning)} |"


def cell(text: str) -> str:
    """Returns text for a table cell, shortened where a default is a long list."""
    text = text if len(text) <= 220 else f"{text[:200]} …"
    return text.replace("|", "\\|").replace("<", "&lt;")
