"""Methods that are trained in stages, with settings that make every stage short."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StagedCase:
    """One method.

    Attributes:
        method: as in `tables.method`.
        budget: as in `tables.budget`; None leaves the method at its own size.
        stages: as in `train.stages`.
        starts_from_full: whether the first stage's tables are full ones.
        ranks: on how many ranks it is compared with one process.
    """

    method: dict[str, Any]
    budget: str | None = None
    stages: dict[str, Any] = field(default_factory=dict)
    starts_from_full: bool = False
    ranks: int = 2


SHORT = {"epochs": 1, "max_steps": 6}

STAGED: dict[str, StagedCase] = {
    "low_rank": StagedCase(
        method={"name": "low_rank", "subvector_dim": 4, "latent_dim": 2},
        stages={"dense": SHORT},
        starts_from_full=True,
    ),
    "lr2vq": StagedCase(
        method={
            "name": "lr2vq",
            "subvector_dim": 4,
            "num_codewords": 8,
            "latent_dim": "auto",
            "revive_every": 2,
        },
        stages={"dense": SHORT, "low_rank": SHORT, "quantize": SHORT, "codes": SHORT},
        starts_from_full=True,
    ),
    "pq": StagedCase(
        method={
            "name": "pq",
            "subvector_dim": 2,
            "num_codewords": 8,
            "sharing_groups": [["C2", "C3"]],
        },
        stages={"dense": SHORT, "codes": SHORT},
        starts_from_full=True,
        ranks=4,
    ),
    "mgqe": StagedCase(
        method={
            "name": "mgqe",
            "subvector_dim": 2,
            "num_codewords": 8,
            "frequent_share": 0.3,
        },
        stages={"dense": SHORT, "codes": SHORT},
        starts_from_full=True,
    ),
    "dedup": StagedCase(
        method={"name": "dedup"},
        budget="60%",
        stages={"dense": SHORT, "shared": SHORT},
        starts_from_full=True,
    ),
    "pep": StagedCase(
        method={"name": "pep", "climb": 20.0},
        budget="60%",
        stages={"prune": SHORT, "retrain": SHORT},
    ),
    "deeplight": StagedCase(
        method={"name": "deeplight", "every": 2},
        budget="60%",
        stages={"prune": SHORT, "sparse": SHORT},
    ),
    "dnis": StagedCase(
        method={"name": "dnis", "quantiles": [0.5, 0.9], "learning_rate": 0.1, "decay": 0.5},
        budget="40%",
        starts_from_full=True,
    ),
    "optembed": StagedCase(
        method={"name": "optembed", "generations": 1, "population": 4, "alpha": 0.01},
        budget="40%",
        stages={"supernet": SHORT, "retrain": SHORT},
    ),
    "autodim": StagedCase(
        method={"name": "autodim"},
        budget="60%",
        stages={"search": SHORT, "retrain": SHORT},
    ),
    "cce": StagedCase(
        method={"name": "cce", "num_buckets": 3, "subvector_dim": 2, "collisionless": 12},
        stages={"hashed": SHORT, "clustered_1": SHORT, "clustered_2": SHORT},
    ),
    "matryoshka": StagedCase(
        method={"name": "matryoshka", "width_grid": 4},
        budget="60%",
        stages={"nested": SHORT},
    ),
}
