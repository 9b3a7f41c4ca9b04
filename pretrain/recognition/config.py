"""The config of `auricle transcribe`."""

from __future__ import annotations

from typing import Annotated, Literal

from data_pipeline.core.schema import Places, about, config, refuse

Format = Literal["text", "json", "srt", "vtt", "tsv"]


@config
class DecodingConfig:
    """Decoder of a recogniser's output, and its settings."""

    decoder: Annotated[
        Literal["greedy", "beam", "joint", "rescoring", "attention"],
        about(
            "the most probable path; beam search; beam search of an attention decoder with CTC; beam search whose "
            "results an attention decoder ranks; or of an attention decoder alone, as greedy and beam are in a run "
            "that has no other head"
        ),
    ] = "greedy"
    beam: Annotated[int, about("all decoders but greedy: prefixes that are kept", ge=1, le=1_000)] = 16
    lm: Annotated[
        str,
        about("decoder=beam: n-gram model of words in ARPA or KenLM's binary format; only its words are written then"),
    ] = ""
    words: Annotated[str, about("lm: file with the words, one per line; empty: those of the ARPA file")] = ""
    lm_weight: Annotated[float, about("lm: weight of its log10 p beside the acoustics' ln p", ge=0)] = 2.0
    word_bonus: Annotated[float, about("lm: added per word")] = 0.0
    ctc_weight: Annotated[
        float, about("decoder=joint and rescoring: weight of CTC, or the transducer, beside attention", ge=0, lt=1)
    ] = 0.3
    token_bonus: Annotated[
        float, about("decoder=joint and attention: added per token, against the preference of short texts")
    ] = 0.0
    window_seconds: Annotated[
        float, about("longer recordings are computed in overlapping windows of this length", ge=2, le=600)
    ] = 30.0
    overlap_seconds: Annotated[
        float, about("audio that neighbouring windows share; they are joined in its middle", ge=0.5, le=60)
    ] = 4.0

    def __post_init__(self) -> None:
        if self.lm and self.decoder != "beam":
            refuse("lm", self.lm, f"decoder={self.decoder} has no use for it; set decoder=beam")
        if 2 * self.overlap_seconds > self.window_seconds:
            most = self.window_seconds / 2
            refuse("overlap_seconds", self.overlap_seconds, f"at most {most:g}, half of a window")


@config
class TranscribeConfig(DecodingConfig):
    """A transcription: the root of conf/transcribe.yaml."""

    checkpoint: Annotated[str, about("run or checkpoint with a recognising head, or a fine-tuned model", min_length=1)]
    files: Annotated[
        Places,
        about(
            "recordings, folders, shards (folders or URLs), and - for standard input (a sound file, or raw 16-bit "
            "little-endian mono PCM); one, or [a,b,c]",
            min_length=1,
        ),
    ]
    head: Annotated[str, about("name of the head that writes the text; empty: the only one that can")] = ""
    format: Annotated[Format, about("text; json, srt, vtt and tsv have times")] = "text"
    out: Annotated[
        str, about("folder for a file per recording and the list of rejects; empty: everything to standard output")
    ] = ""
    stream: Annotated[
        bool, about("compute chunk by chunk while audio arrives, with text at once; standard input is raw PCM then")
    ] = False
    chunk: Annotated[int | None, about("stream: frames per chunk, a trained length; null: the first of them", ge=1)] = (
        None
    )
    left: Annotated[
        int | None, about("stream: earlier chunks attended to, a trained number (-1: all); null: the first", ge=-1)
    ] = None
    partial: Annotated[bool, about("stream: also the text of segments that have not ended")] = False
    max_minutes: Annotated[float, about("stream: longest recording with left=-1", gt=0)] = 10.0
    pcm_rate: Annotated[int, about("samples per second of raw PCM on standard input", ge=1_000, le=384_000)] = 16_000
    device: Annotated[Literal["auto", "cpu", "cuda"], about("auto takes a GPU where there is one")] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stream and self.decoder in ("joint", "attention"):
            refuse(
                "decoder", self.decoder, "needs the whole of a segment; take greedy, beam or rescoring with stream=true"
            )
        if self.stream and self.lm:
            refuse("lm", self.lm, "with stream=true there is no word model; leave it out")
        if self.stream and self.format in ("srt", "vtt"):
            refuse("format", self.format, "needs the whole recording; take text, json or tsv with stream=true")
        if self.stream and self.out:
            refuse("out", self.out, "with stream=true everything goes to standard output; leave it out")
        if not self.stream:
            for field, value in (("chunk", self.chunk), ("left", self.left), ("partial", self.partial or None)):
                if value is not None:
                    refuse(field, value, "has an effect with stream=true only")
