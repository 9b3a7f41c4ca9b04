"""The head of a kind in a run, and the device."""

from __future__ import annotations

import pytest
import torch

from data_pipeline.core.schema import ConfigError
from pretrain.checkpointing.head_choice import chosen_device, chosen_head
from pretrain.heads.ctc import CTC
from pretrain.heads.separation import Separation
from pretrain.train_module import build_model
from tests.support.training import config

CTC_HEAD = {"name": "ctc", "symbols": " ab"}


def test_the_only_head_of_its_kind_needs_no_name_and_one_of_several_does() -> None:
    for heads in ({"text": CTC_HEAD}, {"text": CTC_HEAD, "other": CTC_HEAD}):
        settings = config(heads=heads)
        module = build_model(settings)
        given = ("runs/x", module, settings, CTC)
        assert chosen_head(*given, "text", "that reads", "train one") == ("text", module.heads["text"])
        with pytest.raises(ConfigError, match=r"my\.head=tex: must be one of .*did you mean text.*text \(ctc\)"):
            chosen_head(*given, "tex", "that reads", "train one", field="my.head")
        with pytest.raises(ConfigError, match=r"no head that parts; it has .*text \(ctc\).*; train one"):
            chosen_head("runs/x", module, settings, Separation, "", "that parts", "train one")
    with pytest.raises(ConfigError, match="head='': must be one of other, text"):
        chosen_head(*given, "", "that reads", "train one")
    settings = config(heads={"text": CTC_HEAD})
    assert chosen_head("runs/x", build_model(settings), settings, CTC, "", "that reads", "train one")[0] == "text"


@pytest.mark.parametrize("present", [False, True])
def test_auto_is_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch, present: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    assert chosen_device("auto") == ("cuda" if present else "cpu")
    assert chosen_device("cpu") == "cpu"
    if present:
        assert chosen_device("cuda") == "cuda"
    else:
        with pytest.raises(ConfigError, match="device=cuda: this machine has no CUDA device"):
            chosen_device("cuda")
