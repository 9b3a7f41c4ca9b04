"""The configs of `auricle embed` and `auricle search`."""

from __future__ import annotations

from typing import Annotated, Literal

from data_pipeline.core.schema import Places, about, config, refuse


@config
class EmbedderConfig:
    """A run whose joint embedding is used."""

    checkpoint: Annotated[str, about("run or checkpoint with a head joint_embedding", min_length=1)]
    head: Annotated[str, about("name of the head; empty: the only one of its kind")] = ""
    batch: Annotated[int, about("recordings, texts or images that are computed together", ge=1, le=1024)] = 16
    device: Annotated[Literal["auto", "cpu", "cuda"], about("auto: a GPU if there is one")] = "cpu"


@config
class EmbedConfig(EmbedderConfig):
    """Vectors of files: the root of conf/embed.yaml."""

    files: Annotated[
        Places,
        about(
            "sound or image files, folders of them, or folders or URLs of shards (audio, text and image of a segment)"
        ),
    ] = ()
    texts: Annotated[Places, about("texts to embed as well, [one,another]")] = ()
    out: Annotated[str, about("file to write: NAME.parquet, or NAME.npy and NAME.jsonl beside it", min_length=1)]

    def __post_init__(self) -> None:
        if not self.files and not self.texts:
            refuse("files", [], "give files=FOLDER, texts=[…], or both")
        if not self.out.endswith((".parquet", ".npy")):
            refuse("out", self.out, "must end in .parquet or .npy")


@config
class SearchConfig(EmbedderConfig):
    """A search: the root of conf/search.yaml."""

    index: Annotated[
        Places,
        about(
            "what is searched: a Parquet file of `auricle embed`, or files and folders as its files=, embedded first",
            min_length=1,
        ),
    ]
    query: Annotated[str, about("a text, or a sound or image file", min_length=1)]
    query_kind: Annotated[
        Literal["auto", "text", "speech", "image"],
        about("auto: a file if there is one of this name, by its ending, and a text otherwise"),
    ] = "auto"
    kinds: Annotated[tuple[Literal["text", "speech", "image"], ...], about("kinds of results; empty: all of them")] = ()
    top: Annotated[int, about("number of results", ge=1, le=10_000)] = 10
    format: Annotated[Literal["table", "json"], about("of the results on the terminal")] = "table"
    gallery: Annotated[str, about("HTML file to write, with a player or picture for each result; empty: none")] = ""

    def __post_init__(self) -> None:
        if self.gallery and not self.gallery.endswith((".html", ".htm")):
            refuse("gallery", self.gallery, "must end in .html")
