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
    FiBiNETConfig,
    FinalMLPConfig,
    FMConfig,
    GDCNConfig,
    LRConfig,
    MaskNetConfig,
    ModelConfig,
    PNNConfig,
    WideDeepConfig,
    XDeepFMConfig,
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


def reference_xdeepfm(config: XDeepFMConfig, weights: Weights, batch: Batch, row: int) -> float:
    fields = all_fields(weights, batch, row)
    maps, sums = fields, []
    for layer in range(len(config.cin_units)):
        mixture = weights[f"cin.layers.{layer}.weight"]
        constant = weights[f"cin.layers.{layer}.bias"]
        products = torch.stack([field * other for field in fields for other in maps])
        maps = [mixture[u] @ products + constant[u] for u in range(len(mixture))]
        sums += [each.sum() for each in maps]
    logit = linear_part(weights, batch, row)
    logit += affine(weights, "cin_output", torch.stack(sums)).item()
    if config.hidden_units:
        logit += mlp(weights, "dnn", torch.cat(fields)).item()
    return logit


def reference_pnn(config: PNNConfig, weights: Weights, batch: Batch, row: int) -> float:
    fields = all_fields(weights, batch, row)
    products = torch.tensor(pairs(fields), dtype=torch.float64)
    return mlp(weights, "dnn", torch.cat([*fields, products])).item()


def bilinear_products(config: FiBiNETConfig, matrices: Tensor, fields: list[Tensor]) -> Tensor:
    products: list[Tensor] = []
    for i in range(len(fields)):
        for j in range(i + 1, len(fields)):
            place = {"field_all": 0, "field_each": i, "field_interaction": len(products)}
            products.append((fields[i] @ matrices[place[config.bilinear]]) * fields[j])
    return torch.cat(products)


def reference_fibinet(config: FiBiNETConfig, weights: Weights, batch: Batch, row: int) -> float:
    fields = all_fields(weights, batch, row)
    means = torch.stack([field.mean() for field in fields])
    hidden = affine(weights, "weigh.squeeze", means).clamp(min=0)
    factors = affine(weights, "weigh.excite", hidden)
    factors = factors.clamp(min=0) if config.excitation == "relu" else factors.sigmoid()
    weighed = [factor * field for factor, field in zip(factors, fields)]
    second = "products" if config.share_bilinear else "weighed_products"
    products = [
        bilinear_products(config, weights["products.weight"], fields),
        bilinear_products(config, weights[f"{second}.weight"], weighed),
    ]
    return linear_part(weights, batch, row) + mlp(weights, "dnn", torch.cat(products)).item()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * weight + bias


def mask_block(
    config: MaskNetConfig, weights: Weights, block: int, flat: Tensor, hidden: Tensor
) -> Tensor:
    name = f"masked.blocks.{block}"
    out = weights[f"{name}.linear.weight"] @ (hidden * mlp(weights, f"{name}.mask", flat))
    if config.layer_norm:
        out = layer_norm(out, weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"])
    return out.clamp(min=0)


def reference_masknet(config: MaskNetConfig, weights: Weights, batch: Batch, row: int) -> float:
    fields = all_fields(weights, batch, row)
    flat = hidden = torch.cat(fields)
    if config.embedding_norm:
        scales, shifts = weights["norm.weight"], weights["norm.bias"]
        hidden = torch.cat([layer_norm(*each) for each in zip(fields, scales, shifts)])
    if config.structure == "serial":
        for block in range(len(config.hidden_units)):
            hidden = mask_block(config, weights, block, flat, hidden)
        return affine(weights, "masked.output", hidden).item()
    blocks = [mask_block(config, weights, n, flat, hidden) for n in range(config.num_blocks)]
    return mlp(weights, "masked.dnn", torch.cat(blocks)).item()


def reference_gdcn(config: GDCNConfig, weights: Weights, batch: Batch, row: int) -> float:
    x0 = torch.cat(all_fields(weights, batch, row))
    x = x0
    for layer in range(config.num_cross_layers):
        name = f"cross.layers.{layer}"
        x = (
            x
            + x0
            * affine(weights, f"{name}.cross", x)
            * (weights[f"{name}.gate.weight"] @ x).sigmoid()
        )
    if config.structure == "parallel":
        x = torch.cat([x, mlp(weights, "dnn", x0, relu_last=True)])
    elif config.structure == "stacked":
        x = mlp(weights, "dnn", x, relu_last=True)
    return affine(weights, "output", x).item()


def gated(config: FinalMLPConfig, weights: Weights, batch: Batch, row: int, stream: int) -> Tensor:
    fields = all_fields(weights, batch, row)
    place = {name: len(fields) - len(NAMES) + n for n, name in enumerate(NAMES)}
    left_out = [place[name] for name in config.gate_only]
    flat = torch.cat([field for n, field in enumerate(fields) if n not in left_out])
    if not config.feature_selection:
        return flat
    names, numeric = {
        1: (config.context1, config.context1_numeric),
        2: (config.context2, config.context2_numeric),
    }[stream]
    context = [fields[place[name]] for name in names]
    if numeric:
        vectors = weights[f"gate{stream}.numeric.weight"]
        context = [float(batch.dense[row, i]) * vectors[i] for i in range(len(vectors))] + context
    if not context:
        context = [weights[f"gate{stream}.vector.weight"][0]]
    return 2 * mlp(weights, f"gate{stream}.network", torch.cat(context)).sigmoid() * flat


def reference_finalmlp(config: FinalMLPConfig, weights: Weights, batch: Batch, row: int) -> float:
    first, second = (
        mlp(weights, f"mlp{stream}", gated(config, weights, batch, row, stream), relu_last=True)
        for stream in (1, 2)
    )
    logit = affine(weights, "fusion.first", first) + affine(weights, "fusion.second", second)
    heads = zip(
        first.chunk(config.num_heads), weights["fusion.weight"], second.chunk(config.num_heads)
    )
    return logit.item() + sum(float(x @ matrix @ y) for x, matrix, y in heads)


REFERENCES: dict[str, Callable[..., float]] = {
    "autoint": reference_autoint,
    "autoint_plus": reference_autoint,
    "dcnv2": reference_dcnv2,
    "deepfm": reference_deepfm,
    "dlrm": reference_dlrm,
    "fibinet": reference_fibinet,
    "finalmlp": reference_finalmlp,
    "fm": reference_fm,
    "gdcn": reference_gdcn,
    "lr": reference_lr,
    "masknet": reference_masknet,
    "pnn": reference_pnn,
    "widedeep": reference_widedeep,
    "xdeepfm": reference_xdeepfm,
}


def with_batch_norm(config: ModelConfig) -> ModelConfig | None:
    names = [field.name for field in dataclasses.fields(config)]
    switched = {name: True for name in names if name.endswith("batch_norm")}
    return dataclasses.replace(config, **switched) if switched else None


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
