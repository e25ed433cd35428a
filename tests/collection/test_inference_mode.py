"""Whatever is made once, in `torch.inference_mode()` as anywhere else, serves training next."""

from __future__ import annotations

import pytest
import torch

from embcomp.layers import host_values
from embcomp.testing.cases import pooled, unpooled
from embcomp.testing.check_data import awkward_tables, random_batch
from tests.helpers.backends_under_test import CASES


def total(answer) -> torch.Tensor:
    if isinstance(answer, dict):
        return torch.stack([each.values().sum() for each in answer.values()]).sum()
    return answer.values().sum()


@pytest.mark.parametrize("make", [pooled, unpooled])
@pytest.mark.parametrize("at_hand", [True, False], ids=["cpu", "elsewhere"])
@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_after_an_evaluation(case, at_hand, make, monkeypatch):
    if not at_hand:
        monkeypatch.setattr(host_values, "AT_HAND", frozenset())
    tables = awkward_tables((8, 8, 8))
    model, batch = make(CASES[case], tables), random_batch(tables, seed=3)
    with torch.inference_mode():
        model.eval()(batch)
    total(model.train()(random_batch(tables, seed=4))).backward()
