"""The YAML of a search: what it means, and what is wrong with it, in one message at once."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
import yaml

from embcomp.config.train_config import parse_config
from embcomp.errors import BudgetError, ConfigError
from embcomp.planning.config_plan import sizes_of_dataset
from embcomp.search.api import prepare_search
from embcomp.search.config.search_config import load_search, parse_search
from embcomp.search.space.recipes import config_of, point_yaml, trial_config, written_method
from embcomp.training import load_model, train
from tests.helpers.search_cases import RECIPE, WIDTHS, prepare, search_document, write_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("search_config"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budgt=10%", "unknown key 'budgt' (did you mean 'budget'?)"),
        ("sampler.nam=tpe", "did you mean 'name'"),
        ("sampler.name=tpee", "tpe"),
        ("objectives=[acu]", "no metric is called 'acu' (did you mean 'auc'?)"),
        ("objectives=[bytes]", "expected one of auc, gauc, log_loss, weighted_auc, weighted_gauc"),
        ("objectives=[auc, auc]", "any of bytes, latency"),
        ("groups=[{choices: [{method: hsah}]}]", "unknown method 'hsah' (did you mean 'hash'?)"),
        ("groups=[{choices: [{method: hash, ratios: 0.1}]}]", "did you mean 'ratio'"),
        ("groups=[{choices: [{method: hash, ratio: [0.1, 2.0]}]}]", "ratio must be in (0, 1]"),
        ("groups=[{choices: [{method: hash, ratio: [0.1, 0.1]}]}]", "0.1 appears twice"),
        ("groups=[{choices: [{method: hash, ratio: []}]}]", "the list is empty"),
        ("groups=[]", "groups: expected at least 1 item(s), got []"),
        ("budget=ten", ": budget: expected a positive number of bytes"),
        ("train_per_device=0", ": train_per_device: expected a positive number of bytes"),
        (
            "topology={world_size: 8, device_memory: lots}",
            ": topology.device_memory: expected a positive number of bytes",
        ),
        (
            "topology={world_size: 8, device_memory: 1GiB, reserve: -1%}",
            ": topology.reserve: expected a positive number of bytes",
        ),
        ("fixed={C1: {method: hash, ratio: [0.1, 0.2]}}", "one value for each setting"),
        ("fidelity={max_steps: 5, rungs: {min_steps: 5}}", "must be below max_steps"),
        ("topology={world_size: 8}", "the key 'device_memory' is missing"),
        ("name=a/b", "the name becomes a folder"),
    ],
)
def test_bad_keys_and_values_are_named(recipe, override, message):
    with pytest.raises(ConfigError) as error:
        parse_search(search_document(recipe), [override])
    assert message in str(error.value)


@pytest.mark.parametrize("none", [0, "0", "0%"])
def test_no_memory_may_be_kept_back(recipe, none):
    topology = {"world_size": 2, "device_memory": "1GiB", "reserve": none}
    assert parse_search(search_document(recipe, topology=topology)).topology.reserve == "0"


@pytest.mark.parametrize("sampler", ["cmaes", "greedy"])
def test_samplers_of_one_objective_refuse_several(recipe, sampler):
    with pytest.raises(ConfigError, match="takes one objective"):
        parse_search(
            search_document(recipe, objectives=["auc", "bytes"], sampler={"name": sampler})
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overrides": {"trian": {}}}, "unknown key 'trian'"),
        ({"overrides": {"model": {"hiden_units": [8]}}}, "did you mean 'hidden_units'"),
        ({"groups": [{"tables": ["C9"], "choices": WIDTHS}]}, "no table is called 'C9'"),
        ({"groups": [{"tables": {"min_rows": 999}, "choices": WIDTHS}]}, "no table is left"),
        ({"groups": [{"choices": ["full"]}]}, "nothing to search"),
        ({"groups": [{"choices": ["hash"]}]}, "the size is open"),
        ({"importance": {"C9": 2.0}}, "nothing to choose for is called 'C9'"),
        ({"fixed": {"C9": "full"}}, "no table is called 'C9'"),
        (
            {"groups": [{"tables": ["C1"], "choices": WIDTHS}], "fixed": {"C1": "full"}},
            "named twice",
        ),
        (
            {
                "overrides": {"tables": {"method": "hash", "budget": "10%"}},
                "groups": [{"tables": ["C1"], "choices": WIDTHS}],
            },
            "table 'C2' is in no group",
        ),
    ],
)
def test_a_space_that_cannot_be_built_is_named(recipe, changes, message):
    with pytest.raises(ConfigError) as error:
        prepare(recipe, [300, 60, 8], **changes)
    assert message in str(error.value)


STAGED = [{"method": "pq", "subvector_dim": 2, "num_codewords": [8, 16]}, *WIDTHS]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": [{"choices": STAGED}]}, r"a candidate of a search holds one .* Tie the group"),
        (
            {
                "groups": [
                    {"tables": ["C1"], "choices": STAGED, "tied": True},
                    {"choices": [{"method": "pq", "subvector_dim": 4}, "full"], "tied": True},
                ]
            },
            "'C1' and 'C2' could take different ones",
        ),
        (
            {
                "groups": [{"choices": STAGED, "tied": True}],
                "fidelity": {"max_steps": 9, "rungs": {"min_steps": 2}},
            },
            "leave rungs out",
        ),
        (
            {"groups": [{"choices": STAGED, "tied": True}], "objectives": ["auc", "latency"]},
            "cannot be timed",
        ),
    ],
)
def test_what_methods_in_stages_cannot_do_is_said_before_anything_is_trained(
    recipe, changes, message
):
    with pytest.raises(ConfigError, match=message):
        prepare(recipe, [3000, 600], budget="60%", **changes)


def test_what_a_stage_misses_is_said_before_anything_is_trained(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)  # so that importing it fails
    choices = [{"method": "pq", "subvector_dim": [2, 4], "clustering": "faiss"}]
    groups = [{"choices": choices, "tied": True}]
    with pytest.raises(ConfigError, match="groups: pq: faiss was asked for .* install faiss-cpu"):
        prepare(recipe, [3000, 600], groups=groups, budget="60%")


def test_tables_that_share_codewords_must_be_there_but_may_take_another_method(recipe):
    choice = {"method": "pq", "subvector_dim": 2, "num_codewords": 8}
    with pytest.raises(ConfigError, match="pq: no table is called 'C9'; the tables are C1, C2"):
        groups = [{"choices": [{**choice, "sharing_groups": [[["C1", "C9"]]]}, "full"]}]
        prepare(recipe, [3000, 600], groups=groups, budget="60%")
    groups = [{"choices": [{**choice, "sharing_groups": [[["C1", "C2"]]]}, "full"]}]
    space = prepare(recipe, [3000, 600], groups=groups, budget="60%").space
    assert space.size == 4
    for candidate in itertools.product((0, 1), repeat=2):
        space.plan(candidate)


def test_one_setting_of_a_method_in_stages_may_be_chosen_table_by_table(recipe):
    choices = [{"method": "pq", "subvector_dim": 2, "num_codewords": 8}, *WIDTHS]
    space = prepare(recipe, [3000, 600], groups=[{"choices": choices}], budget="60%").space
    assert [unit.name for unit in space.units] == ["C1", "C2"]


def test_unreachable_budget_names_the_floor_and_the_table_that_sets_it(recipe):
    with pytest.raises(BudgetError) as error:
        prepare(recipe, [1000, 300, 8], budget="10%")
    text = str(error.value)
    assert f"the smallest takes {4 * 1308:,} bytes" in text
    assert "4,000 are for 'C1' as 'low_dim width=1'" in text


def test_choices_that_are_not_smaller_than_the_full_table_are_dropped_and_said(recipe):
    choices = [{"method": "hash", "ratio": [0.5, 1.0]}, {"method": "low_dim", "width": [4, 8]}]
    space = prepare(recipe, [300, 80], groups=[{"choices": choices}], budget="90%").space
    first, small = space.units
    # Tables of up to 100 rows are not hashed, so every ratio leaves C2 full.
    assert [option.label for option in first.options] == [
        "hash ratio=0.5",
        "low_dim width=4",
        "full",
    ]
    assert [option.label for option in small.options] == ["low_dim width=4", "full"]
    assert space.notes == (
        "hash ratio=1.0: not smaller than the full table for C1, C2",
        "low_dim width=8: not smaller than the full table for C1, C2",
        "hash ratio=0.5: not smaller than the full table for C2",
    )


def test_groups_bands_ties_and_fixed_tables(recipe):
    space = prepare(
        recipe,
        [50, 300, 4000, 5000, 7],
        budget="60%",
        fixed={"C5": {"method": "low_dim", "width": 2}},
        groups=[
            {"tables": "all", "choices": WIDTHS},
            {"tables": {"min_rows": 1000}, "choices": WIDTHS, "tied": True},
        ],
    ).space
    assert [unit.name for unit in space.units] == ["C1", "C2", "C3 to C4", "C5"]
    assert [len(unit.options) for unit in space.units] == [4, 4, 4, 1]
    methods = space.methods((0, 1, 2, 0))
    assert methods["C3"] == methods["C4"]


def test_auto_widths_are_powers_of_two_up_to_the_embedding(recipe):
    choices = [{"method": "low_dim", "width": "auto"}]
    overrides = {"tables": {"embedding_dim": 12}}
    space = prepare(recipe, [300], groups=[{"choices": choices}], overrides=overrides).space
    labels = [option.label for option in space.units[0].options]
    assert labels == [*(f"low_dim width={w}" for w in (1, 2, 4, 8)), "full"]


def test_tables_outside_the_groups_stay_as_the_recipe_has_them(recipe):
    space = prepare(
        recipe,
        [300, 200],
        overrides={"tables": {"method": {"name": "hash", "num_buckets": 20}}},
        groups=[{"tables": ["C1"], "choices": WIDTHS}],
    ).space
    assert space.units[1].options[0].label == "hash num_buckets=20"


def test_resolved_search_is_read_back_equal(recipe, tmp_path):
    config = parse_search(search_document(recipe, fidelity={"rungs": {"min_steps": 2}}))
    path = tmp_path / "again.yaml"
    path.write_text(config.to_yaml())
    assert load_search(path) == config


def test_a_point_is_an_ordinary_recipe_of_the_same_bytes(recipe, tmp_path):
    from embcomp.config.train_config import load_config
    from embcomp.planning.config_plan import plan_config

    choices = [{"method": "low_dim", "width": [1, 2, 4]}, {"method": "hash", "ratio": [0.1, 0.3]}]
    prepared = prepare(recipe, [3000, 600, 8], groups=[{"choices": choices}])
    for proposal in [(0, 1, 2), (2, 3, 0), (4, 0, 1)]:
        candidate = prepared.repair(proposal)
        path = tmp_path / "point.yaml"
        path.write_text(point_yaml(config_of(prepared.space, candidate, "point"), "Found."))
        config = load_config(path)
        main = plan_config(config, prepared.space.sizes).main
        assert main is not None
        assert main.footprint.serve_bytes == prepared.repair.costs.of(candidate).serve
        assert config.train == prepared.base.train and config.model == prepared.base.model


def test_widths_are_one_method_in_a_point_and_other_methods_stay_overrides(recipe):
    choices = [*WIDTHS, {"method": "hash", "ratio": 0.2}]
    fixed = {"C4": {"method": "low_dim", "width": 3}}
    prepared = prepare(
        recipe, [3000, 600, 80, 50], groups=[{"choices": choices}], fixed=fixed, budget="90%"
    )

    def tables(*labels):
        names = dict(zip(["C1", "C2", "C3", "C4"], [*labels, "low_dim width=3"]))
        config = config_of(prepared.space, prepared.space.candidate_of(names), "point")
        return yaml.safe_load(point_yaml(config, "Found."))["tables"]

    widths = tables("low_dim width=1", "low_dim width=4", "full")
    assert widths == {
        "embedding_dim": 8,
        "method": {"name": "low_dim", "widths": {"C1": 1, "C2": 4, "C4": 3}},
    }
    mixed = tables("hash ratio=0.2", "low_dim width=4", "full")
    assert mixed["overrides"]["C2"] == {"name": "low_dim", "width": 4}


def test_a_candidate_is_tried_as_the_recipe_but_for_its_tables_and_the_fidelity(recipe, tmp_path):
    choices = [*WIDTHS, {"method": "hash", "ratio": [0.1, 0.3], "row_type": "int8"}]
    base = {
        "train": {"epochs": 3, "max_steps": 40, "plateau": {"factor": 0.5}},
        "tables": {"pooling": "sum", "budget": "50%", "method": "unified"},
    }
    prepared = prepare(
        recipe, [3000, 600, 80], groups=[{"choices": choices}], overrides=base, budget="90%"
    )
    for proposal in [(0, 1, 2), (4, 3, 0), (2, 5, 0), (4, 4, 1)]:
        candidate = prepared.repair(proposal)
        config = trial_config(prepared.config, prepared.space, candidate, "trial", str(tmp_path))
        assert parse_config(yaml.safe_load(config.to_yaml())) == config
        recipe_plain, tried = prepared.base.model_dump(), config.model_dump()
        assert tried["data"] == recipe_plain["data"] | {"path": str(tmp_path)}
        assert tried["seed"] == prepared.config.seed and tried["model"] == recipe_plain["model"]
        changed = {
            key for key, value in tried["train"].items() if recipe_plain["train"][key] != value
        }
        assert changed == {"max_steps", "plateau", "keep_checkpoints"}
        changed = {k for k, value in tried["tables"].items() if recipe_plain["tables"][k] != value}
        assert changed <= {"method", "overrides", "budget", "row_types"}


def test_one_method_of_widths_trains_as_one_override_per_table_does(tmp_path):
    recipe = write_recipe(tmp_path)
    sizes = sizes_of_dataset(tmp_path / "toy")
    search = parse_search(search_document(recipe, budget="60%"))
    prepared = prepare_search(search, sizes)
    candidate = prepared.space.candidate_of(
        {"C1": "low_dim width=2", "C2": "low_dim width=4", "C3": "full"}
    )
    short = config_of(prepared.space, candidate, "short")
    document = short.model_dump(mode="json") | {"name": "long"}
    methods = prepared.space.methods(candidate)
    document["tables"] |= {
        "method": "full",
        "overrides": {table: written_method(method) for table, method in methods.items()},
    }
    long = parse_config(document)
    assert short.tables.method.settings.widths == {"C1": 2, "C2": 4}
    assert len(long.tables.overrides) == 3
    reports = [train(config, runs=tmp_path, quiet=True) for config in (short, long)]
    assert reports[0].serve_bytes == reports[1].serve_bytes
    assert reports[0].train_bytes == reports[1].train_bytes
    assert reports[0].valid == reports[1].valid and reports[0].test == reports[1].test
    short_weights, long_weights = (load_model(tmp_path / n).state_dict() for n in ("short", "long"))
    assert short_weights.keys() == long_weights.keys()
    for name, weight in short_weights.items():
        assert torch.equal(weight, long_weights[name]), name


def test_overrides_change_the_recipe_and_nothing_else(recipe):
    config = parse_search(search_document(recipe), ["overrides.train.epochs=3"])
    assert config.base().train.epochs == 3
    assert config.base().model == parse_search(search_document(recipe)).base().model
    assert "epochs: 1" in RECIPE
