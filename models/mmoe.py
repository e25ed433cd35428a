"""MMoE: several labels of a row learnt at once, on one set of tables, by experts that every task weighs itself.

Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts",
KDD 2018. With one expert all gates are 1, which is the shared-bottom model that the paper compares with
(Caruana, 1997). As in the paper a gate is a linear map without bias and a softmax; the input are the stacked
fields.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embcomp.errors import ConfigError
from embcomp.models.checks import check_positive, check_units
from embcomp.models.fields import FieldEmbeddings, Pooling
from embcomp.models.layers import MLP, XavierLinear


class GatedExperts(nn.Module):
    """Experts on one input, mixed anew for each task.

    Args:
        input_dim: width C of the input.
        num_tasks: number T of tasks.
        num_experts: number E of experts.
        expert_units: widths of an expert's layers; the last is its output's, A.
        batch_norm: whether experts normalise over the batch.
        dropout: probability of dropping an expert's activation.
    """

    def __init__(
        self,
        input_dim: int,
        num_tasks: int,
        num_experts: int,
        expert_units: Sequence[int],
        *,
        batch_norm: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        if not expert_units:
            raise ConfigError("expert_units: expected one width or more, got []")
        self.experts = nn.ModuleList(
            MLP(input_dim, expert_units, batch_norm=batch_norm, dropout=dropout)
            for _ in range(num_experts)
        )
        self.gates = XavierLinear(input_dim, num_tasks * num_experts, bias=False)

    def shares(self, x: Tensor) -> Tensor:
        """How much each task takes of each expert, for inputs (B, C): (B, T, E), which sum to one."""
        return self.gates(x).unflatten(1, (-1, len(self.experts))).softmax(dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map the input (B, C) to what each task sees (B, T, A)."""
        found = torch.stack([expert(x) for expert in self.experts], dim=1)  # (B, E, A)
        return torch.bmm(self.shares(x), found)


class Towers(nn.Module):
    """A network of its own for each task.

    Args:
        input_dim: width A of what a task sees.
        num_tasks: number T of tasks.
        hidden_units: widths of a tower's hidden layers; there may be none.
        batch_norm: whether towers normalise over the batch.
        dropout: probability of dropping a hidden activation.
    """

    def __init__(
        self,
        input_dim: int,
        num_tasks: int,
        hidden_units: Sequence[int],
        *,
        batch_norm: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.towers = nn.ModuleList(
            MLP(input_dim, hidden_units, 1, batch_norm=batch_norm, dropout=dropout)
            for _ in range(num_tasks)
        )

    def forward(self, mixed: Tensor) -> Tensor:
        """Map what tasks see (B, T, A) to the logits (B, T)."""
        parts = [tower(x) for tower, x in zip(self.towers, mixed.unbind(1))]
        return torch.cat(parts, dim=1)


class MMoE(nn.Module):
    """Experts that all tasks share, mixed by a gate and scored by a tower of each task.

    Args:
        tables: collection of the embeddings (width D), which all tasks share.
        feature_names: names of the F categorical features.
        embedding_dim: width D.
        num_dense: number I of numeric features, 0 for none.
        num_tasks: number T of labels; `MultiTaskLoss` takes them in the same order.
        num_experts: number of experts; 1 is the shared-bottom model.
        expert_units: widths of an expert's layers.
        tower_units: widths of a tower's hidden layers.
        batch_norm: whether experts and towers normalise over the batch.
        dropout: probability of dropping a hidden activation.
        pooling: how to pool unpooled rows.
    """

    def __init__(
        self,
        tables: nn.Module,
        *,
        feature_names: Sequence[str],
        embedding_dim: int,
        num_dense: int,
        num_tasks: int = 2,
        num_experts: int = 8,
        expert_units: Sequence[int] = (256, 128),
        tower_units: Sequence[int] = (64,),
        batch_norm: bool = False,
        dropout: float = 0.0,
        pooling: Pooling = "sum",
    ) -> None:
        super().__init__()
        check_positive("num_tasks", num_tasks)
        check_positive("num_experts", num_experts)
        check_units("expert_units", expert_units)
        check_units("tower_units", tower_units)
        self.tables = tables
        self.fields = FieldEmbeddings(feature_names, embedding_dim, num_dense, pooling=pooling)
        self.experts = GatedExperts(
            self.fields.num_fields * embedding_dim,
            num_tasks,
            num_experts,
            expert_units,
            batch_norm=batch_norm,
            dropout=dropout,
        )
        self.towers = Towers(
            expert_units[-1], num_tasks, tower_units, batch_norm=batch_norm, dropout=dropout
        )

    def forward(self, dense: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """Return the logits (B, T) for values (B, I) and ids."""
        fields = self.fields(dense, self.tables(sparse))  # (B, I + F, D)
        return self.towers(self.experts(fields.flatten(1)))
