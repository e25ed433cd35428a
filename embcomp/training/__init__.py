"""Training: one loop for one process and for many; runs, checkpoints, metrics, comparison."""

from __future__ import annotations

from embcomp.training.api import evaluate, train
from embcomp.training.reporting.comparison import Comparison, compare
from embcomp.training.reporting.evaluation import Evaluation
from embcomp.training.reporting.metrics import Metrics
from embcomp.training.reporting.report import Report
from embcomp.training.stages.loading import load_model

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
