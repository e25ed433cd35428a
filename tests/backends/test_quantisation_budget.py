"""Budgets of quantisation: what is expected is monotone, what is bought is near the best that is measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torchrec import EmbeddingBagConfig

from embcomp.backends import LR2VQ, PQ, Full
from embcomp.backends.base import MethodState, StageInputs
from embcomp.backends.codebooks.expected_error import Points, expected_error
from embcomp.backends.codebooks.measured_size import TrainedSample
from embcomp.errors import ConfigError
from embcomp.layers.block_work import IN_MEMORY
from embcomp.tables.specs import by_name, specs_from_configs

SHARES = (1, 2, 3, 5, 10, 20, 30)
WRONG: Any = "best"


def specs(*sizes):
    return specs_from_configs(
        [
            EmbeddingBagConfig(
                name=f"t{n}", num_embeddings=rows, embedding_dim=dim, feature_names=[f"f{n}"]
            )
            for n, (rows, dim) in enumerate(sizes)
        ]
    )


points = st.builds(
    Points,
    dim=st.integers(1, 20),
    kinds=st.integers(1, 30),
    count=st.integers(1, 10**9),
)
codewords = st.integers(2, 1 << 16)


def test_rounding_makes_no_narrower_sub_vector_lose_more():
    own = Points(dim=18, kinds=3, count=1)
    errors = [expected_error(own, width=w, latent=w, codewords=2) for w in range(1, 19)]
    assert errors == [0.0] * 18


@settings(max_examples=150, deadline=None)
@given(points, codewords, codewords, st.integers(1, 24), st.integers(1, 24), st.data())
def test_refinement_is_never_expected_to_lose_more(own, few, many, narrow, wide, data):
    few, many = sorted((few, many))
    narrow, wide = sorted((narrow, wide))
    latent = data.draw(st.integers(1, wide))
    wider = data.draw(st.integers(latent, wide))

    def lost(width, latent, count):
        return expected_error(own, width=width, latent=min(latent, width), codewords=count)

    coarse = lost(wide, latent, few)
    assert 0 <= coarse <= 1
    assert lost(wide, latent, many) <= coarse
    assert lost(narrow, latent, few) <= coarse
    assert lost(wide, wider, few) <= coarse
    assert lost(narrow, wider, many) <= coarse


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 10**7), st.integers(0, 10**7), st.integers(2, 10))
def test_fewer_rows_for_each_codeword_are_never_expected_to_lose_more(dim, rows, more, bits):
    some, many = (
        expected_error(
            Points(dim=dim, kinds=1, count=n), width=dim, latent=dim, codewords=1 << bits
        )
        for n in (rows, rows + more)
    )
    assert some <= many
    if rows <= 1 << bits:
        assert some == pytest.approx(0, abs=1e-12)


tables = st.lists(
    st.tuples(st.integers(1, 10**7), st.sampled_from([1, 4, 6, 10, 16, 32])),
    min_size=1,
    max_size=3,
)
methods = st.builds(
    lambda make, sharing: make(codebooks=sharing),
    st.sampled_from([PQ, LR2VQ]),
    st.sampled_from(["all", "position", "table"]),
)


@settings(max_examples=12, deadline=None)
@given(methods, tables, st.floats(0.005, 1), st.floats(0.005, 1))
def test_more_bytes_never_buy_what_is_expected_to_lose_more(method, sizes, low, high):
    own = specs(*sizes)
    full = sum(table.full_bytes for table in own)
    budgets = sorted((int(low * full), int(high * full)))
    bought = [method.largest_within(own, budget) for budget in budgets]
    for found, budget in zip(bought, budgets):
        if found is None:
            assert method.smallest(own).serve_bytes(own) > budget
            continue
        assert found.footprint(own).serve_bytes == found.serve_bytes(own) <= budget
    if bought[0] is not None:
        assert bought[1] is not None
        assert bought[1].expected_distortion(own) <= bought[0].expected_distortion(own)


@settings(max_examples=20, deadline=None)
@given(methods, tables, st.data())
def test_a_sum_says_what_the_footprint_says(method, sizes, data):
    own = specs(*sizes)
    alike = data.draw(st.sampled_from(list(method.sizes(own))))
    size = data.draw(st.sampled_from(alike))
    assert size.serve_bytes(own) == size.footprint(own).serve_bytes


@pytest.mark.parametrize("make", [PQ, LR2VQ])
@pytest.mark.parametrize("dim", [16, 64, 128])
def test_long_tables_use_their_budgets(make, dim):
    """A budget buys codes, not air: of ten million rows, and in steps that a row's bits allow."""
    own = specs((10**7, dim))
    for share in SHARES:
        found = make().fit_budget(own, f"{share}%")
        used = 100 * found.serve_bytes(own) / own[0].full_bytes
        # A row of 16 has few bits: two codes of ten need more than three per cent.
        assert share * (0.6 if dim == 16 else 0.9) <= used <= share, (share, found)


