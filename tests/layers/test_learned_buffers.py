"""Learnt buffers fill themselves where nobody has, and not where something is about to come."""

from __future__ import annotations

import pytest
import torch

from embcomp.backends import LR2VQ, Coded
from embcomp.backends.codebooks.coded import CodedRoute
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.layers.learned_buffers import LearnedBuffers, overwriting
from embcomp.testing.cases import embed_ids
from embcomp.testing.check_data import plain_tables

TABLES = plain_tables(8, rows=(200, 300))


class Counted(LearnedBuffers):
    def __init__(self):
        super().__init__()
        self.fills = 0
        self.register_buffer("own", torch.zeros(3))

    def reset_buffers(self):
        self.fills += 1
        self.own.fill_(7)


def test_what_is_overwritten_is_not_filled_first():
    module = torch.nn.ModuleDict({"inner": Counted()})
    with overwriting(module):
        module.load_state_dict({"inner.own": torch.arange(3.0), **module.state_dict()}, strict=True)
    with overwriting(module):
        module.state_dict()["inner.own"].copy_(torch.arange(3.0))
    module["inner"].ensure_filled()
    assert module["inner"].fills == 0
    assert module["inner"].own.tolist() == [0, 1, 2]


@pytest.mark.parametrize("names", [{"own"}, {"inner.own"}, {"other", "inner.own"}])
def test_names_may_be_those_of_a_wrapped_module(names):
    module = torch.nn.ModuleDict({"inner": Counted()})
    with overwriting(module, names):
        module.state_dict()
    assert module["inner"].fills == 0


def test_what_does_not_come_is_filled():
    module = torch.nn.ModuleDict({"inner": Counted()})
    with overwriting(module, {"inner.another", "er.own"}):
        assert module.state_dict()["inner.own"].tolist() == [7, 7, 7]
    with pytest.raises(RuntimeError, match="stopped"), overwriting(fresh := Counted()):
        raise RuntimeError("stopped")
    assert fresh.state_dict()["own"].tolist() == [7, 7, 7]


def collection_of(method):
    torch.manual_seed(0)
    return CompressedEmbeddingBagCollection([t.bag() for t in TABLES], method).eval()


def test_codes_are_not_hashed_to_be_replaced(monkeypatch):
    hashed = []
    hashes = CodedRoute._hashes
    monkeypatch.setattr(CodedRoute, "_hashes", lambda self: hashed.append(1) or hashes(self))
    compacted = collection_of(LR2VQ(subvector_dim=4, num_codewords=8)).compact()
    answers = embed_ids(compacted, TABLES)
    other = collection_of(compacted.plan)
    other.load_states(compacted.states())
    assert not hashed
    for key, rows in embed_ids(other, TABLES).items():
        assert torch.equal(rows, answers[key])
    # Codes that nobody brings are hashes as before.
    fresh = collection_of(Coded(subvector_dim=4, num_codewords=8))
    fresh.load_states([])
    embed_ids(fresh, TABLES)
    assert hashed == [1]
