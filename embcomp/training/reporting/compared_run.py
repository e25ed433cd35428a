"""One finished run as a line of a comparison."""

from __future__ import annotations

from dataclasses import dataclass

from embcomp.training.reporting.report import Report


@dataclass(frozen=True)
class ComparedRun:
    """One line of a comparison.

    Attributes:
        name: the run's name.
        dataset: the dataset's name.
        model: the model's name.
        method: the tables' method.
        split: the split of the metrics: test, or valid for datasets without one.
        serve_bytes: what the embedding tables take when served.
        compression: how many times smaller that is than the full tables.
        auc: AUC of the best weights; NaN where undefined.
        log_loss: log loss of the best weights.
        samples_per_second: training rows per second.
        bayes_auc: best reachable AUC, where the data was generated.
        weighted_auc: AUC in which rows count by their weights; None where they have none.
        weighted_log_loss: the same of log loss.
    """

    name: str
    dataset: str
    model: str
    method: str
    split: str
    serve_bytes: int
    compression: float
    auc: float
    log_loss: float
    samples_per_second: float
    bayes_auc: float | None
    weighted_auc: float | None = None
    weighted_log_loss: float | None = None

    @classmethod
    def of(cls, report: Report) -> ComparedRun:
        """The line of a report."""
        metrics = report.valid if report.test is None else report.test
        auc = metrics.get("auc")
        return cls(
            name=report.name,
            dataset=report.dataset,
            model=report.model,
            method=report.method,
            split="valid" if report.test is None else "test",
            serve_bytes=report.serve_bytes,
            compression=report.compression,
            auc=float("nan") if auc is None else auc,
            log_loss=metrics.get("log_loss", float("nan")),
            samples_per_second=report.samples_per_second,
            bayes_auc=None if report.bayes is None else report.bayes["auc"],
            weighted_auc=metrics.get("weighted_auc"),
            weighted_log_loss=metrics.get("weighted_log_loss"),
        )


HEADINGS = ("run", "model", "method", "serve bytes", "compression", "AUC", "log loss", "rows/s")
WEIGHTED_HEADINGS = ("weighted AUC", "weighted log loss")
"""Further columns, where the rows of some run's dataset have weights."""