def test_latents_count_in_the_choice():
    """Where codewords are most of the bytes, narrow ones leave room for more of them."""
    own = specs((3_000, 64))
    found = LR2VQ().fit_budget(own, "8%")
    wide = LR2VQ(latent_dim=64).fit_budget(own, "8%")
    assert found.latent < found.width
    assert found.expected_distortion(own) < wide.expected_distortion(own)
    assert LR2VQ(latent_dim=1).fit_budget(own, "8%").latent_dim == 1
    assert LR2VQ(latent_dim="auto").fit_budget(own, "8%").latent_dim == "auto"


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(kind, rows, dim):
    """Rows of one kind of spectrum, along axes of any direction."""
    if kind == "clustered":
        random = torch.Generator().manual_seed(4)
        which = torch.randint(0, 48, (rows,), generator=random)
        return drawn(48, dim, seed=3)[which] + 0.3 * drawn(rows, dim, seed=5)
    fall = {"flat": 0.0, "power": 1.5}[kind]
    turn, _ = torch.linalg.qr(drawn(dim, dim, seed=2))
    return drawn(rows, dim, seed=1) * torch.arange(1, dim + 1) ** (-fall / 2) @ turn


def measured(method, own, rows):
    """What a size loses of the rows, its codewords fitted to all of them."""
    ones = torch.ones(len(rows), dtype=torch.float64)
    sample = TrainedSample(tables=own, rows=[rows], weights=[ones])
    return sample.error(
        method.layout(own), latent=method.width, codewords=method.codewords, scaled=False, seed=9
    )


def search(method, own, rows):
    form = MethodState(config=Full(), tensors={"rows.t0": rows})
    counts = {"t0": torch.ones(len(rows))}
    said: list[str] = []
    context = SimpleNamespace(form=form, counts=counts, say=said.append, work=IN_MEMORY)
    (stage,) = [stage for stage in method.stages() if stage.kind == "search"]
    return method.search(stage, by_name(own), context), said, form, counts


@pytest.mark.parametrize("kind", ["flat", "power", "clustered"])
@pytest.mark.parametrize("share", [3, 8])
def test_the_measured_size_is_the_best_within_the_budget(kind, share):
    own, rows = specs((3_000, 12)), planted(kind, 3_000, 12)
    method = PQ(choose="measured").fit_budget(own, f"{share}%")
    budget = own[0].full_bytes * share // 100
    assert method.footprint(own).serve_bytes == budget  # a bound
    found, said, form, counts = search(method, own, rows)
    settled = method.settled({"size": found})
    assert settled.serve_bytes(own) <= budget
    assert not settled.learns_size
    fitting = [
        next((each for each in alike if each.serve_bytes(own) <= budget), None)
        for alike in PQ().sizes(own)
    ]
    least = min(measured(each, own, rows) for each in fitting if each is not None)
    assert measured(settled, own, rows) <= 1.05 * least
    assert sum("(chosen)" in line for line in said) == 1
    past = StageInputs(
        before=form, initial=lambda: form, counts=counts, results={"size": found}, seed=1
    )
    coded = method.start_stage(method.stages()[-1], own, past)
    assert coded.config.subvector_dim == settled.subvector_dim
    taken = sum(tensor.numel() * tensor.element_size() for tensor in coded.tensors.values())
    assert taken == settled.serve_bytes(own)


def test_spectra_differ_in_what_is_best():
    """Why it is measured: at the same bytes no one size is the best of all."""
    own = specs((3_000, 12))
    method = PQ(choose="measured").fit_budget(own, "5%")
    best = {
        kind: search(method, own, planted(kind, 3_000, 12))[0]["subvector_dim"]
        for kind in ("flat", "clustered")
    }
    assert best["flat"] < best["clustered"]


def test_measured_latents_follow_the_rank():
    own = specs((1_500, 16))
    rows = drawn(1_500, 3, seed=1) @ drawn(3, 16, seed=2)
    method = LR2VQ(choose="measured").fit_budget(own, "10%")
    found, _, form, counts = search(method, own, rows)
    assert found["latent_dim"] <= 6
    past = StageInputs(
        before=form, initial=lambda: form, counts=counts, results={"size": found}, seed=1
    )
    for stage in method.stages()[2:]:
        state = method.start_stage(stage, own, past)
        past = StageInputs(
            before=state, initial=lambda: form, counts=counts, results={"size": found}, seed=1
        )
    assert state.config.subvector_dim == found["subvector_dim"]
    taken = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors.values())
    assert taken <= method.footprint(own).serve_bytes


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: PQ(target_bytes=100), "add choose: measured"),
        (lambda: LR2VQ(choose="measured", latent_dim="auto"), "chooses latent_dim itself"),
        (lambda: LR2VQ(choose="measured", from_dense=False), "from_dense: false"),
        (lambda: PQ(choose="measured", num_codewords=16), "chooses num_codewords itself"),
        (lambda: PQ(choose=WRONG), "choose must be one of expected, measured"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(make, wanted):
    with pytest.raises(ConfigError, match=wanted):
        make()
