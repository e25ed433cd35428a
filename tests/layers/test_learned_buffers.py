"""Learnt buffers know whether anyone filled them, wherever their memory comes from.

They fill themselves where nobody has, and not where something is about to come.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from embcomp.backends import LR2VQ, Coded
from embcomp.backends.codebooks.coded import CodedRoute
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.layers.learned_buffers import LearnedBuffers, overwriting
from embcomp.testing.cases import embed_ids
from embcomp.testing.check_data import plain_tables
from tests.helpers.backends_under_test import CASES

TABLES = plain_tables(8, rows=(200, 300))
CONFIGS = [table.bag() for table in plain_tables(dim=16)]
META = torch.device("meta")


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
    monkeypatch.setattr(
        CodedRoute,
        "_hashes",
        lambda self, table, part: hashed.append(table.name) or hashes(self, table, part),
    )
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
    assert sorted(hashed) == [table.name for table in TABLES]


def learned(collection):
    return [module for module in collection.modules() if isinstance(module, LearnedBuffers)]


def build(case, device=None):
    torch.manual_seed(0)
    return CompressedEmbeddingBagCollection(CONFIGS, CASES[case].config, device=device)


def buffers_of(collection):
    return {
        f"{n}.{name}": value
        for n, module in enumerate(learned(collection))
        for name, value in module.state_dict().items()
        if name in dict(module.named_buffers())
    }


WITH_BUFFERS = [case for case in CASES if learned(build(case, META))]


def test_there_are_methods_with_learnt_buffers():
    assert len(WITH_BUFFERS) > 3


@pytest.fixture
def memory_of_ones(monkeypatch):
    """Memory that nobody initialised, as it often is: of what lay there before."""
    full_like = torch.full_like
    monkeypatch.setattr(torch, "empty_like", lambda t, **settings: full_like(t, 1, **settings))


@pytest.mark.parametrize("start", [META, None], ids=["meta", "cpu"])
@pytest.mark.parametrize("case", WITH_BUFFERS)
def test_memory_that_nobody_initialised_is_not_taken_for_filled(case, start, memory_of_ones):
    wanted = buffers_of(build(case))
    found = buffers_of(build(case, start).to_empty(device="cpu"))
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    "move",
    [
        lambda module: module.to("cpu"),
        lambda module: module.double(),
        lambda module: module.share_memory(),
        copy.deepcopy,
        lambda module: pickle.loads(pickle.dumps(module)),
        lambda module: torch.nn.ModuleList([module]).to_empty(device="cpu")[0],
    ],
    ids=["to", "double", "share_memory", "deepcopy", "pickle", "to_empty"],
)
def test_what_was_learnt_moves_with_its_module_unless_it_is_emptied(move, request):
    case = build(WITH_BUFFERS[0])
    for module in learned(case):
        module.ensure_filled()
    moved = move(case)
    emptied = request.node.callspec.id == "to_empty"
    assert {bool(module.filled) for module in learned(moved)} == {not emptied}


def test_a_state_dict_fills_what_was_emptied(memory_of_ones):
    source = build("coded")
    collection = build("coded", META).to_empty(device="cpu")
    for module in learned(source):
        module.ensure_filled()
        for name, buffer in module.named_buffers():
            if name != "filled":
                buffer.copy_(buffer.flip(0))
    collection.load_state_dict(source.state_dict())
    wanted = buffers_of(source)
    for name, value in buffers_of(collection).items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=0)
