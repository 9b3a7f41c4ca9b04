"""The probing tasks: corpora, labels, pooling and splits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from data_pipeline.core.schema import ConfigError, did_you_mean, suggest
from pretrain.evaluate.features import mean_and_deviation, quarters
from pretrain.evaluate.manifest import Utterance


@dataclass(frozen=True)
class Task:
    """A probing task.

    corpora: default corpora.  target: returns the class of an utterance; None: frames are classified by phone.
    pool: maps (L, F, D) features to one vector, (L, D').
    hold_out: n, if classes cannot be evaluated on the manifest's speaker-disjoint splits: every n-th utterance of a
    class is for test, and the one after it for validation. 0: use the manifest's splits.
    """

    name: str
    corpora: tuple[str, ...]
    target: Callable[[Utterance], str] | None
    pool: Callable[[Tensor], Tensor]
    hold_out: int = 0
    caveat: str = ""


PROBES = {
    "phones": Task("phones", ("speechocean762",), None, quarters),
    "keywords": Task("keywords", ("speech_commands_v1",), lambda u: u.label, quarters),
    "digits": Task("digits", ("arabic_speech_commands",), lambda u: u.label, quarters),
    "speaker": Task("speaker", ("speechocean762",), lambda u: u.speaker, mean_and_deviation, hold_out=5),
    "language": Task(
        "language",
        ("asterisk-core-sounds",),
        lambda u: u.language,
        mean_and_deviation,
        hold_out=5,
        caveat="one voice per language, except for en and es: the probe may recognise voices instead of languages",
    ),
}
MEASURES = ("abx", "pnmi", "rankme")
RECOGNITION = ("asr", "streaming")
"""Tasks of recognisers, which have a head; all other tasks are of encoders."""


def splits(
    task: Task, utterances: Sequence[Utterance], corpora: Sequence[str], most: int, ask: str = "test"
) -> list[list[Utterance]]:
    """Returns the splits train, valid and test.

    Args:
        task: the task.
        utterances: all utterances of the manifest.
        corpora: corpora to use; empty: the task's default.
        most: maximum number of utterances per split; 0: all.
        ask: split that is evaluated. "valid": the manifest's valid becomes test, and a few speakers of train valid.

    Raises:
        ConfigError: a split is empty.
    """
    chosen = [u for u in utterances if u.corpus in (corpora or task.corpora)]
    if task.hold_out and task.target:
        parts: list[list[Utterance]] = [[], [], []]
        seen: dict[str, int] = {}
        for u in chosen:
            turn = seen[task.target(u)] = seen.get(task.target(u), -1) + 1
            parts[2 if turn % task.hold_out == 0 else 1 if turn % task.hold_out == 1 else 0].append(u)
    else:
        parts = [[u for u in chosen if u.split == split] for split in ("train", "valid", "test")]
    if not all(parts):
        names = sorted({u.corpus for u in utterances})
        near = [found for name in corpora if name not in names and (found := suggest(name, names))]
        hint = did_you_mean(f"corpora={','.join(near)}" if near else "")
        raise ConfigError(
            f"task={task.name}: needs utterances of {', '.join(corpora or task.corpora)} in the splits train, valid "
            f"and test of the manifest, which has the corpora {', '.join(names)}{hint}"
        )
    if ask == "valid" and task.hold_out:
        parts = [parts[0], parts[2], parts[1]]
    elif ask == "valid":
        kept = sorted({u.speaker for u in parts[0]})[::6]
        inner = [u for u in parts[0] if u.speaker in kept]
        parts = [[u for u in parts[0] if u.speaker not in kept], inner, parts[1]]
    # every n-th, so that few utterances still have many speakers
    return [part[:: -(-len(part) // most)] if most else part for part in parts]
