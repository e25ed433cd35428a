"""Tables, selections and forms for the tests of DNIS."""

from __future__ import annotations

from dataclasses import replace

import torch

from embcomp import CompressedEmbeddingBagCollection, DNISSearch
from embcomp.collection.group_states import GroupState
from embcomp.tables.specs import TableSpec
from embcomp.testing.check_data import plain_tables

CUTS = {"t0": (5, 20), "t1": (30,), "t2": (10, 11, 40)}


def spec(name="t0", rows=60, dim=8):
    return TableSpec(
        name=name, num_embeddings=rows, embedding_dim=dim, feature_names=(name.replace("t", "f"),)
    )


def mixed_tables():
    """Tables of two widths, so that their selections are grouped and put back in order."""
    return [replace(table, dim=dim) for table, dim in zip(plain_tables(), (8, 4, 8))]


def collection_of(tables, plan):
    torch.manual_seed(0)
    return CompressedEmbeddingBagCollection([t.bag() for t in tables], plan).eval()


def holding(tables, form):
    """A collection in a form, filled with its tensors."""
    collection = collection_of(tables, form.config)
    group = GroupState(tables=collection.plan.tables, form=form)
    collection.load_states([group])
    return collection


def searched(tables, **options):
    """A search form with random selections, a third of them closed."""
    collection = collection_of(tables, DNISSearch(cuts=CUTS, **options))
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for alpha in collection.combine.parameters():
            alpha.copy_((torch.rand(alpha.shape, generator=random) * 1.5 - 0.5).clamp(0, 1))
    return collection
