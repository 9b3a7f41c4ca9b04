"""Weights that do not learn travel once to each device; a round then sends the weights that learn alone.

With prompts, LoRA, adapters or heads alone (`tune`), nearly all weights are such a base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from pretrain.federated.messages import MODEL


def split(state: Mapping[str, Tensor], learned: Collection[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the tensors of a state as `model/NAME`: those named in `learned`, and all others, the base."""
    parts: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for name, tensor in state.items():
        parts[name not in learned][MODEL + name] = tensor
    return parts


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Returns the sha256 of names, types, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{name} {plain.dtype} {list(plain.shape)}\n".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class BaseDigest:
    """The digest of a base, computed again only where one of its tensors was changed.

    PyTorch counts changes in place of a tensor, also of its detached views, but not those through `.data`; after these,
    `forget` is called.
    """

    def __init__(self) -> None:
        self._seen: list[tuple[str, int, int]] = []
        self._digest = ""

    def of(self, tensors: Mapping[str, Tensor]) -> str:
        """Returns `digest(tensors)`."""
        seen = [(name, tensor.data_ptr(), tensor._version) for name, tensor in tensors.items()]
        if not self._digest or seen != self._seen:
            self._seen, self._digest = seen, digest(tensors)
        return self._digest

    def forget(self) -> None:
        """Computes the digest at the next call, whatever is counted."""
        self._digest = ""


class SentBase:
    """What the server sent: the digest of the newest base, and the devices that have it.

    A teacher that follows the weights changes the base in every round, and is then sent in every round.
    """

    def __init__(self) -> None:
        self._digest = ""
        self._holders: set[str] = set()

    def held(self, digest: str, names: Iterable[str]) -> bool:
        """Returns whether any of these devices has the base with this digest, so that it need not be sent to all."""
        if digest != self._digest:
            self._digest = digest
            self._holders.clear()
        return not self._holders.isdisjoint(names)

    def note(self, names: Iterable[str]) -> None:
        """Notes devices that were sent the newest base."""
        self._holders.update(names)


class HeldBase:
    """The base that a device holds."""

    def __init__(self) -> None:
        self._digest = ""
        self._tensors: dict[str, Tensor] = {}

    def complete(
        self, sent: Mapping[str, Tensor], digest: str, names: Collection[str], learned: Collection[str]
    ) -> dict[str, Tensor] | None:
        """Returns all weights of a request, and keeps the base where the request has it.

        Args:
            sent: the request's tensors, as `model/NAME`.
            digest: of the base that belongs to them.
            names: all tensors of the model.
            learned: names of those that learn.

        Returns:
            `model/NAME` -> tensor; None where the base is neither in the request nor held.
        """
        if all(MODEL + name in sent for name in names):
            self._digest = digest
            self._tensors = {MODEL + name: sent[MODEL + name] for name in names if name not in learned}
            return dict(sent)
        return {**self._tensors, **sent} if digest == self._digest else None
