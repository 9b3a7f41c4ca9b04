"""The config of `auricle speak`."""

from __future__ import annotations

from typing import Annotated, Literal

from data_pipeline.core.schema import about, config, refuse

STDOUT = "-"
"""Value of `out` for standard output."""


@config
class SpeakConfig:
    """A synthesis: the root of conf/speak.yaml."""

    checkpoint: Annotated[
        str, about("run or checkpoint with a head that speaks: synthesis, or units with audio", min_length=1)
    ]
    text: Annotated[str, about("text to speak; or give a file")] = ""
    file: Annotated[str, about("text file, each line of which is spoken into a file of its own in the folder out")] = ""
    out: Annotated[
        str,
        about(
            "text: a sound file, by its ending .wav, .flac or .ogg, or - for raw 16-bit little-endian mono PCM at "
            "16 kHz, sentence by sentence; file: a folder",
            min_length=1,
        ),
    ]
    head: Annotated[str, about("name of the head; empty: the only one")] = ""
    voice: Annotated[str, about("recording of a second or more whose voice is taken; empty: the learned voice")] = ""
    style: Annotated[
        str, about('words such as "a child, slow and high", for a head trained with style_words; empty: none')
    ] = ""
    speed: Annotated[float, about("rate of speech beside the learned one", ge=0.25, le=4)] = 1.0
    pitch: Annotated[float, about("semitones up or down; needs a head with pitch", ge=-24, le=24)] = 0.0
    energy: Annotated[float, about("decibels up or down", ge=-30, le=30)] = 0.0
    temperature: Annotated[
        float, about("of the draws of units, or of mel frames with decoder=flow; 0: the most probable", ge=0, le=10)
    ] = 1.0
    top_p: Annotated[float, about("probability of the most probable units among which is drawn", gt=0, le=1)] = 0.9
    steps: Annotated[int, about("of Euler's method, with decoder=flow", ge=1, le=1_000)] = 10
    seed: Annotated[int, about("of all draws; equal seeds speak equally", ge=0)] = 0
    vocoder: Annotated[
        Literal["istft", "griffin_lim"], about("the trained one, or Griffin-Lim's iteration for comparison")
    ] = "istft"
    language: Annotated[
        Literal["en", "zh", "none"],
        about("language in which numbers, dates and units are written out by the package wetext; none: not at all"),
    ] = "en"
    pause: Annotated[float, about("seconds of silence between sentences", ge=0, le=5)] = 0.2
    max_words: Annotated[int, about("longest text, in words", ge=1, le=1_000_000)] = 5_000
    device: Annotated[Literal["auto", "cpu", "cuda"], about("auto takes a GPU where there is one")] = "auto"

    def __post_init__(self) -> None:
        if not self.text.strip() and not self.file:
            refuse("text", self.text, "has no word to speak; give text=… or file=…")
        if self.text and self.file:
            refuse("file", self.file, "give text=… or file=…, one of them")
        if self.file and self.out == STDOUT:
            refuse("out", self.out, "each line of a file gets a sound file; name a folder")
