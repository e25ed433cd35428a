"""Codes and codewords: forms keep answers, structure that was planted is found, budgets are spent."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic_core import PydanticCustomError

from embcomp.backends import LR2VQ, PQ, Coded, Full, LowRank
from embcomp.backends.base import MethodState, StageInputs
from embcomp.backends.codebooks import codewords
from embcomp.backends.codebooks.bit_packing import unpack_bits
from embcomp.backends.codebooks.clustering import Latents, id_weights, share_cold_rows
from embcomp.backends.codebooks.latent_choice import choose_latent_dim
from embcomp.backends.codebooks.nearest import nearest
from embcomp.backends.codebooks.subvectors import SubvectorLayout
from embcomp.collection.collection import CompressedEmbeddingBagCollection
from embcomp.collection.group_states import GroupState
from embcomp.collection.plan import Plan, ResolvedPlan
from embcomp.errors import ConfigError
from embcomp.io.yaml_reading import bind_dataclass
from embcomp.layers.row_sources import MemoryRows
from embcomp.tables.specs import TableSpec
from embcomp.testing.cases import embed_ids
from embcomp.testing.check_data import Declared, plain_tables, random_batch


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def collection_of(tables, plan):
    torch.manual_seed(0)
    return CompressedEmbeddingBagCollection([t.bag() for t in tables], plan).eval()


def holding(tables, form, specs):
    """A collection with a form's tensors, also where a plan would keep such short tables full."""
    plan = ResolvedPlan(tuple(specs), dict.fromkeys((spec.name for spec in specs), form.config))
    collection = collection_of(tables, plan)
    collection.load_states([GroupState(tables=specs, form=form)])
    return collection


def specs_of(tables):
    return collection_of(tables, Full()).plan.tables


def dense(rows):
    """The form of full tables with these rows."""
    return MethodState(config=Full(), tensors={f"rows.{name}": each for name, each in rows.items()})


def past(before, counts=None, results=None):
    return StageInputs(
        before=before, initial=lambda: before, counts=counts or {}, results=results or {}, seed=1
    )


def live(method, specs, before, counts=None, results=None):
    """The forms in which the method's stages after the first begin, none of them trained."""
    forms = []
    for stage in method.stages()[1:]:
        if stage.kind == "train":
            before = method.start_stage(stage, specs, past(before, counts, results))
            forms.append(before)
    return forms


