"""Layers that several models share. Linear maps start Xavier-normal with zero bias.

Letters in shapes: B batch, F fields, D width of a field, C and A widths in and out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from embcomp.models.checks import check_dropout, check_heads, check_positive, check_units


class XavierLinear(nn.Linear):
    """A linear layer that starts Xavier-normal with zero bias, also after a build on `meta`."""

    def reset_parameters(self) -> None:
        """Draw the weight anew and set the bias to zero."""
        nn.init.xavier_normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class MLP(nn.Sequential):
    """Hidden layers of linear, batch norm (optional), ReLU, dropout; then a linear output.

    Args:
        input_dim: width of the input.
        hidden_units: widths of the hidden layers; may be empty if there is an output.
        output_dim: width of the linear output layer, or None for the last hidden layer's output.
        batch_norm: whether to normalise over the batch before each ReLU.
        dropout: probability of dropping a hidden activation.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_units: Sequence[int],
        output_dim: int | None = None,
        *,
        batch_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        check_positive("input_dim", input_dim)
        check_units("hidden_units", hidden_units)
        check_dropout("dropout", dropout)
        layers: list[nn.Module] = []
        width = input_dim
        for units in hidden_units:
            layers.append(XavierLinear(width, units))
            if batch_norm:
                layers.append(nn.BatchNorm1d(units))
            layers.append(nn.ReLU())
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
            width = units
        if output_dim is not None:
            check_positive("output_dim", output_dim)
            layers.append(XavierLinear(width, output_dim))
        super().__init__(*layers)


class FactorizationMachine(nn.Module):
    """Sum of the inner products of all pairs of fields (Rendle, ICDM 2010); no parameters."""

    def forward(self, fields: Tensor) -> Tensor:
        """Reduce the fields (B, F, D) to (B,)."""
        total = fields.sum(dim=1)  # (B, D)
        return 0.5 * (total.square() - fields.square().sum(dim=1)).sum(dim=1)


def pairs_of_fields(num_fields: int, device: torch.device) -> Tensor:
    """Both fields of all pairs (2, F * (F - 1) / 2), each pair once, ordered by first field.

    Made anew each time: a cached index would be a buffer, which a build on `meta` zeroes.
    """
    return torch.triu_indices(num_fields, num_fields, 1, device=device)


class PairwiseDots(nn.Module):
    """Inner products of all pairs of fields, each pair once; no parameters."""

    def forward(self, fields: Tensor) -> Tensor:
        """Map the fields (B, F, D) to the products (B, F * (F - 1) / 2), ordered by first field."""
        num_fields = fields.shape[1]
        first, second = pairs_of_fields(num_fields, fields.device)
        products = torch.bmm(fields, fields.transpose(1, 2)).flatten(1)  # (B, F * F)
        return products.index_select(1, first * num_fields + second)


