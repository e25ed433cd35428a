"""What ids count: as somebody counted, else alike; and whether they are ranked where they must be."""

from __future__ import annotations

import pytest
import torch
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor

import embcomp
from embcomp.backends import DNIS, PQ, Blocks, LowDim, LowRank, OptEmbed
from embcomp.backends.base import MethodState, StageInputs
from embcomp.backends.codebooks.clustering import id_weights
from embcomp.backends.dnis.pruning import block_traffic
from embcomp.backends.full import Full
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.errors import ConfigError
from embcomp.layers.id_counts import check_ranked, counted, sums_of_largest
from embcomp.layers.row_sources import as_rows
from embcomp.tables.specs import specs_from_configs

ROWS, TRAINED = 2_000, 100


def tables(count=1, rows=ROWS, dim=8):
    return [
        EmbeddingBagConfig(
            name=f"t{n}", num_embeddings=rows, embedding_dim=dim, feature_names=[f"f{n}"]
        )
        for n in range(count)
    ]


def trained_ids(seed=0):
    """Ids anywhere in the table, as of data that nobody ranked."""
    return (
        torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))[:TRAINED].sort().values
    )


def optembed_with(importance="norm_and_count", share=0.06):
    """A collection whose trained ids have norms ten times those of the rest."""
    method = OptEmbed(target_bytes=int(ROWS * 8 * 4 * share), prune="rows", importance=importance)
    torch.manual_seed(0)
    collection = CompressedEmbeddingBagCollection(tables(), method)
    with torch.no_grad():
        collection.unpooled_rows.embedding_bags["t0"].weight[trained_ids()] *= 10
    return collection.eval()


def kept(collection):
    (state,) = collection.states()
    pruned = state.form.config.pruned_ids(state.tables, state.form)["t0"]
    return (~as_rows(pruned).whole()).nonzero().flatten()


@pytest.mark.parametrize("importance", ["norm_and_count", "norm"])
def test_without_counts_norms_alone_say_which_rows_stay(importance):
    """An id's number is no count: rows are not pruned for being late in the table."""
    left = kept(optembed_with(importance).compact())
    assert torch.isin(trained_ids(), left).float().mean() > 0.9


def test_counts_decide_where_they_are_given():
    counts = torch.zeros(ROWS, dtype=torch.int64)
    often = torch.arange(1, ROWS, 7)
    counts[often] = 1_000
    left = kept(optembed_with().compact(counts={"t0": counts}))
    assert len(left) > 20
    assert torch.isin(left, often).all()  # what never occurs goes, whatever its norm
    left = kept(optembed_with("norm").compact(counts={"t0": counts}))
    assert torch.isin(left, often).all()


def test_saving_takes_counts_too(tmp_path):
    collection = optembed_with()
    counts = {"t0": torch.arange(ROWS)}
    saved = embcomp.save(collection, tmp_path / "artefact", counts=counts)
    assert max(saved.answer_error.values()) < 1e-5
    read = embcomp.load(saved.path)
    batch = KeyedJaggedTensor(
        keys=["f0"], values=torch.arange(ROWS), lengths=torch.ones(ROWS, dtype=torch.int32)
    )
    wanted = collection.compact(counts=counts)(batch).values()
    torch.testing.assert_close(read(batch).values(), wanted)


@pytest.mark.parametrize(
    ("counts", "wanted"),
    [
        ({"t9": torch.ones(ROWS)}, "no table is called 't9'"),
        ({"t0": torch.ones(3)}, "has 2,000 ids; expected a tensor"),
        ({"t0": [1] * ROWS}, "got list"),
        ({"t0": -torch.ones(ROWS)}, "must be finite and at least 0; id 0"),
        ({"t0": torch.full((ROWS,), torch.nan)}, "must be finite"),
    ],
)
def test_counts_that_cannot_be_are_refused_by_name(counts, wanted):
    with pytest.raises(ConfigError, match=wanted):
        optembed_with().compact(counts=counts)


