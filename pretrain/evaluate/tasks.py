"""Tasks as data: what is read, which labels it has, how speakers are divided, and what is measured."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Final, Literal

from data_pipeline.core.schema import ConfigError, about, config, refuse
from data_pipeline.corpora.columns import ColumnNames
from data_pipeline.corpora.tables import ENDINGS, read_table
from pretrain.evaluate import definitions
from pretrain.evaluate.alignments import COLUMN
from pretrain.evaluate.manifest import SPLIT_NAMES, manifest_in

Kinds = Literal["frames", "utterances", "pairs", "text", "ranking", "few_shot"]
Layouts = Literal[
    "auto", "librispeech", "mls", "common_voice", "voxpopuli", "gigaspeech", "webdataset", "lhotse", "lhotse_shar"
]


@config
class TaskConfig:
    """A task of `auricle evaluate`: a file of conf/task or of the user."""

    kind: Annotated[
        Kinds,
        about(
            "frames: a label with times for each frame; utterances: one label each; pairs: same speaker or not (equal "
            "error rate); text: CTC on frozen features (error rates); ranking: utterances of the same label first "
            "(mean average precision); few_shot: one label each, of which a few classes are learned from a few examples"
        ),
    ]
    data: Annotated[
        str,
        about(
            "manifest (TSV, CSV, JSON lines), folder of audio or folder of shards; empty: evaluate's data or manifest"
        ),
    ] = ""
    layout: Annotated[Layouts, about("a known corpus's layout; auto: manifest, shards or files below a folder")] = (
        "auto"
    )
    each_folder: Annotated[
        bool, about("each folder below data has that layout, such as the locales of Common Voice")
    ] = False
    pattern: Annotated[
        str,
        about(
            "regular expression searched in the paths below a folder; its groups (speaker, split, label …) become "
            "columns, and files that it does not match are not used"
        ),
    ] = ""
    exclude: Annotated[str, about("regular expression of paths that are not used")] = ""
    tables: Annotated[
        dict[str, str], about("split -> manifest below data, whose paths begin at data; * is expanded")
    ] = dataclasses.field(default_factory=dict)
    columns: Annotated[dict[str, str], about("names of the columns path, speaker, text … where they differ")] = (
        dataclasses.field(default_factory=dict)
    )
    label: Annotated[tuple[str, ...], about("columns that make up the label", min_length=1)] = ("label",)
    label_files: Annotated[str, about("files below data with labels of recordings; * is expanded")] = ""
    label_pattern: Annotated[
        str, about("regular expression of a line of label_files; groups: name (a file's, without ending) and columns")
    ] = ""
    fold: Annotated[
        dict[str, str], about("label -> the one it counts as; empty: such utterances are not used; * for all others")
    ] = dataclasses.field(default_factory=dict)
    corpora: Annotated[tuple[str, ...], about("use these corpora, where the data has them")] = ()
    splits: Annotated[
        dict[str, tuple[str, ...]], about("train, valid, test -> values of the column split; empty: those names")
    ] = dataclasses.field(default_factory=dict)
    split_lists: Annotated[
        dict[str, str], about("split -> file below data with a path per line; recordings in none are for train")
    ] = dataclasses.field(default_factory=dict)
    split_by: Annotated[
        Literal["speakers", "takes"],
        about(
            "speakers: no speaker is in two splits; takes: every fifth utterance of a class is for test, for classes "
            "that only their speakers have"
        ),
    ] = "speakers"
    pool: Annotated[Literal["quarters", "mean_and_deviation"], about("how frames become one vector per utterance")] = (
        "quarters"
    )
    alignment: Annotated[
        str,
        about(
            "frames: a table (path, start, end, label) or CTM, a folder of TextGrids, the ending of a file beside each "
            "recording, such as .PHN, or a column of the manifest with a file per row; evaluate's phones and a column "
            "phones come first"
        ),
    ] = ""
    tier: Annotated[str, about("tier of TextGrids")] = "phones"
    label_set: Annotated[str, about("frames: silence and folding, a file of conf/label_set")] = "any"
    trials: Annotated[
        str, about("pairs: file below data with lines `1 PATH PATH` (same) or `0 PATH PATH`; empty: all pairs")
    ] = ""
    caveat: Annotated[str, about("what the figure does not show")] = ""

    def __post_init__(self) -> None:
        for name in ("pattern", "exclude", "label_pattern"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                refuse(name, getattr(self, name), f"is not a regular expression ({error})")
        for name in ("tables", "splits", "split_lists"):
            if wrong := sorted(set(getattr(self, name)) - {"train", "valid", "test"}):
                refuse(name, wrong[0], "must be train, valid or test")
        if bool(self.label_files) != bool(self.label_pattern):
            refuse("label_pattern", self.label_pattern, "and label_files must be set together")


KINDS: Final[dict[str, Kinds]] = {"label": "utterances", "text": "text", COLUMN: "frames"}
"""Kind of the task of a manifest without a definition, by its column of labels."""
_SPLITS: Final = {name for names in SPLIT_NAMES.values() for name in names}
_CAVEAT: Final = "speakers are not known, so that they may be in several splits"
_REMEDY: Final = (
    "write a YAML file, as in `kind: utterances`, `data: PLACE`, `label: [COLUMN]`, for folders with a `pattern` whose "
    "groups are label, speaker and split"
)


@dataclasses.dataclass(frozen=True)
class Task:
    """A task and its name in tables."""

    name: str
    config: TaskConfig

    @property
    def disjoint(self) -> bool:
        """Whether no speaker is in two splits."""
        return self.config.split_by == "speakers"


def open_task(name: str) -> Task:
    """Reads a task.

    Args:
        name: a definition of conf/task or of a plug-in folder, a YAML file, a manifest, or a folder of classes.

    Raises:
        ConfigError: there is no such task, a field of it is wrong, or data without a definition has several kinds of
            labels or none.
    """
    if is_data(name):
        return Task(definitions.title(name), _of_data(name))
    made = definitions.read("task", name, TaskConfig)
    file = definitions.find("task", name)
    if made.data and not made.data.startswith(("/", "~")) and "://" not in made.data:
        made = dataclasses.replace(made, data=str(file.parent / made.data))
    return Task(definitions.title(name), made)


def is_data(name: str) -> bool:
    """Returns whether a task is given by its data: a manifest, or a folder that is not named like a definition."""
    path = Path(name).expanduser()
    return path.suffix.lower().removeprefix(".") in ENDINGS or (name not in definitions.names("task") and path.is_dir())


def _of_data(name: str) -> TaskConfig:
    """Returns the task of a manifest, by its column of labels, or of a folder with a folder of recordings per class."""
    path = Path(name).expanduser()
    if path.is_dir() and (manifest := manifest_in(path)):
        path = manifest
    if path.is_dir():
        classes = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
        if not classes or all(folder.casefold() in _SPLITS for folder in classes):
            raise ConfigError(
                f"task={name}: needs a folder of recordings per class, and has the folders "
                f"{', '.join(classes) or 'none'}; {_REMEDY}"
            )
        return TaskConfig(
            kind="utterances", data=str(path), pattern="^(?P<label>[^/]+)/", split_by="takes", caveat=_CAVEAT
        )
    if not path.is_file():
        raise ConfigError(f"task={name}: there is no such file")
    fields, columns = ColumnNames({}), dict[str, None]()
    found: set[str] = set()
    for row in read_table(str(path), "task"):
        columns |= dict.fromkeys(row.values)
        found |= {*fields.of(row.values), *row.values}
    labels = [column for column in KINDS if column in found]
    if len(labels) != 1:
        raise ConfigError(
            f"task={name}: needs one of the columns {', '.join(KINDS)}, which say what is measured, and has "
            f"{', '.join(labels) or 'none'}; its columns are: {', '.join(columns)}; {_REMEDY}"
        )
    made = TaskConfig(kind=KINDS[labels[0]], data=str(path))
    return made if found & {"speaker", "split"} else dataclasses.replace(made, split_by="takes", caveat=_CAVEAT)
