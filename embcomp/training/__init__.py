"""Training: one loop for one process and for many; runs, checkpoints, metrics, comparison."""

from __future__ import annotations

from embcomp.training.api import evaluate, train
from embcomp.training.comparison import Comparison, compare
from embcomp.training.evaluation import Evaluation
from embcomp.training.loading import load_model
from embcomp.training.metrics import Metrics
from embcomp.training.report import Report

__all__ = [
    "Comparison",
    "Evaluation",
    "Metrics",
    "Report",
    "compare",
    "evaluate",
    "load_model",
    "train",
]
