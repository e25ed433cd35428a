"""Each model against its formula, written out row by row in float64 with the model's weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from embcomp.models import (
    AutoIntConfig,
    DCNv2Config,
    DeepFMConfig,
    DLRMConfig,
    FMConfig,
    LRConfig,
    ModelConfig,
    WideDeepConfig,
)
from tests.helpers.model_cases import CASES, CONFIGS, DIM, NAMES, Batch, build, make_batch

Weights = dict[str, Tensor]


def bag_sum(weights: Weights, tables: str, name: str, bag: list[int], dim: int) -> Tensor:
    total = torch.zeros(dim, dtype=torch.float64)
    for row in bag:
        total = total + weights[f"{tables}.embedding_bags.t_{name}.weight"][row]
    return total


def categorical(weights: Weights, batch: Batch, row: int) -> list[Tensor]:
    return [bag_sum(weights, "tables", name, batch.bags[name][row], DIM) for name in NAMES]


def all_fields(weights: Weights, batch: Batch, row: int) -> list[Tensor]:
    vectors = weights["fields.numeric.weight"]
    numeric = [float(batch.dense[row, i]) * vectors[i] for i in range(len(vectors))]
    return numeric + categorical(weights, batch, row)


def linear_part(weights: Weights, batch: Batch, row: int) -> float:
    logit = 0.0
    for name in NAMES:
        logit += bag_sum(weights, "first_order_tables", name, batch.bags[name][row], 1).item()
    for value, weight in zip(batch.dense[row], weights["linear.numeric.weight"][:, 0]):
        logit += float(value) * weight.item()
    return logit


def pairs(fields: list[Tensor]) -> list[float]:
    return [
        sum(float(x) * float(y) for x, y in zip(fields[i], fields[j]))
        for i in range(len(fields))
        for j in range(i + 1, len(fields))
    ]


def affine(weights: Weights, name: str, x: Tensor) -> Tensor:
    out = weights[f"{name}.weight"] @ x
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def mlp(weights: Weights, name: str, x: Tensor, relu_last: bool = False) -> Tensor:
    """Linear layers with ReLU between, their batch norms by running statistics."""
    layers = sorted({int(k.split(".")[-2]) for k in weights if k.startswith(f"{name}.")})
    linear = [i for i in layers if weights[f"{name}.{i}.weight"].dim() == 2]
    for i in linear:
        x = affine(weights, f"{name}.{i}", x)
        norm = f"{name}.{i + 1}"
        if f"{norm}.running_mean" in weights:
            x = (x - weights[f"{norm}.running_mean"]) / (
                weights[f"{norm}.running_var"] + 1e-5
            ).sqrt()
            x = x * weights[f"{norm}.weight"] + weights[f"{norm}.bias"]
        if i != linear[-1] or relu_last:
            x = x.clamp(min=0)
    return x


def reference_lr(config: LRConfig, weights: Weights, batch: Batch, row: int) -> float:
    return linear_part(weights, batch, row) + weights["linear.bias"].item()


def reference_fm(config: FMConfig, weights: Weights, batch: Batch, row: int) -> float:
    linear = linear_part(weights, batch, row) + weights["linear.bias"].item()
    return linear + sum(pairs(all_fields(weights, batch, row)))


def reference_deepfm(config: DeepFMConfig, weights: Weights, batch: Batch, row: int) -> float:
    fields = all_fields(weights, batch, row)
    deep = mlp(weights, "dnn", torch.cat(fields)).item()
    return linear_part(weights, batch, row) + sum(pairs(fields)) + deep


def reference_widedeep(config: WideDeepConfig, weights: Weights, batch: Batch, row: int) -> float:
    deep = mlp(weights, "dnn", torch.cat(all_fields(weights, batch, row))).item()
    return linear_part(weights, batch, row) + deep


def reference_dlrm(config: DLRMConfig, weights: Weights, batch: Batch, row: int) -> float:
    numeric = mlp(weights, "interact.bottom", batch.dense[row].double(), relu_last=True)
    fields = [numeric, *categorical(weights, batch, row)]
    if config.interaction == "cat":
        top_input = torch.cat(fields)
    else:
        products = torch.tensor(pairs(fields), dtype=torch.float64)
        top_input = torch.cat([numeric, products])
    return mlp(weights, "top", top_input).item()


def cross_layer(config: DCNv2Config, weights: Weights, layer: int, x0: Tensor, x: Tensor) -> Tensor:
    if config.low_rank is None:
        return x + x0 * affine(weights, f"cross.layers.{layer}", x)
    name = f"cross.layers.{layer}"
    scores = [math.exp(float(gate @ x)) for gate in weights["cross.gate.weight"]]
    out = x
    for i, score in enumerate(scores):
        hidden = torch.tanh(weights[f"{name}.down"][i].T @ x)
        hidden = torch.tanh(weights[f"{name}.core"][i].T @ hidden)
        expert = x0 * (weights[f"{name}.up"][i].T @ hidden + weights[f"{name}.bias"])
        out = out + score / sum(scores) * expert
    return out


def reference_dcnv2(config: DCNv2Config, weights: Weights, batch: Batch, row: int) -> float:
    x0 = torch.cat(all_fields(weights, batch, row))
    x = x0
    for layer in range(config.num_cross_layers):
        x = cross_layer(config, weights, layer, x0, x)
    if config.structure == "parallel":
        x = torch.cat([x, mlp(weights, "dnn", x0, relu_last=True)])
    elif config.structure == "stacked":
        x = mlp(weights, "dnn", x, relu_last=True)
    return affine(weights, "output", x).item()


def interacting_layer(
    config: AutoIntConfig, weights: Weights, layer: int, fields: list[Tensor]
) -> list[Tensor]:
    name = f"attention.{layer}"
    width = config.attention_dim // config.num_heads
    out = []
    for m in range(len(fields)):
        heads = []
        for head in range(config.num_heads):
            part = slice(head * width, (head + 1) * width)
            query, keys, values = (
                [weights[f"{name}.{kind}.weight"][part] @ field for field in fields]
                for kind in ("query", "key", "value")
            )
            scores = [float(query[m] @ key) for key in keys]
            if config.use_scale:
                scores = [score / math.sqrt(width) for score in scores]
            total = sum(math.exp(score) for score in scores)
            mixed = torch.zeros(width, dtype=torch.float64)
            for score, value in zip(scores, values):
                mixed = mixed + math.exp(score) / total * value
            heads.append(mixed)
        y = torch.cat(heads)
        if config.use_residual and len(fields[m]) == config.attention_dim:
            y = y + fields[m]
        elif config.use_residual:
            y = y + weights[f"{name}.residual.weight"] @ fields[m]
        if config.layer_norm:
            y = (y - y.mean()) / (y.var(correction=0) + 1e-5).sqrt()
            y = y * weights[f"{name}.norm.weight"] + weights[f"{name}.norm.bias"]
        out.append(y.clamp(min=0))
    return out


def reference_autoint(config: AutoIntConfig, weights: Weights, batch: Batch, row: int) -> float:
    fields = all_fields(weights, batch, row)
    hidden = fields
    for layer in range(config.attention_layers):
        hidden = interacting_layer(config, weights, layer, hidden)
    logit = affine(weights, "output", torch.cat(hidden)).item()
    if config.dnn_hidden_units:
        logit += mlp(weights, "dnn", torch.cat(fields)).item()
    if config.use_wide:
        logit += linear_part(weights, batch, row)
    return logit


REFERENCES: dict[str, Callable[..., float]] = {
    "autoint": reference_autoint,
    "autoint_plus": reference_autoint,
    "dcnv2": reference_dcnv2,
    "deepfm": reference_deepfm,
    "dlrm": reference_dlrm,
    "fm": reference_fm,
    "lr": reference_lr,
    "widedeep": reference_widedeep,
}


def with_batch_norm(config: ModelConfig) -> ModelConfig | None:
    if "batch_norm" not in {field.name for field in dataclasses.fields(config)}:
        return None
    return dataclasses.replace(config, batch_norm=True)  # type: ignore[call-arg]


NORMED = [normed for config in CONFIGS if (normed := with_batch_norm(config)) is not None]


@pytest.mark.parametrize("config", list(dict.fromkeys(CONFIGS + NORMED)), ids=str)
def test_model_agrees_with_its_formula(config: ModelConfig):
    key = next(name for name, cases in CASES.items() if type(cases[0]) is type(config))
    model = build(config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            for name, statistic in module.named_buffers():
                if name != "num_batches_tracked":
                    statistic.uniform_(0.5, 2.0)
    batch = make_batch()
    weights = {key: value.double() for key, value in model.state_dict().items()}
    expected = [REFERENCES[key](config, weights, batch, row) for row in range(len(batch.dense))]
    logits = model(batch.dense, batch.sparse)
    torch.testing.assert_close(
        logits.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-5, atol=2e-5
    )