def planted(rows, dim, width, rank, clusters, seed=0, noise=0.0):
    """Rows whose sub-vectors are one of a few points of a low-rank space."""
    centres = drawn(clusters, rank, seed=seed) @ drawn(rank, width, seed=seed + 1)
    random = torch.Generator().manual_seed(seed + 2)
    codes = torch.randint(0, clusters, (rows, dim // width), generator=random)
    return centres[codes].flatten(1) + noise * drawn(rows, dim, seed=seed + 3)


@pytest.mark.parametrize(
    "method",
    [
        LR2VQ(subvector_dim=4, num_codewords=8),
        LR2VQ(subvector_dim=3, num_codewords=12, latent_dim=2, codebooks="table"),
        LR2VQ(subvector_dim=2, num_codewords=16, codebooks="all", factored=False),
        LR2VQ(subvector_dim=4, num_codewords=8, latent_dim=4, scale=False),
        LR2VQ(
            subvector_dim=4, num_codewords=8, codebooks="position", sharing_groups=(("t2", "t0"),)
        ),
    ],
)
def test_frozen_codes_answer_as_the_trained_form_for_every_id(method):
    tables = plain_tables(8, rows=(200, 300, 250))
    collection = collection_of(tables, method)
    optimizer = torch.optim.Adagrad(collection.parameters(), lr=0.05)
    collection.train()
    for step in range(5):
        batch = random_batch(tables, seed=step, batch_size=40)
        optimizer.zero_grad()
        loss = (collection(batch).values() - 0.1).square().sum()
        (loss + collection.penalty()).backward()
        optimizer.step()
    collection.eval()
    compacted = collection.compact()
    assert {type(config) for config, _ in compacted.plan.groups} == {Coded}
    wanted = embed_ids(collection, tables)
    for key, rows in embed_ids(compacted, tables).items():
        torch.testing.assert_close(rows, wanted[key], rtol=1e-5, atol=1e-6)


def test_a_life_begins_where_the_stage_before_ended():
    """Low-rank rows that are few points lose nothing on the way from full tables to codes."""
    tables = plain_tables(8, rows=(200, 300))
    specs = specs_of(tables)
    rows = {t.name: 3**n * planted(t.rows, 8, 4, rank=2, clusters=12) for n, t in enumerate(tables)}
    for method in (
        LR2VQ(subvector_dim=4, num_codewords=32),
        LR2VQ(subvector_dim=4, num_codewords=32, codebooks="all"),
        LR2VQ(subvector_dim=4, num_codewords=32, factored=False, codebooks="table"),
        PQ(subvector_dim=4, num_codewords=32),
    ):
        forms = live(method, specs, dense(rows))
        names = [form.config.name for form in forms]
        assert names == (["coded"] if isinstance(method, PQ) else ["low_rank", "lr2vq", "coded"])
        for form in forms:
            for key, found in embed_ids(holding(tables, form, specs), tables).items():
                wanted = rows[f"t{key[1:]}"]
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        served = forms[-1].config.dense_footprint(specs).serve_bytes
        for words in forms[-1].config.codebook_tables(specs):
            served += words.num_embeddings * words.embedding_dim * 4
        assert served == sum(
            tensor.numel() * tensor.element_size() for tensor in forms[-1].tensors.values()
        )


@pytest.mark.parametrize("codebooks", ["all", "position"])
def test_one_dimensional_codes_with_enough_codewords_are_the_full_table(codebooks):
    tables = plain_tables(4, rows=(150, 100))
    specs = specs_of(tables)
    rows = {t.name: drawn(t.rows, 4, seed=n) for n, t in enumerate(tables)}
    methods = (
        PQ(subvector_dim=1, num_codewords=1024, codebooks=codebooks),
        LR2VQ(subvector_dim=1, num_codewords=1024, codebooks=codebooks, scale=False),
    )
    for method in methods:
        collection = holding(tables, live(method, specs, dense(rows))[-1], specs)
        for key, found in embed_ids(collection, tables).items():
            torch.testing.assert_close(found, rows[f"t{key[1:]}"], rtol=1e-5, atol=1e-5)


def shared(tables, sharing, groups=()):
    layout = SubvectorLayout(tables=tables, width=4, sharing=sharing, groups=groups)
    return layout.num_shared, [layout.shared_by(n) for n in range(len(tables))]


def test_groups_share_among_themselves_alone():
    tables = [spec("a", 9, 8), spec("b", 9, 12), spec("c", 9, 4), spec("d", 9, 8)]
    assert shared(tables, "position") == (3, [[0, 1], [0, 1, 2], [0], [0, 1]])
    assert shared(tables, "all") == (1, [[0, 0], [0, 0, 0], [0], [0, 0]])
    assert shared(tables, "table") == (8, [[0, 1], [2, 3, 4], [5], [6, 7]])
    groups = (("c", "b"), ("d",))
    assert shared(tables, "position", groups) == (7, [[5, 6], [0, 1, 2], [0], [3, 4]])
    assert shared(tables, "all", groups) == (3, [[2, 2], [0, 0, 0], [0], [1, 1]])
    # Tables that stay full are not there, whatever group they are in.
    assert shared(tables[:1] + tables[3:], "all", groups) == (2, [[1, 1], [0, 0]])


@pytest.mark.parametrize("make", [PQ, LR2VQ])
def test_tables_of_one_kind_need_no_codewords_of_another(make):
    tables = plain_tables(8, rows=(200, 300, 250))
    specs = specs_of(tables)
    rows = {
        name: planted(table.rows, 8, 4, rank=2, clusters=8, seed=seed)
        for (name, seed), table in zip({"t0": 0, "t1": 50, "t2": 0}.items(), tables)
    }
    errors = []
    for groups in ((("t0", "t2"),), ()):
        method = make(
            subvector_dim=4,
            num_codewords=12,
            codebooks="all",
            scale=False,
            sharing_groups=groups,
        )
        found = embed_ids(holding(tables, live(method, specs, dense(rows))[-1], specs), tables)
        errors.append(max(float((found[f"f{n}"] - rows[f"t{n}"]).abs().max()) for n in range(3)))
    assert errors[0] < 1e-4
    assert errors[1] > 0.1


def test_groups_name_tables_that_are_there_and_may_stay_full():
    tables = plain_tables(8, rows=(200, 2, 250))
    for make, rest in (
        (PQ, {"subvector_dim": 4, "num_codewords": 8}),
        (LR2VQ, {"budget": "30%", "codebooks": "all"}),
        (LowRank, {"latent_dim": 2, "projections": "all"}),
    ):
        held = collection_of(tables, make(sharing_groups=[["t0", "t1"]], **rest)).plan
        assert isinstance(held.methods["t1"], Full)
        for plan in (
            make(sharing_groups=(("t0", "t9"),), **rest),
            Plan(overrides={"t0": make(sharing_groups=(("t0",), ("t9",)), **rest)}),
        ):
            with pytest.raises(ConfigError, match="no table is called 't9'; the tables are t0"):
                collection_of(tables, plan)


def test_a_list_of_names_is_no_list_of_groups():
    with pytest.raises(PydanticCustomError, match="sharing_groups.0: expected a list, got 'C1'"):
        bind_dataclass(PQ, {"sharing_groups": ["C1"]})


def test_low_rank_is_the_best_approximation():
    tables = plain_tables(6, rows=(80,))
    specs = specs_of(tables)
    rows = drawn(80, 6) + 1
    even = {"t0": torch.ones(80)}
    for method in (LowRank(latent_dim=2), LowRank(latent_dim=2, bias=True)):
        form = live(method, specs, dense({"t0": rows}), counts=even)[0]
        found = embed_ids(holding(tables, form, specs), tables)["f0"]
        shift = rows.mean(0) if method.bias else 0
        u, s, v = torch.linalg.svd(rows - shift, full_matrices=False)
        torch.testing.assert_close(found, u[:, :2] * s[:2] @ v[:2] + shift, rtol=1e-4, atol=1e-4)


def test_low_rank_may_begin_without_full_tables():
    assert [stage.name for stage in LowRank(latent_dim=2).stages()] == ["dense", "low_rank"]
    cold = LowRank(latent_dim=2, from_dense=False)
    assert len(cold.stages()) == 1
    assert cold.first_method() is cold
    scratch = LR2VQ(subvector_dim=4, latent_dim=4, from_dense=False)
    assert [stage.name for stage in scratch.stages()] == ["quantize", "codes"]
    assert scratch.first_method() is scratch


def test_latents_as_wide_as_sub_vectors_are_clustered_at_once():
    """There is no approximation to train on, only a further epoch to overfit in."""
    tables = plain_tables(8, rows=(200,))
    specs = specs_of(tables)
    method = LR2VQ(subvector_dim=2, num_codewords=32, latent_dim=2)
    assert [stage.name for stage in method.stages()] == ["dense", "quantize", "codes"]
    rows = {"t0": planted(200, 8, 2, rank=2, clusters=20)}
    forms = live(method, specs, dense(rows))
    assert [form.config.name for form in forms] == ["lr2vq", "coded"]
    found = embed_ids(holding(tables, forms[0], specs), tables)["f0"]
    torch.testing.assert_close(found, rows["t0"], rtol=1e-4, atol=1e-4)
    # As long as a budget is to choose the width, a config may name the stage.
    assert "low_rank" in [stage.name for stage in LR2VQ(latent_dim=2).stages()]


def test_the_width_of_planted_latents_is_found():
    layout = SubvectorLayout(tables=[spec("t", 3000, 8)], width=4, sharing="position")
    rows = MemoryRows(planted(3000, 8, 4, rank=2, clusters=400, noise=0.01))
    ones = MemoryRows(torch.ones(3000))
    choice = choose_latent_dim(layout, {"t": rows}, {"t": ones}, count=64, scaled=True, seed=0)
    assert choice.latent_dim == 2
    assert choice.left_out[0] > 0.05
    assert choice.left_out[1] < 0.001
    assert choice.left_out[3] == pytest.approx(0, abs=1e-9)
    assert "latent_dim 2: the narrowest" in choice.lines()[-1]


def test_clusters_of_full_width_are_never_worse():
    """The caution: without training in between, narrow latents do not pay."""
    layout = SubvectorLayout(tables=[spec("t", 2000, 8)], width=4, sharing="all")
    rows = MemoryRows(drawn(2000, 8) * torch.tensor([3.0, 2, 1, 1, 3, 2, 1, 1]))
    ones = MemoryRows(torch.ones(2000))
    choice = choose_latent_dim(layout, {"t": rows}, {"t": ones}, count=32, scaled=True, seed=0)
    sums = [r + q for r, q in zip(choice.left_out, choice.clustering)]
    assert min(sums) == pytest.approx(sums[-1], rel=0.05)
    assert choice.latent_dim < 4


def test_auto_takes_what_the_search_found():
    tables = plain_tables(8, rows=(300,))
    specs = specs_of(tables)
    method = LR2VQ(subvector_dim=4, num_codewords=16, latent_dim="auto")
    names = [stage.name for stage in method.stages()]
    assert names == ["dense", "latent_dim", "low_rank", "quantize", "codes"]
    before = dense({"t0": planted(300, 8, 4, rank=3, clusters=10)})
    forms = live(method, specs, before, results={"latent_dim": {"latent_dim": 3}})
    assert forms[0].rows("t0").shape == (300, 6)
    assert forms[1].config == replace(method, latent_dim=3, factored=False)
    assert forms[2].config.footprint(specs).serve_bytes == method.footprint(specs).serve_bytes
    with pytest.raises(ConfigError, match="latent_dim: auto looks at trained full tables"):
        LR2VQ(subvector_dim=4, latent_dim="auto", from_dense=False)


def test_ids_that_never_occur_share_the_codes_of_the_mean():
    tables = plain_tables(4, rows=(120,))
    specs = specs_of(tables)
    counts = {"t0": torch.arange(120).flip(0)}
    counts["t0"][100:] = 0
    for method in (PQ(subvector_dim=2, num_codewords=8), LR2VQ(subvector_dim=2, num_codewords=8)):
        before = dense({"t0": drawn(120, 4) + 2})
        for form in live(method, specs, before, counts)[-2:]:
            if form.config.name == "low_rank":
                continue
            found = embed_ids(holding(tables, form, specs), tables)["f0"]
            assert len(torch.unique(found[100:], dim=0)) == 1
            assert len(torch.unique(found[:100], dim=0)) > 20


def test_weights_of_ids():
    specs = [spec("a", 4, 2), spec("b", 4, 2)]
    weights = id_weights(specs, {"a": torch.tensor([4, 0, 9, 1])})
    assert weights["a"].whole().tolist() == [2, 0, 3, 1]
    assert weights["b"].whole().tolist() == [1, 1, 1, 1]  # nobody counted them
    rows = torch.tensor([[1.0], [50.0], [4.0], [4.0]])
    layout = SubvectorLayout(tables=specs[:1], width=1, sharing="all")
    shared = share_cold_rows(
        Latents(layout=layout, rows={"a": MemoryRows(rows[:, None])}, weights=weights)
    )
    assert shared.rows["a"].whole().flatten().tolist() == pytest.approx([1, 3, 4, 4])


def spec(name, rows, dim):
    return TableSpec(name=name, num_embeddings=rows, embedding_dim=dim, feature_names=(name,))


@pytest.mark.parametrize("bits", [4, 8, 10, 12, 16])
@pytest.mark.parametrize("method", [PQ, LR2VQ])
def test_bytes_are_those_of_packed_codes_and_codewords(method, bits):
    count = 1 << bits
    made = method(subvector_dim=4, num_codewords=count, codebooks="all")
    table = spec("t", 100_003, 16)
    assert not made.keeps_full(table) or bits == 16
    codes = -(-100_003 * 4 * bits // 8)
    factored = method is LR2VQ
    words = 4 * (count * 2 + 2 * 4) if factored else 4 * count * 4
    total = codes + words + 4  # one table's scale
    assert made.serving.footprint([table]).serve_bytes == total
    assert made.footprint([table]).serve_bytes == total


@pytest.mark.parametrize("bits", [4, 8, 10, 12, 16])
def test_codes_survive_their_packing(bits):
    tables = [Declared(name="t0", rows=500, dim=6, features=("f0",))]
    specs = specs_of(tables)
    method = PQ(subvector_dim=2, num_codewords=1 << bits, codebooks="all")
    form = method.start_stage(method.stages()[1], specs, past(dense({"t0": drawn(500, 6)})))
    (physical,) = method.codebook_tables(specs)
    words = form.rows(physical.name).whole()
    codes = unpack_bits(form.tensors["route.codes"], bits, 1500).view(500, 3)
    decoded = (words[codes] * form.tensors["combine.scales.weight"]).flatten(1)
    torch.testing.assert_close(embed_ids(holding(tables, form, specs), tables)["f0"], decoded)


def test_a_budget_buys_the_least_distortion():
    tables = [spec("a", 200_000, 16), spec("b", 50_000, 16), spec("c", 7, 16)]
    for share in (4, 5, 8, 15):
        made = LR2VQ(budget=f"{share}%").fit_budget(tables, f"{share}%")
        assert made.footprint(tables).serve_bytes <= 250_007 * 64 * share // 100
        assert made.keeps_full(tables[2])
        others = [
            other
            for alike in made.sizes(tables)
            for other in alike
            if other.footprint(tables).serve_bytes <= 250_007 * 64 * share // 100
        ]
        assert len(others) >= 2
        least = min(other.expected_distortion(tables) for other in others)
        assert made.expected_distortion(tables) == least
    fixed = PQ(num_codewords=256).fit_budget(tables, "9%")
    assert (fixed.subvector_dim, fixed.num_codewords) == (4, 256)


@pytest.mark.parametrize(
    ("make", "settings", "named"),
    [
        (Coded, {"subvector_dim": 0}, "coded: subvector_dim must be at least 1, got 0"),
        (Coded, {"num_codewords": 1}, r"coded: num_codewords must be in \[2, 65536\], got 1"),
        (Coded, {"codebooks": "row"}, "coded: codebooks must be one of all, position, table"),
        (Coded, {"latent_dim": 0}, "coded: latent_dim must be at least 1"),
        (PQ, {"num_codewords": 1 << 17}, r"pq: num_codewords must be in \[2, 65536\]"),
        (LR2VQ, {"latent_dim": "half"}, "lr2vq: latent_dim must be at least 1, or 'auto'"),
        (LR2VQ, {"decay": 1.0}, r"lr2vq: decay must be in \[0, 1\)"),
        (LR2VQ, {"commitment": -1.0}, "lr2vq: commitment must be at least 0"),
        (LR2VQ, {"revive_every": 0}, "lr2vq: revive_every must be at least 1"),
        (LowRank, {"latent_dim": 0}, "low_rank: latent_dim must be at least 1"),
        (LowRank, {"projections": "none"}, "low_rank: projections must be one of all"),
        (LR2VQ, {"sharing_groups": (("a",),)}, "with codebooks: table no tables share"),
        (LowRank, {"sharing_groups": (("a",),)}, "with projections: table no tables share"),
        (PQ, {"sharing_groups": (("a", "b"), ("b",))}, "pq: sharing_groups name b more than once"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, settings, named):
    with pytest.raises(ConfigError, match=named):
        make(**settings)


def test_tables_of_several_types_share_no_codewords():
    from torchrec.modules.embedding_configs import DataType

    tables = [spec("a", 5000, 8), replace(spec("b", 5000, 8), data_type=DataType.FP16)]
    for method in (PQ(subvector_dim=2), LR2VQ(subvector_dim=2)):
        with pytest.raises(ConfigError, match="share codewords must have one data_type"):
            method.footprint(tables)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("latent_dim", [1, 3])
def test_ids_that_repeat_get_the_codes_that_each_row_would(latent_dim, compiled, monkeypatch):
    if not compiled:  # then equal ids are searched for once
        monkeypatch.setattr(codewords, "library", lambda: None)
    tables = plain_tables(8, rows=(40, 300, 5))
    config = LR2VQ(subvector_dim=4, num_codewords=16, latent_dim=latent_dim)
    specs = specs_of(tables)
    plan = ResolvedPlan(tuple(specs), dict.fromkeys((spec.name for spec in specs), config))
    collection = collection_of(tables, plan)
    module = collection.combine.combines["lr2vq"]
    seen = []
    codes_of = module._nearest_of_each

    def kept(latents, which, looked_up):
        codes = codes_of(latents, which, looked_up)
        copies = [own.clone() for own in codes]
        seen.extend(zip(latents, which, looked_up.each_ids(), copies, strict=True))
        return codes

    monkeypatch.setattr(module, "_nearest_of_each", kept)
    collection(random_batch(tables, seed=1, batch_size=64))  # ragged: keys differ in length
    assert len({len(ids) for _, _, ids, _ in seen}) == len(seen) == 3
    assert any(len(ids.unique()) < len(ids) / 2 for _, _, ids, _ in seen)
    for latents, which, _, codes in seen:
        assert torch.equal(codes, nearest(latents, module.codewords.words, which))


def test_codewords_that_nobody_chooses_are_moved_to_where_they_help():
    table = Declared(name="t0", rows=64, dim=4, features=("f0",))
    config = LR2VQ(subvector_dim=4, num_codewords=16, revive_every=5, scale=False)
    collection = collection_of([table], config).train()
    module = collection.combine.combines["lr2vq"].codewords
    module.ensure_filled()
    module.words[:] = 100.0  # all but the first are equal, and far from any latent
    module.words[0, 0] = 0.0
    batch = random_batch([table], seed=0, batch_size=64, shape="full_bags")
    errors = []
    for _ in range(60):
        collection(batch)
        errors.append(float(collection.penalty().detach()))
    assert errors[-1] < 0.2 * errors[0]
    uses = len(torch.unique(embed_ids(collection.eval(), [table])["f0"], dim=0))
    assert uses >= 12
    assert int(module.steps) == 60
