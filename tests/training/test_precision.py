"""bfloat16 runs where the hardware has it, and is refused in one line where it would be emulated."""

from __future__ import annotations

import pytest
import torch

from embcomp.errors import ConfigError
from embcomp.training import evaluate, load_model, train
from embcomp.training.build import check_precision
from embcomp.training.distributed.process import Process
from embcomp.training.optim import precision
from tests.helpers.training_cases import toy_config, write_dataset

CPU = Process(0, 1, torch.device("cpu"))


@pytest.mark.parametrize("avx512", [False, True])
@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("library", [False, True])
def test_a_cpu_has_bfloat16_with_either_instruction_and_the_library(
    avx512, amx, library, monkeypatch, tmp_path
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: library)
    config = toy_config(tmp_path, "train.precision=bf16")
    if (avx512 or amx) and library:
        with check_precision(config, CPU)():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    else:
        with pytest.raises(
            ConfigError, match="this CPU .* would emulate it, .* Use fp32"
        ) as caught:
            check_precision(config, CPU)
        assert "\n" not in str(caught.value)
    with check_precision(toy_config(tmp_path), CPU)():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_a_torch_without_the_question_says_no(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert not precision.cpu_has_bf16()


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["full", "{name: lr2vq, subvector_dim: 4, num_codewords: 4, from_dense: false}"]
)
def test_a_run_in_bfloat16_ends_beside_one_in_float32(method, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    losses, weights = [], []
    for kind in ("fp32", "bf16"):
        config = toy_config(
            write_dataset(tmp_path / kind),
            f"train.precision={kind}",
            f"tables.method={method}",
            "model={name: autoint}",
        )
        train(config, runs=tmp_path / kind, quiet=True)
        losses.append(evaluate(tmp_path / kind / config.name, "valid", quiet=True).metrics.log_loss)
        weights.append(load_model(tmp_path / kind / config.name).state_dict())
    assert losses[1] == pytest.approx(losses[0], abs=0.01)
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert all(weights[0][name].dtype == weights[1][name].dtype for name in weights[0])