def test_ids_that_nobody_counted_count_alike_everywhere():
    (table,) = specs_from_configs(tables(rows=10))
    for none in ({}, {"t0": torch.zeros(10)}, {"t0": torch.zeros(0)}):
        assert counted(table, none) is None
        assert id_weights([table], none)["t0"].whole().tolist() == [1.0] * 10
    assert block_traffic(table, None, (4,), 1.0) == [0.4, 0.6]


def test_an_ids_number_does_not_matter_where_nobody_counted():
    """The same rows in another order have the same best approximation, row by row."""
    own = specs_from_configs(tables(rows=600))
    rows = torch.randn(600, 8, generator=torch.Generator().manual_seed(1))
    method = LowRank(latent_dim=2)
    found = []
    for each in (rows, rows.flip(0)):
        form = MethodState(config=Full(), tensors={"rows.t0": each})
        past = StageInputs(before=form, initial=lambda form=form: form)
        found.append(method.start_stage(method.stages()[-1], own, past).rows("t0").whole())
    torch.testing.assert_close(found[0], found[1].flip(0))


FALLING = torch.arange(ROWS, 0, -1)
RISING = torch.arange(1, ROWS + 1)
NEEDING = {
    "dnis": DNIS(budget="10%"),
    "blocks": Blocks(widths={"t0": (8, 2)}, cuts={"t0": (200,)}),
    "low_dim": LowDim(kept={"t0": 200}),
}


@pytest.mark.parametrize("name", NEEDING)
def test_methods_that_need_ranked_ids_refuse_others_by_name(name):
    method, own = NEEDING[name], specs_from_configs(tables())
    assert method.needs_ranked_ids
    method.check_ids(own, {"t0": FALLING})
    method.check_ids(own, {})  # nobody counted: nothing is known
    with pytest.raises(ConfigError, match=f"{name}: ids of table 't0' are not ranked"):
        method.check_ids(own, {"t0": RISING})
    with pytest.raises(ConfigError, match="embcomp prepare"):
        method.check_ids(own, {"t0": torch.randint(1, 9, (ROWS,)).double().exp()})


def test_the_two_first_ids_of_prepared_datasets_may_be_rare():
    (table,) = specs_from_configs(tables())
    counts = torch.cat([torch.zeros(2, dtype=torch.int64), FALLING[:-2]])
    check_ranked("m", table, {"t0": counts}, (3, 10, 500), "")


def test_methods_that_place_ids_by_name_need_no_order():
    for method in (OptEmbed(), PQ(subvector_dim=4), LowDim(width=2), Blocks(widths={"t0": (8,)})):
        assert not method.needs_ranked_ids
        method.check_ids(specs_from_configs(tables()), {"t0": RISING})


def test_a_search_on_unranked_ids_stops_before_it_begins():
    own = specs_from_configs(tables())
    form = MethodState(config=Full(), tensors={"rows.t0": torch.randn(ROWS, 8)})
    past = StageInputs(before=form, initial=lambda: form, counts={"t0": RISING})
    method = DNIS(serve_bytes=10_000)
    with pytest.raises(ConfigError, match="not ranked by frequency"):
        method.start_stage(method.stages()[1], own, past)


@pytest.mark.parametrize("kind", ["counts", "fractions", "alike"])
def test_sums_of_the_largest_are_those_of_sorted_values(kind, monkeypatch):
    monkeypatch.setattr("embcomp.layers.id_counts._AT_ONCE", 700)
    random = torch.Generator().manual_seed(3)
    values = {
        "counts": (1e5 / (1 + torch.rand(5000, generator=random) * 5000)).long(),
        "fractions": torch.rand(5000, generator=random, dtype=torch.float64) ** 9,
        "alike": torch.full((5000,), 7),
    }[kind]
    asked = [1, 2, 699, 2500, 4999, 5000, 6000]
    best = values.double().sort(descending=True).values.cumsum(0)
    wanted = [float(best[min(count, 5000) - 1]) for count in asked]
    assert sums_of_largest(values, asked) == pytest.approx(wanted, rel=1e-12)
