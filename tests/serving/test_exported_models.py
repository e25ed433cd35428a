"""A model of each kind as an artefact and as programs: all answer as the model that was trained."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from embcomp import CompressedEmbeddingBagCollection, Hash, load
from embcomp.models import ModelConfig, ModelInputs
from embcomp.serving.artefact_config import ArtefactConfig
from embcomp.serving.artefact_saving import save_model
from embcomp.serving.modules import ServingModel
from embcomp.serving.programs.compiler import why_no_compiler
from embcomp.serving.programs.forms import FormBatch, check_form, write_form
from tests.helpers.long import long_but
from tests.helpers.model_cases import CASES, DIM, NAMES, make_batch, make_tables

# Shared layers, gates and blocks: what differs in kind from what other tests trace already.
TRACED = [CASES["xdeepfm"][0], CASES["fibinet"][1], CASES["finalmlp"][1], CASES["masknet"][2]]
EVERY = [config for configs in CASES.values() for config in configs]


def exported(config: ModelConfig, folder) -> tuple[torch.nn.Module, ServingModel]:
    """A model on hashed tables with batch norm where it has some, and what was saved of it."""
    switched = {f.name: True for f in dataclasses.fields(config) if f.name.endswith("batch_norm")}
    config = dataclasses.replace(config, **switched)

    def tables(dim: int) -> CompressedEmbeddingBagCollection:
        plain: Any = make_tables(dim)
        return CompressedEmbeddingBagCollection(
            plain.embedding_bag_configs(), Hash(num_buckets=4, collisionless=0)
        )

    inputs = ModelInputs(NAMES, DIM, 2)
    torch.manual_seed(0)
    model = config.build(
        inputs,
        tables(DIM) if config.uses_embeddings else None,
        tables(1) if config.uses_first_order else None,
    )
    batch = make_batch(batch_size=64, seed=1)
    model.train()(batch.dense, batch.sparse)  # for the statistics of batch norms
    save_model(model.eval(), folder, settings=config, inputs=inputs)
    serving = load(folder, rows="torch", mmap=True)
    assert isinstance(serving, ServingModel)
    return model, serving


def check_program(config: ModelConfig, form, folder) -> None:
    _, serving = exported(config, folder)
    batches = [FormBatch(b.dense, b.sparse) for b in (make_batch(), make_batch(batch_size=1))]
    write_form(form, serving, folder, ArtefactConfig.read(folder), bags=True)
    assert check_form(form, folder, serving, batches, bags=True) < 1e-6


@pytest.mark.parametrize("config", EVERY, ids=str)
def test_an_artefact_answers_as_the_model(config: ModelConfig, tmp_path):
    model, serving = exported(config, tmp_path / "a")
    batch = make_batch()
    with torch.no_grad():
        wanted = model(batch.dense, batch.sparse)
        found = serving(batch.dense, batch.sparse)
    assert len(wanted.unique()) > 2  # a narrow network's units may all rest for a row
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", long_but(TRACED[1:2], EVERY), ids=str)
def test_a_program_of_torch_answers_as_the_artefact(config: ModelConfig, tmp_path):
    check_program(config, "pt2", tmp_path / "a")


@pytest.mark.long
@pytest.mark.skipif(
    find_spec("onnx") is None or find_spec("onnxruntime") is None,
    reason="the extra embcomp[onnx] is not installed",
)
@pytest.mark.parametrize("config", TRACED, ids=str)
def test_a_program_of_onnx_answers_as_the_artefact(config: ModelConfig, tmp_path):
    check_program(config, "onnx", tmp_path / "a")


@pytest.mark.long
@pytest.mark.skipif(why_no_compiler() is not None, reason="no compiler of C++ is installed")
@pytest.mark.parametrize("config", TRACED[:2], ids=str)
def test_a_compiled_program_answers_as_the_artefact(config: ModelConfig, tmp_path):
    check_program(config, "aoti", tmp_path / "a")
