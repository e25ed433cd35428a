"""The final report of a run, as `report.json` holds it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embcomp.collection.table_row_types import RowTypes
from embcomp.config.train_config import TrainConfig
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import EmbcompError, one_line
from embcomp.io.json_values import without_nan
from embcomp.training.build import UnshardedModel
from embcomp.training.distributed.process import Process
from embcomp.training.files.run_checksums import read_checked, write_checked
from embcomp.training.loop_state import LoopState
from embcomp.training.reporting.evaluation import Evaluation
from embcomp.training.reporting.metrics import Metrics
from embcomp.training.reporting.stage_result import StageResult
from embcomp.training.run_folder import REPORT_FILE
from embcomp.training.served_rows import served_bytes


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came out of a run.

    Attributes:
        name: the run's name.
        dataset: the dataset's name.
        method: the tables' method.
        model: the model's name.
        seed: the run's seed.
        world_size: number of ranks.
        device: `cpu` or `cuda`.
        steps: training steps done, in all stages.
        epochs: whole epochs of the last stage.
        best_step: the step of the last stage whose weights are evaluated here.
        stopped: why training ended.
        valid: validation metrics of the best step, its rows as they are served.
        test: test metrics of the same; None without a test split.
        serve_bytes: what the embedding tables take when served, rows in their types.
        full_bytes: what they would take uncompressed.
        compression: `full_bytes / serve_bytes`.
        first_order_bytes: what first-order weights take when served; 0 for models without.
        train_bytes: rows, padding and row optimizer state while training, first order included.
        dense_parameters: number of parameters outside the tables.
        samples_per_second: training rows per second of the last stage, evaluations and checkpoints
            left out.
        train_seconds: time of the training steps and searches of all stages.
        wall_seconds: time of everything in all stages, interruptions left out.
        bayes: best reachable test metrics, where the data was generated.
        stages: what each stage of the run ended with.
    """

    name: str
    dataset: str
    method: str
    model: str
    seed: int
    world_size: int
    device: str
    steps: int
    epochs: int
    best_step: int
    stopped: str
    valid: dict[str, Any]
    test: dict[str, Any] | None
    serve_bytes: int
    full_bytes: int
    compression: float
    first_order_bytes: int
    train_bytes: int
    dense_parameters: int
    samples_per_second: float
    train_seconds: float
    wall_seconds: float
    bayes: dict[str, float] | None
    stages: list[dict[str, Any]]

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        info: DatasetInfo,
        model: UnshardedModel,
        process: Process,
        state: LoopState,
        *,
        stages: Sequence[StageResult],
        best_step: int,
        valid: dict[str, Any],
        test: dict[str, Any] | None,
        dense_parameters: int,
        rows: int,
    ) -> Report:
        """Put a finished run's results together; `rows` are those that the last stage trained on."""
        serve = full = first_order = 0
        types = RowTypes.of(config.tables.row_types)
        if model.tables is not None:
            serve, full = served_bytes(model.tables, types), model.tables.plan.full_bytes
        if model.first_order is not None:
            first_order = served_bytes(model.first_order, types)
        steps = sum(stage.steps for stage in stages)
        optimizer = config.train.row_optimizer.name
        return cls(
            name=config.name,
            dataset=info.name,
            method=config.tables.method.name,
            model=config.model.name,
            seed=config.seed,
            world_size=process.world_size,
            device=process.device.type,
            steps=steps,
            epochs=state.epoch,
            best_step=best_step,
            stopped=state.stopped,
            valid=valid,
            test=test,
            serve_bytes=serve,
            full_bytes=full,
            compression=full / serve if serve else 1.0,
            first_order_bytes=first_order,
            train_bytes=sum(c.footprint.train_bytes(optimizer) for c in model.collections()),
            dense_parameters=dense_parameters,
            samples_per_second=rows / state.train_seconds if state.train_seconds else 0.0,
            train_seconds=sum(stage.train_seconds for stage in stages),
            wall_seconds=sum(stage.wall_seconds for stage in stages),
            bayes=info.bayes.model_dump() if info.bayes else None,
            stages=[dataclasses.asdict(stage) for stage in stages],
        )

    def save(self, folder: Path) -> None:
        """Write report.json; its presence says that the run is finished."""
        text = json.dumps(without_nan(dataclasses.asdict(self)), indent=1) + "\n"
        write_checked(folder / REPORT_FILE, text)

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """The report of a finished run."""
        path = Path(folder) / REPORT_FILE
        try:
            report = cls(**json.loads(path.read_text(encoding="utf-8")))
            read_checked(path)
            return report
        except FileNotFoundError:
            if not Path(folder).exists():
                raise EmbcompError(f"{folder} does not exist; name a run's folder") from None
            raise EmbcompError(
                f"{folder} has no {REPORT_FILE}: the run has not finished; start it again to go on"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            raise EmbcompError(
                f"{path} is not a report of this version: {one_line(error)}"
            ) from None


def metrics_record(metrics: Metrics, weighted: Metrics | None) -> dict[str, float]:
    """Metrics by name, and the weighted ones beside them as `weighted_auc` and so on."""
    record = dataclasses.asdict(metrics)
    if weighted is not None:
        record |= {f"weighted_{name}": each for name, each in dataclasses.asdict(weighted).items()}
    return record


def as_record(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation as the flat mapping that metrics.jsonl and reports hold."""
    return without_nan(
        {
            **metrics_record(evaluation.metrics, evaluation.weighted),
            "unseen_rate": evaluation.unseen_rate,
            "unseen_rate_by_feature": evaluation.unseen_rate_by_feature,
        }
    )
