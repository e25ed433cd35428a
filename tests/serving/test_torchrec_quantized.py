"""TorchRec's own quantising of a collection serves what our artefacts serve, in rows as tight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchrec.inference.modules import quantize_inference_model
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.quant.embedding_modules import quant_prep_customize_row_alignment

import embcomp
from embcomp import CompressedEmbeddingBagCollection
from embcomp.testing.check_data import plain_tables, random_batch
from tests.helpers.backends_under_test import CASES

DIM = 16
ROW_BYTES = {
    "fp16": lambda dim: 2 * dim,
    "int8": lambda dim: dim + 4,
    "int4": lambda dim: dim / 2 + 4,
}
TYPES = {"fp16": torch.half, "int8": torch.int8, "int4": torch.quint4x2}
ALIGNED = 128  # bytes, in which FBGEMM lays out tables


@pytest.mark.parametrize("row_type", TYPES)
@pytest.mark.parametrize("case", ["full", "hash"])
def test_torchrecs_quantised_rows_answer_as_the_artefact(tmp_path, case, row_type):
    check(tmp_path, case, row_type, width=DIM)


def test_shared_rows_are_quantised_too(tmp_path):
    check(tmp_path, "unified", "fp16", width=8)


def check(folder, case, row_type, *, width):
    tables = plain_tables(dim=DIM)
    collection = CompressedEmbeddingBagCollection([t.bag() for t in tables], CASES[case].config)
    features = random_batch(tables, seed=0, batch_size=4)
    embcomp.save(collection, folder / "artefact", row_type=row_type)
    wanted = embcomp.load(folder / "artefact")(features)

    model = nn.ModuleDict({"tables": copy.deepcopy(collection)}).eval()
    quant_prep_customize_row_alignment(model, {EmbeddingBagCollection}, 4)
    served = quantize_inference_model(model, quantization_dtype=TYPES[row_type])["tables"]
    found = served(features)
    assert found.keys() == wanted.keys()
    torch.testing.assert_close(found.values(), wanted.values(), rtol=0, atol=1e-6)
    held = sum(m.weights_host.numel() for m in served.modules() if hasattr(m, "weights_host"))
    row = int(ROW_BYTES[row_type](width))
    sizes = [table.num_embeddings * row for table in collection.physical_tables]
    assert held == sum(-(-size // ALIGNED) * ALIGNED for size in sizes)
