"""The demonstration: raw Criteo-format logs to three trained models, compared at their bytes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from embcomp.config.train_config import TrainConfig, parse_config
from embcomp.data_pipelines.prepare import prepare
from embcomp.data_pipelines.schema import FILE_NAME, DatasetInfo
from embcomp.data_pipelines.synthetic.generate import write_criteo_log
from embcomp.data_pipelines.synthetic.synthetic_rows import SyntheticConfig
from embcomp.errors import DataError
from embcomp.io.yaml_reading import plain
from embcomp.planning.config_plan import plan_config, sizes_of_dataset
from embcomp.training.api import train
from embcomp.training.reporting.comparison import Comparison, compare

SHARE = "10%"
"""What compressed tables may take of the full ones' bytes."""

METHODS: dict[str, dict[str, object]] = {
    "full": {"method": "full"},
    "hash": {"method": "hash", "budget": SHARE},
    "unified": {"method": {"name": "unified", "num_chunks": 2}, "budget": SHARE},
}
"""The tables of each run; everything else is equal."""

LABELS = {
    "full": "full tables",
    "hash": f"hashed tables, {SHARE} of the bytes",
    "unified": f"one shared table (Unified Embedding), {SHARE} of the bytes",
}

SCALE = 0.01
"""Generated cardinalities are Criteo's times this: about 340,000 values before rare ones go."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What to demonstrate on.

    Args:
        out: folder for everything that is made.
        data: a Criteo log; None generates one.
        rows: lines to generate.
        seed: of the generated log and of the runs.
        scale: what Criteo's cardinalities are multiplied with in generated logs.
    """

    out: Path = Path("demo")
    data: Path | None = None
    rows: int = 300_000
    seed: int = 2021
    scale: float = SCALE


def run_demo(config: DemoConfig, say: Callable[[str], None], *, progress: bool) -> Comparison:
    """Generates, prepares and trains; what an earlier call finished is taken as it is.

    Args:
        config: what to demonstrate on.
        say: called with a line before each part.
        progress: whether to show bars on stderr.
    """
    if config.data is not None and not config.data.exists():
        raise DataError(f"{config.data} does not exist; expected a Criteo log, plain or gz")
    folder = config.out / ("real" if config.data else f"generated-{config.rows}-{config.seed}")
    dataset = folder / "dataset"
    if not (dataset / FILE_NAME).is_file():
        raw = config.data or _generate(config, folder, say)
        say(f"preparing {raw}")
        # A dataset made anew makes the runs on an older one stale.
        shutil.rmtree(folder / "runs", ignore_errors=True)
        name = config.data.name if config.data else f"{config.rows:,} generated rows"
        prepare(raw, dataset, importer="criteo", name=name, progress=progress, report=say)
    if config.data is not None:
        _check_source(DatasetInfo.load(dataset), config.data, dataset)
    runs = {name: demo_run(name, dataset, config.seed) for name in METHODS}
    for run in runs.values():  # a log too small for the budget shows before any training
        plan_config(run, sizes_of_dataset(dataset))
    for name, run in runs.items():
        say(f"training AutoInt on {LABELS[name]}")
        train(run, runs=folder / "runs")
    return compare(folder / "runs" / name for name in runs)


def demo_run(method: str, dataset: Path, seed: int) -> TrainConfig:
    """The config of one of the demonstration's runs."""
    return parse_config(
        {
            "name": method,
            "seed": seed,
            "data": {"path": str(dataset), "batch_size": 1024, "eval_batch_size": 8192},
            "tables": {"embedding_dim": 16, **plain(METHODS[method])},
            "model": {
                "name": "autoint",
                "attention_dim": 32,
                "attention_layers": 2,
                "num_heads": 2,
            },
            "train": {
                "epochs": 1,
                "row_optimizer": {"name": "rowwise_adagrad", "learning_rate": 0.05},
                "dense_optimizer": {"name": "adam", "learning_rate": 0.001},
            },
        },
        source="demo",
    )


def _generate(config: DemoConfig, folder: Path, say: Callable[[str], None]) -> Path:
    raw = folder / "raw.txt"
    say(f"generating {config.rows:,} rows of raw logs in Criteo's format: {raw}")
    write_criteo_log(raw, SyntheticConfig(rows=config.rows, seed=config.seed, scale=config.scale))
    return raw


def _check_source(info: DatasetInfo, data: Path, dataset: Path) -> None:
    size = sum(file.stat().st_size for file in _files(data))
    if size != sum(source.bytes for source in info.sources):
        raise DataError(
            f"{dataset} was prepared from other files than {data}; remove it or choose another "
            "output folder"
        )


def _files(data: Path) -> list[Path]:
    return [data] if data.is_file() else [file for file in data.iterdir() if file.is_file()]
