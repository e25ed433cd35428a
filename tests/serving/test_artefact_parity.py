"""`embcomp.save` writes what answers as the collection does, or says that it would not."""

from __future__ import annotations

import pytest
import torch

from embcomp import save
from embcomp.backends import Full, Matryoshka, OptEmbed
from embcomp.collection.collection import (
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
)
from embcomp.errors import ParityError
from embcomp.serving.artefact_parity import _sampled_ids, sampled_batches
from embcomp.testing.cases import pooled, unpooled
from embcomp.testing.check_data import awkward_tables, plain_tables
from tests.helpers.backends_under_test import CASES


@pytest.mark.parametrize("kind", ["pooled", "unpooled"])
@pytest.mark.parametrize(
    "config",
    [Matryoshka(budget="50%"), OptEmbed(budget="50%"), OptEmbed(budget="40%", prune="rows")],
    ids=["matryoshka", "optembed", "optembed rows"],
)
def test_a_form_that_cuts_is_refused_and_saved_when_asked_for(config, kind, tmp_path):
    tables = plain_tables(8)
    if kind == "pooled":
        collection = CompressedEmbeddingBagCollection([t.bag() for t in tables], config)
    else:
        collection = CompressedEmbeddingCollection([t.unpooled() for t in tables], config)
    before = {name: value.clone() for name, value in collection.state_dict().items()}
    with pytest.raises(ParityError, match=r"table 't\d' \(\w+\) differs by .*collection.compact"):
        save(collection, tmp_path / "a")
    assert not list(tmp_path.iterdir()) and collection.training
    for name, value in collection.state_dict().items():
        assert torch.equal(value, before[name])
    saved = save(collection.compact(), tmp_path / "a")
    assert set(saved.answer_error) == {t.name for t in tables}
    assert max(saved.answer_error.values()) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_every_serving_form_is_compared_with_what_was_trained(case, tmp_path):
    tables = awkward_tables((10, 6, 3))
    exact = save(pooled(CASES[case], tables), tmp_path / "a")
    narrow = save(unpooled(CASES[case], awkward_tables((8, 8, 8))), tmp_path / "b", row_type="int4")
    assert max(exact.answer_error.values()) < 1e-5
    assert all(error < 0.1 for error in narrow.answer_error.values())


def test_a_method_that_serves_something_else_is_not_saved(tmp_path, monkeypatch):
    def wrong(self, tables, form):
        rows = {name: tensor * 1.001 for name, tensor in form.tensors.items()}
        return type(form)(config=form.config, tensors=rows)

    collection = pooled(CASES["full"], awkward_tables((8, 8, 8)))
    monkeypatch.setattr(Full, "compact", wrong)
    with pytest.raises(ParityError, match="differs by"):
        save(collection, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_sampled_ids_reach_both_ends_of_every_table():
    tables = awkward_tables((8, 8, 8))
    collection = pooled(CASES["full"], tables)
    for batch in sampled_batches(collection.plan, is_weighted=False):
        for table in tables:
            for name in table.features:
                ids = batch[name].values()
                smallest = min(t.rows for t in tables if name in t.features)
                assert ids.min() == 0 and ids.max() == smallest - 1
                assert len(ids.unique()) == smallest


@pytest.mark.parametrize("size", [1, 300, 2**24 + 1, 24 << 20, 2**31 + 3])
def test_ids_are_sampled_within_tables_of_any_size(size):
    ids = _sampled_ids(size, torch.Generator().manual_seed(0))
    assert len(ids) == 1024 and int(ids.min()) == 0 and int(ids.max()) == size - 1
