"""Multi-granular codes: frequent ids choose among all codewords, rare ones among the first."""

from __future__ import annotations

import pytest
import torch

from embcomp import MGQE, PQ, ConfigError, Full, load, save
from embcomp.backends.base import StageInputs
from embcomp.backends.codebooks.bit_packing import unpack_bits
from embcomp.testing import BackendCase
from embcomp.testing.cases import embed_ids, pooled
from embcomp.testing.check_data import batch_of, plain_tables
from embcomp.testing.planted import plant
from tests.helpers.learned_cases import TRAIN, Clicks, auc, fit
from tests.helpers.long import long_but

TABLES = plain_tables(6, rows=(90, 61))
METHOD = MGQE(subvector_dim=3, num_codewords=8, num_rare_codewords=4, frequent_share=0.2)


def clustered(method, counts=None, seed=0):
    """Full tables, and what the method makes of them."""
    full = pooled(BackendCase(config=Full()), TABLES, seed=seed)
    (state,) = full.states()
    past = StageInputs(before=state.form, initial=lambda: state.form, counts=counts or {})
    form = method.start_stage(method.stages()[1], state.tables, past)
    made = pooled(BackendCase(config=form.config), TABLES, seed=5)
    (own,) = made.states()
    made.load_states([type(own)(tables=own.tables, form=form)])
    return full, made, form


def test_rare_ids_know_a_prefix_of_the_codebooks():
    _, made, _ = clustered(METHOD)
    routed, _, _ = made.route(
        batch_of({"f0": [[i] for i in range(90)], "f1": [[i % 61] for i in range(90)]})
    )
    for key, bags in routed.to_dict().items():
        first, second = key.split("#")[0].split("/")[:2], int(key.split("#")[1])
        codes = bags.values() - 8 * second  # books one after another
        frequent = 18 if first[0] == "t0" else 12
        assert bool((codes >= 0).all()) and bool((codes < 8).all())
        assert bool((codes[frequent:61] < 4).all())
        assert bool((codes[:frequent] >= 4).any())


def test_codes_name_the_nearest_of_the_words_that_an_id_knows():
    full, made, form = clustered(METHOD)
    rows = embed_ids(full, TABLES)["f0"]
    (words,) = [each for name, each in form.tensors.items() if name.endswith("codewords")]
    scale = form.tensors["combine.scales.weight"][0]
    found = embed_ids(made, TABLES)["f0"]
    for id_ in (0, 17, 18, 89):
        for part in range(2):
            known = words[8 * part : 8 * part + (8 if id_ < 18 else 4)] * scale
            wanted = rows[id_, 3 * part : 3 * part + 3]
            nearest = known[(known - wanted).square().sum(1).argmin()]
            torch.testing.assert_close(found[id_, 3 * part : 3 * part + 3], nearest)


def test_bytes_are_codes_of_two_lengths_and_the_codebooks():
    _, made, form = clustered(METHOD)
    codes = (-(-18 * 2 // 8) * 3 + 72 * 2 * 2 // 8) + (-(-12 * 2 * 3 // 8) + -(-49 * 2 * 2 // 8))
    assert made.footprint.serve_bytes == codes + 2 * 8 * 3 * 4 + 2 * 4
    stored = form.sources.get("route.rare.codes")
    rare = form.tensors["route.rare.codes"] if stored is None else stored.whole()
    assert unpack_bits(rare, 2, 72 * 2).max() < 4


def test_settings_and_numberings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match=r"num_rare_codewords must be less than.* 8 and 8"):
        MGQE(num_codewords=8, num_rare_codewords=8)
    rising = {"t0": torch.arange(90), "t1": torch.arange(61)}
    with pytest.raises(ConfigError, match=r"mgqe: ids of table 't0' are not ranked.* take pq"):
        clustered(METHOD, counts=rising)


def test_an_artefact_answers_exactly(tmp_path):
    _, made, _ = clustered(METHOD)
    save(made, tmp_path / "a")
    batch = batch_of({"f0": [[3, 80], []], "f1": [[11], [59, 1]]})
    found = load(tmp_path / "a")(batch).values()
    torch.testing.assert_close(found, made(batch).values(), rtol=0, atol=0)


def trained(planted, method, seed, dim):
    """Full tables trained, then clustered, then codewords trained on."""
    torch.manual_seed(seed)
    model = Clicks(planted, Full(), dim)
    fit(model, planted, epochs=2)
    past = StageInputs(before=model.form, initial=lambda: None, counts=planted.counts(TRAIN))
    form = method.start_stage(method.stages()[-1], model.specs, past)
    after = Clicks(planted, form.config, dim)
    after.load(form)
    after.linear.load_state_dict(model.linear.state_dict())
    fit(after, planted, epochs=1, rate=0.001)
    return auc(after, planted), after.tables.footprint.serve_bytes


@pytest.mark.parametrize("seed", long_but([0], range(3)))
def test_it_beats_codes_of_one_length_in_equal_bytes(seed):
    """Of long tables, whose codes are what takes the bytes, and in few of them."""
    planted = plant(num_values=(4000,) * 4, seed=seed)
    granular = MGQE(subvector_dim=8, num_codewords=32, num_rare_codewords=2)
    even = PQ(subvector_dim=8, num_codewords=4)
    score, size = trained(planted, granular, seed, 8)
    other, most = trained(planted, even, seed, 8)
    assert size <= most
    assert score > other + 0.01
