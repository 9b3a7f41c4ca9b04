"""The joint embedding: which pairs count, which are positives, its queue, and configs that are refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import IMAGE, Batch, Images
from pretrain.heads.joint_embedding import JointEmbedding
from pretrain.interfaces.frames import StepContext
from pretrain.train_module import TrainModule
from tests.support.contract_cases import HEADS, batch, labelled, make, pictures

CTX = StepContext(seed=3, step=5)
HEAD = HEADS["joint_embedding"]
SECONDS = (0.5, 0.4, 0.6, 0.5)


def module_of(**more: Any) -> tuple[TrainModule, JointEmbedding]:
    module = make("none", heads={"joint": HEAD | more})
    head = module.heads["joint"]
    assert isinstance(head, JointEmbedding)
    with torch.no_grad():  # otherwise the bias of -10 hides what differs
        head.log_scale_P.fill_(math.log(3.0))
        if head.bias_P is not None:
            head.bias_P.fill_(-0.5)
    return module, head


def loss(module: TrainModule, data: Batch) -> tuple[float, int]:
    """Returns the sum and the count."""
    _, metrics = module(data, module.prepare(data, CTX), torch.ones(2, dtype=torch.float64), CTX)
    total, count = metrics["loss/joint"]
    return float(total), int(count)


def vectors(module: TrainModule, head: JointEmbedding, data: Batch) -> dict[str, np.ndarray]:
    with torch.no_grad():
        found = {"speech": head.embed_speech(module.model(data.wave_BT, data.lengths_B))}
        found |= {kind: head.embed(kind, data) for kind in head.kinds[1:]}
    return {kind: value.double().numpy() for kind, value in found.items()}


def reference(found: dict[str, np.ndarray], rows: list[int], together: np.ndarray, kind: str, pair: str) -> float:
    """The published losses in NumPy, over the rows that have both kinds."""
    one, other = pair.split("-")
    cosines = found[one][rows] @ found[other][rows].T
    same = together[np.ix_(rows, rows)]
    if kind == "sigmoid":
        return float(np.log1p(np.exp(np.where(same, -1, 1) * (3.0 * cosines - 0.5))).sum())
    total = 0.0
    for logits in (3.0 * cosines, 3.0 * cosines.T):
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        total -= 0.5 * float((log_p * same).sum(1) @ (1 / same.sum(1)))
    return total


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_the_loss_is_that_of_all_pairs_of_samples_with_both_kinds(kind: str) -> None:
    """Two samples with equal texts are positives of each other; a sample without an image has no pair with one."""
    module, head = module_of(loss=kind)
    module.eval()
    data = labelled(batch(SECONDS), ("one", "two", "one", "three"))
    images = pictures(("a", "b", "c", ""))
    data = dataclasses.replace(data, images={IMAGE: images})
    found, together = vectors(module, head, data), np.eye(4, dtype=bool)
    together[0, 2] = together[2, 0] = True
    expected = sum(
        reference(found, rows, together, kind, pair)
        for pair, rows in (
            ("image-speech", [0, 1, 2]),
            ("speech-text", [0, 1, 2, 3]),
            ("image-text", [0, 1, 2]),
        )
    )
    total, count = loss(module, data)
    assert count == 10
    assert total == pytest.approx(expected, rel=1e-5)


def test_equal_images_are_positives_too() -> None:
    module, _ = module_of(pairs=["speech-image", "speech-text"])
    module.eval()
    data = labelled(batch(SECONDS[:2]), ("one", "two"))
    differing = dataclasses.replace(data, images={IMAGE: pictures(("a", "b"))})
    equal = dataclasses.replace(data, images={IMAGE: pictures(("a", "a"))})
    with torch.no_grad():
        numbers = [module.heads["joint"]._numbers(one) for one in (differing, equal)]
    assert [len(set(of_images[:, 1].tolist())) for of_images in numbers] == [2, 1]
    assert loss(module, differing)[0] != pytest.approx(loss(module, equal)[0])


def test_samples_without_audio_pair_their_text_and_image() -> None:
    """Zero samples of audio: the speech of such a sample is in no pair."""
    module, _ = module_of()
    module.eval()
    data = labelled(batch(SECONDS[:2]), ("one", "two"))
    silent = dataclasses.replace(data, lengths_B=torch.tensor([data.lengths_B[0], 0]))
    assert loss(module, data)[1] == 6
    total, count = loss(module, silent)
    assert count == 4
    changed = dataclasses.replace(silent, wave_BT=silent.wave_BT.clone())
    changed.wave_BT[1] = 0.3
    assert loss(module, changed)[0] == total


def test_the_queue_holds_the_last_embeddings_and_only_those_of_completed_updates() -> None:
    module, head = module_of(queue=5, loss="softmax")
    module.eval()
    head.train()  # its towers have no dropout
    first, second = (labelled(batch(SECONDS[:2], first_seed=n), (f"{n}a", f"{n}b")) for n in (0, 2))
    loss(module, first)
    module.forget()  # the attempt failed
    loss(module, dataclasses.replace(second, micro_batch=1))
    loss(module, first)
    module.after_step(CTX)
    assert head.queue_present_NK.sum(1).tolist() == [0, 3, 3, 3, 3]
    found = vectors(module, head, first)
    for number, kind in enumerate(head.kinds):  # micro-batch 0 before 1, although it ran later
        torch.testing.assert_close(head.queue_NKE[1:3, number].double(), torch.from_numpy(found[kind]))
    kept = {name: value.clone() for name, value in module.state_dict().items() if "queue" in name}
    assert len(kept) == 3
    module.eval()
    alone = loss(module, first)[0]
    module.after_step(CTX)  # an evaluation leaves nothing in the queue
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in kept.items())
    head.queue_present_NK.zero_()
    assert loss(module, first)[0] < alone  # fewer negatives


def test_an_equal_text_in_the_queue_is_no_negative() -> None:
    module, head = module_of(queue=2, pairs=["speech-text", "image-text"])
    module.train()
    data = labelled(batch(SECONDS[:2]), ("one", "two"))
    loss(module, data)
    module.after_step(CTX)
    module.eval()
    others = dataclasses.replace(data, keys=("other-a", "other-b"))
    queue = head.queue_numbers_NI.clone()
    equal = loss(module, others)[0]
    head.queue_numbers_NI.zero_()
    assert loss(module, others)[0] != pytest.approx(equal)
    head.queue_numbers_NI.copy_(queue)
    assert loss(module, others)[0] == equal


def test_texts_that_are_too_long_or_absent_have_no_pair() -> None:
    towers: dict[str, Any] = {"text": {"embedding": {"name": "tokens", "vocabulary": 27, "max_tokens": 4}}}
    encoder = HEAD["towers"]["text"]["encoder"]
    towers["text"]["encoder"] = encoder
    module = make("none", heads={"joint": {"name": "joint_embedding", "towers": towers}})
    assert int(module.prepare(labelled(batch(SECONDS[:2]), ("long one", "two")), CTX).counts_K[1]) == 1
    without = dataclasses.replace(batch(SECONDS[:2]), tokens={})
    assert int(module.prepare(without, CTX).counts_K[1]) == 0
    assert loss(module, without) == (0.0, 0)


def test_images_of_another_size_are_refused() -> None:
    module, _ = module_of()
    data = labelled(batch(SECONDS[:2]), ("one", "two"))
    wrong = Images(torch.zeros(2, 1, 6, 6, dtype=torch.uint8), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(1, 6, 6\) instead of \(1, 8, 8\)"):
        loss(module, dataclasses.replace(data, images={IMAGE: wrong}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pairs": ["speech-video"]}, r"pairs=.*image, text"),
        ({"pairs": ["speech-speech"]}, r"must be two of"),
        ({"pairs": ["speech-text", "text-speech", "text-image"]}, r"different pairs"),
        ({"pairs": ["speech-text"]}, r"image is in none of them"),
        ({"towers": {}}, r"needs a tower beside speech"),
        ({"towers": {"speech": HEAD["towers"]["text"]}}, r"other than speech"),
        ({"towers": {"text": {"embedding": {"name": "words"}}}}, r"no such embedding"),
    ],
)
def test_configs_that_cannot_work_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make("none", heads={"joint": HEAD | values})
