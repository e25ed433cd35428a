"""Deep hash embeddings: no table, but a network that decodes hashes of ids."""

from __future__ import annotations

import pytest
import torch

from embcomp import DHE, Hash, load, save
from embcomp.layers.hashing import hash_rows, table_salt
from embcomp.tables.specs import specs_from_configs
from embcomp.testing import BackendCase
from embcomp.testing.cases import embed_ids, pooled
from embcomp.testing.check_data import batch_of, plain_tables
from embcomp.testing.planted import plant
from tests.helpers.learned_cases import Clicks, auc, fit
from tests.helpers.long import long_but

TABLES = plain_tables(6, rows=(90, 60))
METHOD = DHE(hidden_dim=4, num_hashes=5)


def test_an_embedding_is_the_network_of_its_tables_hashes():
    collection = pooled(BackendCase(config=METHOD), TABLES)
    state = collection.state_dict()
    inside = "combine.combines.dhe.networks.table@t1"
    with torch.no_grad():
        state[f"{inside}.bias_0"].uniform_()
        state["unpooled_rows.embedding_bags.t1__bias.weight"].uniform_()
    salts = torch.tensor([table_salt(2021, "t1", place) for place in range(5)])
    hashes = hash_rows(torch.tensor([17]), salts, torch.tensor(1 << 24)).double()
    layer = (2 * (hashes + 0.5) / (1 << 24) - 1) * 3**0.5  # uniform, of deviation 1
    for n in range(2):
        layer = layer @ state[f"{inside}.weight_{n}"].double() + state[f"{inside}.bias_{n}"]
        mean = (2 * torch.pi) ** -0.5
        layer = (layer.clamp(min=0) - mean) / (0.5 - mean**2) ** 0.5
    wanted = layer @ state[f"{inside}.weight_2"].double()
    wanted = wanted + state["unpooled_rows.embedding_bags.t1__bias.weight"][0, :6]
    found = embed_ids(collection, TABLES)["f1"][17]
    torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-7)


def test_bytes_are_the_networks_and_no_table():
    specs = specs_from_configs([table.bag() for table in TABLES])
    network = 5 * 4 + 4 + 4 * 4 + 4 + 4 * 6 + 6
    assert METHOD.footprint(specs).serve_bytes == 2 * 4 * network
    many = specs_from_configs([table.bag() for table in plain_tables(6, rows=(10**9, 10**9))])
    assert METHOD.footprint(many).serve_bytes == 2 * 4 * network
    assert DHE(hidden_dim=50).layer_widths(specs[0]) == [50, 50, 50, 6]
    assert DHE(hidden_dim=9).layer_widths(specs[0])[0] == 32
    assert DHE(hidden_dim=5000, num_layers=1).layer_widths(specs[0])[0] == 1024


def test_a_table_that_a_network_would_not_shrink_stays_full():
    big, small = specs_from_configs([table.bag() for table in plain_tables(6, rows=(90, 10))])
    assert not METHOD.keeps_full(big)
    assert METHOD.keeps_full(small)


def test_an_id_that_comes_often_gets_the_gradient_of_all_its_places():
    """It is decoded once; features of one table share the network."""
    ids = [[3], [3], [8], [3]]
    grads = []
    for batch in (ids, [[3, 3, 8, 3]]):
        collection = pooled(BackendCase(config=METHOD), TABLES).train()
        found = collection(batch_of({"f0": batch, "f1": [[] for _ in batch]}))["f0"].sum()
        found.backward()
        grads.append(dict(collection.named_parameters()))
    for name, parameter in grads[0].items():
        torch.testing.assert_close(parameter.grad, grads[1][name].grad, rtol=1e-5, atol=1e-7)


def test_an_artefact_answers_exactly(tmp_path):
    collection = pooled(BackendCase(config=METHOD), TABLES)
    save(collection, tmp_path / "a")
    served = load(tmp_path / "a")
    batch = batch_of({"f0": [[3, 2**40], []], "f1": [[-5], [59, 1]]})
    torch.testing.assert_close(served(batch).values(), collection(batch).values(), rtol=0, atol=0)


@pytest.mark.parametrize("seed", long_but([2], range(3)))
def test_it_beats_hashing_in_equal_bytes_where_every_id_means_something(seed):
    planted, scores, sizes = plant(seed=seed), {}, {}
    specs = Clicks(planted, Hash(num_buckets=1), 16).specs
    for method in (Hash(collisionless=0), DHE()):
        torch.manual_seed(0)
        model = Clicks(planted, method.fit_budget(specs, "10%"), 16)
        fit(model, planted, epochs=4, structure="adam", structure_rate=0.01)
        scores[method.name] = auc(model, planted)
        sizes[method.name] = model.tables.footprint.serve_bytes
    assert sizes["dhe"] <= sizes["hash"]
    assert scores["dhe"] > scores["hash"] + 0.03