class InteractingLayer(nn.Module):
    """Multi-head self-attention over the fields, with residual and ReLU.

    Queries, keys and values are linear maps without bias or activation. The residual is the
    identity where the widths agree and a linear map without bias otherwise.

    Args:
        input_dim: width C of the incoming fields.
        attention_dim: width A of the outgoing fields, over all heads.
        num_heads: number of heads; divides A.
        use_residual: whether to add the residual.
        use_scale: whether to divide the scores by the square root of a head's width.
        layer_norm: whether to normalise each field before the ReLU.
        dropout: probability of dropping an attention weight.
    """

    def __init__(
        self,
        input_dim: int,
        attention_dim: int,
        num_heads: int,
        *,
        use_residual: bool = True,
        use_scale: bool = False,
        layer_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive("input_dim", input_dim)
        check_heads(attention_dim, num_heads)
        check_dropout("dropout", dropout)
        self.num_heads = num_heads
        self.scale = (attention_dim // num_heads) ** -0.5 if use_scale else 1.0
        self.use_residual = use_residual
        self.dropout = dropout
        self.query = XavierLinear(input_dim, attention_dim, bias=False)
        self.key = XavierLinear(input_dim, attention_dim, bias=False)
        self.value = XavierLinear(input_dim, attention_dim, bias=False)
        mapped = use_residual and input_dim != attention_dim
        self.residual = XavierLinear(input_dim, attention_dim, bias=False) if mapped else None
        self.norm = nn.LayerNorm(attention_dim) if layer_norm else None

    def forward(self, fields: Tensor) -> Tensor:
        """Map the fields (B, F, C) to (B, F, A)."""
        # The fused kernel never writes the scores (B, heads, F, F) out, which on CPU saves a third
        # of the time at a batch of 4096 with 39 fields.
        mixed = F.scaled_dot_product_attention(
            self._split_heads(self.query(fields)),
            self._split_heads(self.key(fields)),
            self._split_heads(self.value(fields)),
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
        )
        mixed = mixed.transpose(1, 2).flatten(2)  # (B, F, A)
        if self.use_residual:
            mixed = mixed + (fields if self.residual is None else self.residual(fields))
        if self.norm is not None:
            mixed = self.norm(mixed)
        # Attention keeps its own output for the backward pass; a sum or a norm does not.
        return F.relu(mixed, inplace=self.use_residual or self.norm is not None)

    def _split_heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class CrossNet(nn.Module):
    """Cross layers with full matrices: `x_{l+1} = x_l + x_0 * (W_l x_l + b_l)`.

    Args:
        input_dim: width C of the input and the output.
        num_layers: number of cross layers.
    """

    def __init__(self, input_dim: int, num_layers: int) -> None:
        super().__init__()
        check_positive("input_dim", input_dim)
        check_positive("num_layers", num_layers)
        self.layers = nn.ModuleList(XavierLinear(input_dim, input_dim) for _ in range(num_layers))

    def forward(self, x0: Tensor) -> Tensor:
        """Map (B, C) to (B, C)."""
        x = x0
        for layer in self.layers:
            x = torch.addcmul(x, x0, layer(x))
        return x


class LowRankCrossLayer(nn.Module):
    """One cross layer whose matrix is a gated mixture of low-rank experts.

    `x_{l+1} = x_l + x_0 * (sum_i g_i U_i tanh(C_i tanh(V_i' x_l)) + b)`, gates g given.

    Args:
        input_dim: width C of the input and the output.
        low_rank: rank R of each expert.
        num_experts: number of experts.
    """

    def __init__(self, input_dim: int, low_rank: int, num_experts: int) -> None:
        super().__init__()
        check_positive("input_dim", input_dim)
        check_positive("low_rank", low_rank)
        check_positive("num_experts", num_experts)
        self.down = nn.Parameter(torch.empty(num_experts, input_dim, low_rank))
        self.core = nn.Parameter(torch.empty(num_experts, low_rank, low_rank))
        self.up = nn.Parameter(torch.empty(num_experts, low_rank, input_dim))
        self.bias = nn.Parameter(torch.empty(input_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every expert's matrices Xavier-normal, each by its own widths; zero the bias."""
        for stacked in (self.down, self.core, self.up):
            nn.init.normal_(stacked, std=(2.0 / (stacked.shape[1] + stacked.shape[2])) ** 0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x0: Tensor, x: Tensor, gates: Tensor) -> Tensor:
        """Map x_0 and x_l (B, C) and the gates (B, experts) to x_{l+1} (B, C)."""
        hidden = torch.einsum("bc,ecr->ebr", x, self.down).tanh()
        hidden = torch.bmm(hidden, self.core).tanh()  # (experts, B, R)
        # Gates sum to one, so the bias and the product with x_0 move out of the mixture.
        mixed = torch.einsum("ebr,be,erc->bc", hidden, gates, self.up)
        return torch.addcmul(x, x0, mixed + self.bias)


class LowRankCrossNet(nn.Module):
    """Cross layers of low-rank experts; the experts' gates are shared by all layers.

    Args:
        input_dim: width C of the input and the output.
        num_layers: number of cross layers.
        low_rank: rank of each expert.
        num_experts: number of experts per layer.
    """

    def __init__(self, input_dim: int, num_layers: int, low_rank: int, num_experts: int) -> None:
        super().__init__()
        check_positive("num_layers", num_layers)
        self.layers = nn.ModuleList(
            LowRankCrossLayer(input_dim, low_rank, num_experts) for _ in range(num_layers)
        )
        self.gate = XavierLinear(input_dim, num_experts, bias=False)

    def forward(self, x0: Tensor) -> Tensor:
        """Map (B, C) to (B, C)."""
        x = x0
        for layer in self.layers:
            x = layer(x0, x, self.gate(x).softmax(dim=1))
        return x
