"""Records with which objectives and heads describe themselves to monitoring.

Monitoring obtains a `MonitoringRecord` from the objective (code books, chance levels, deviations, targets) and a
`HeadMonitoringRecord` from each head, and never accesses their parts by name. Sums over the whole update (code counts,
hits, losses) are metrics of `LossOutput`; the records name those metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

CODE_COUNTS = "hist/codes"
"""The metric with the counts of an objective's code books; of several such metrics, each has a suffix "/…"."""
INFEASIBLE = "infeasible"
"""The metric of heads that counts labelled rows that cannot be used, among all labelled rows."""


class CodeBook(NamedTuple):
    """One book of discrete codes: the bins `first` … `first + size - 1` of the metric `metric` count their use."""

    metric: str
    first: int
    size: int
    title: str
    """For messages, such as "the targets of code book 2 of 4"."""


class HeadMedia(NamedTuple):
    """Holds pictures and audio of one utterance that a head makes for TensorBoard.

    images: by name, each (rows, columns) of any range; rows from below.  audio: by name, (T,) samples at 16 kHz.
    """

    images: Mapping[str, Tensor]
    audio: Mapping[str, Tensor]

    def on_host(self) -> HeadMedia:
        """Returns the same in fp32 on the CPU, without gradients."""
        return HeadMedia(*({name: values.detach().float().cpu() for name, values in kind.items()} for kind in self))


class MicroBatchRecord(NamedTuple):
    """Targets and predictions of one micro-batch, for the original utterances (not for additional views or copies).

    N counts the True entries of `mask_BF`, row by row. Fields that do not apply to an objective are None: regressions
    have vectors and no units, classifications units and no vectors, contrastive objectives both.
    """

    mask_BF: Tensor
    """(B, F) bool: frames that are masked and have a target."""
    target_units_N: Tensor | None = None
    """(N,) int64, the code or unit of each masked frame; -1 where a label is missing."""
    predicted_units_N: Tensor | None = None
    """(N,) int64, the model's prediction for each masked frame."""
    targets_ND: Tensor | None = None
    """(N, D) target vectors."""
    predictions_ND: Tensor | None = None
    """(N, D) predicted vectors."""
    target_inputs_XD: Tensor | None = None
    """(X, D) input of a fixed quantiser of targets; should have mean 0 and deviation 1."""

    def detached(self) -> MicroBatchRecord:
        """Returns the record without gradients."""
        return MicroBatchRecord(*(None if part is None else part.detach() for part in self))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class MonitoringRecord:
    """Describes an objective to monitoring. Metrics are named as in `LossOutput.metrics`."""

    loss: str
    """The metric that holds the loss per target, without regularisers."""
    accuracy: str | None = None
    """The metric that counts correct predictions; ties do not count."""
    chance_loss: str | None = None
    """The metric that sums the loss of a uniform guess over each target's own candidates. None: the chance level is
    the entropy of the books."""
    chance_accuracy: str | None = None
    """The metric that sums the probability that such a guess is right. None: the share of the most frequent code."""
    target_deviation: str | None = None
    """The metric with the standard deviation of the target vectors over frames. None: the targets are not vectors."""
    prediction_deviation: str | None = None
    """The same of the predicted vectors. Both fall to 0 when the representations collapse."""
    books: tuple[CodeBook, ...] = ()
    fixed_targets: bool = False
    """Whether the targets exist before the first update, so that they can be checked before it."""
    target_version: int = 0
    """Increases whenever the targets are replaced during the run (re-labelling), so that learning starts again."""
    last: MicroBatchRecord | None = None
    """The first micro-batch after `Objective.record_next`; None before."""

    @classmethod
    def of_regression(cls, last: MicroBatchRecord | None) -> MonitoringRecord:
        """Returns the record of a regression to vectors with the metrics health/target_std and health/prediction_std.

        Args:
            last: as the field.
        """
        deviations = ("health/target_std", "health/prediction_std")
        return cls("loss/objective", target_deviation=deviations[0], prediction_deviation=deviations[1], last=last)

    @property
    def count_metrics(self) -> frozenset[str]:
        """The metrics that are vectors: how often each code of the books occurred."""
        return frozenset(book.metric for book in self.books)


@dataclass(frozen=True, slots=True)
class HeadMonitoringRecord:
    """Describes a head to monitoring. Metrics are named as in the head's `LossOutput.metrics`."""

    infeasible: str | None = None
    """The metric that counts labelled rows that the head cannot use, of all labelled rows. None: it uses them all."""


def books_of(metric: str, sizes: tuple[int, ...]) -> tuple[CodeBook, ...]:
    """Returns the code books whose counts are concatenated in one metric.

    Args:
        metric: name of the metric with the counts.
        sizes: number of codes of each book, in order.
    """
    n = len(sizes)
    titles = ["the targets"] if n == 1 else [f"the targets of code book {i} of {n}" for i in range(1, n + 1)]
    return tuple(CodeBook(metric, sum(sizes[:i]), size, titles[i]) for i, size in enumerate(sizes))
