"""Offloading to a disk says what it lacks."""

from __future__ import annotations

import pytest

from pretrain.engines import deepspeed


def test_what_nvme_offload_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspeed.ops.op_builder.AsyncIOBuilder.is_compatible", lambda *_, **__: False)
    with pytest.raises(ValueError, match="install libaio-dev"):
        deepspeed._require_nvme()
