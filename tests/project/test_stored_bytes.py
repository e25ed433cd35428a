"""The same settings and weights give the same bytes: artefacts, plans, prepared datasets.

What is compared must not depend on the processor. So weights are small fractions with a power of
two below, of which sums and products are exact in any order, and zeros where an exponential is taken;
fresh weights, whose last bit is the processor's, are compared within a tolerance, and a numeric column by its mean. No method that only
training can fit (k-means, codes found by it) is run here.
`tests/helpers/stored_values.py` says how the stored values are written anew.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from embcomp import CompressedEmbeddingBagCollection, save
from embcomp.cli import app
from tests.helpers.backends_under_test import CASES
from tests.helpers.digests import artefact_digests, bag_tables, dataset_digests
from tests.helpers.stored_values import check_keys, check_stored

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
OTHERS = ("search_", "benchmark_")
RECIPES = sorted(p.stem for p in CONFIGS.glob("*.yaml") if not p.stem.startswith(OTHERS))
DESCRIPTION = "whole description"
SIZES = """
C1: 2002
C2: {num_embeddings: 502, mean_length: 2.5}
C3: 52
"""


@pytest.mark.parametrize("case", CASES)
def test_an_artefact_keeps_its_bytes(case, tmp_path):
    torch.manual_seed(0)
    collection = CompressedEmbeddingBagCollection(bag_tables(), CASES[case].config).eval()
    fill(collection)
    footprint = collection.footprint
    found: dict[str, object] = {
        "bytes": {"serve": footprint.serve_bytes, "train": footprint.train_weight_bytes}
    }
    for row_type in ("fp32", "int8"):
        save(collection.compact(), tmp_path / row_type, row_type=row_type)
        digests = artefact_digests(tmp_path / row_type)
        described = ("tables.plan", "tables.row_types", "tables.bytes")
        found[row_type] = {key: digests["config"][key] for key in described} | digests["tensors"]
    check_stored("artefacts", case, found)


def test_an_artefact_describes_itself_as_it_did(tmp_path):
    save(CompressedEmbeddingBagCollection(bag_tables(), CASES["hash"].config), tmp_path / "a")
    check_stored("artefacts", DESCRIPTION, artefact_digests(tmp_path / "a")["config"])


EXPONENTS = (".thresholds.values", ".autodim.weights.values")
"""In the names of what goes through a sigmoid or a softmax, whose last bit is the processor's but at 0."""


def fill(collection: torch.nn.Module) -> None:
    """Replace weights by n/64, a different series for each tensor's name, and exponents by zeros."""
    for name, tensor in collection.state_dict().items():
        if any(part in name for part in EXPONENTS):
            tensor.zero_()
        elif tensor.is_floating_point():
            seed = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            tensor.copy_(torch.randint(-64, 65, tensor.shape, generator=seed) / 64)


@pytest.mark.parametrize("case", CASES)
def test_a_seed_draws_the_weights_that_it_drew(case):
    torch.manual_seed(0)
    collection = CompressedEmbeddingBagCollection(bag_tables(), CASES[case].config)
    found = {
        name: round(tensor.double().abs().mean().item(), 7)
        for name, tensor in sorted(collection.state_dict().items())
        if tensor.is_floating_point()
    }
    check_stored("first_weights", case, found, within=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_keeps_its_plan(recipe, tmp_path):
    (tmp_path / "sizes.yaml").write_text(SIZES)
    result = CliRunner().invoke(
        app, ["plan", str(CONFIGS / f"{recipe}.yaml"), "--tables", str(tmp_path / "sizes.yaml")]
    )
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    check_stored("plans", recipe, [line for line in lines if line.strip("─")])


def test_a_generated_log_is_prepared_as_it_was(tmp_path):
    raw, data = str(tmp_path / "raw.txt"), str(tmp_path / "data")
    numbers = ("--numeric", "I2=none", "--numeric", "I3=bucket", "--numeric", "I5=standard_log")
    for command in (
        ("generate", raw, "--rows", "3000", "--renewal", "0.2"),
        ("prepare", "criteo", raw, data, "--min-count", "2", "--group", "C1", *numbers),
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    check_stored("dataset", "generated", dataset_digests(Path(data), exact=False))


def test_nothing_else_is_stored():
    check_keys("artefacts", [*CASES, DESCRIPTION])
    check_keys("first_weights", CASES)
    check_keys("plans", RECIPES)
