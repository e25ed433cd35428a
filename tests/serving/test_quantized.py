"""TorchRec's quantisation for inference reaches the rows inside the collections."""

from __future__ import annotations

import copy

import pytest
import torch
from torchrec.inference.modules import quantize_inference_model
from torchrec.quant.embedding_modules import (
    EmbeddingBagCollection as QuantizedEmbeddingBagCollection,
)

from embcomp.errors import ConfigError
from embcomp.testing.cases import pooled
from embcomp.testing.check_data import awkward_tables, random_batch
from tests.helpers.backends_under_test import CASES, STORED_INTEGERS


@pytest.mark.parametrize("case", [case for case in CASES if case not in STORED_INTEGERS])
def test_int8_rows_answer_within_their_step(case):
    tables = awkward_tables((16, 8, 10))
    # As it is served: rows that are still to be gated or snapped to codewords may jump.
    collection = pooled(CASES[case], tables).compact()
    batch = random_batch(tables, seed=1, batch_size=50)
    wanted = collection(batch)
    quantized = quantize_inference_model(
        torch.nn.Sequential(copy.deepcopy(collection)), quantization_dtype=torch.int8
    )[0]
    inner = list(quantized.inner_collections())
    assert inner
    assert all(type(rows) is QuantizedEmbeddingBagCollection for rows in inner)
    found = quantized(batch)
    assert list(found.keys()) == list(wanted.keys())
    # A row of range 0.2 has steps of 0.2 / 255; bags hold up to 4 ids, and projections add up.
    error = (found.values() - wanted.values()).abs().max().item()
    rounded = any(
        bool(w.any()) for rows in collection.inner_collections() for w in rows.parameters()
    )  # zeros are exact
    assert (error > 0) == rounded and error < 4 * 3 * 0.5 * 0.7 / 255


@pytest.mark.parametrize("case", STORED_INTEGERS)
def test_stored_integers_are_not_rounded_again(case):
    tables = awkward_tables((16, 8, 10))
    quantized = quantize_inference_model(
        torch.nn.Sequential(pooled(CASES[case], tables).compact()), quantization_dtype=torch.int8
    )[0]
    with pytest.raises(ConfigError, match="t0, t1, t2 are stored integers"):
        quantized(random_batch(tables, seed=1))
