"""FBGEMM's row-wise RMSprop with adaptive decay, as models, plans and TorchRec's sharding know it.

Of a row it keeps a running mean of the gradient's mean square `v` and the step `p` of its last update. In step `t`:

    v <- ema_beta * v + (1 - ema_beta) * mean(g^2)
    row <- max(min_shrinkage, 1 - lr * ar_alpha * (t - p)) * row - lr / (sqrt(v) + eps) * g

with `t - p = 1` for a row that was never updated: a row decays in the step that touches it, by the more the
longer it rested. TorchRec has no name for it; it takes it where the kernel's own name is among the settings.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import fbgemm_gpu
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from typing_extensions import override

from embcomp.errors import ConfigError

STATE_WORDS = 2
"""Numbers that it keeps of a row."""


class RowWiseRmspropAr(torch.optim.Optimizer):
    """Stands at a model's rows until TorchRec shards them and FBGEMM's kernels update them.

    It updates nothing itself: a gradient of a whole table does not say which rows were looked up, and those alone
    decay.

    Args:
        params: rows.
        lr: learning rate.
        eps: added to the root of the running mean.
        ar_alpha: decay of a row by each step since its last update, as a share of the learning rate.
        ema_beta: decay of the running mean.
        min_shrinkage: what a row is at least multiplied by.
        optimizer: `fused_type()`, for sharding.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.01,
        eps: float = 1e-8,
        ar_alpha: float = 0.0,
        ema_beta: float = 0.99,
        min_shrinkage: float = 0.1,
        optimizer: EmbOptimType | None = None,
    ) -> None:
        settings = {"eps": eps, "ar_alpha": ar_alpha, "ema_beta": ema_beta}
        super().__init__(params, {"lr": lr, "min_shrinkage": min_shrinkage, **settings})

    @override
    def step(self, closure: object = None) -> NoReturn:
        raise ConfigError(
            "rowwise_rmsprop_ar is in fused kernels alone, and these rows are not sharded; shard the model by "
            "DistributedModelParallel first, or use another row optimizer"
        )


def fused_type() -> EmbOptimType:
    """What FBGEMM calls it.

    Raises:
        ConfigError: where the FBGEMM that is installed lacks it.
    """
    found = getattr(EmbOptimType, "ROWWISE_RMSPROP_AR", None)
    if found is None:
        raise ConfigError(
            "train.row_optimizer: rowwise_rmsprop_ar came with fbgemm 1.9, and this is fbgemm "
            f"{fbgemm_gpu.__version__}; install the set of torch 2.14 (on CPUs: pip install -r "
            "requirements-cpu-2.14.txt), or use name: rowwise_adagrad"
        )
    assert isinstance(found, EmbOptimType)
    return found
