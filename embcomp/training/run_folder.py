"""`runs/<name>/`: what a run leaves behind, and whether it may be continued.

config.yaml (resolved), dataset.json (a copy), metrics.jsonl (the same bytes for the same run),
timing.jsonl, checkpoints/, tensorboard/ and, when the run is finished, report.json. A run in several
stages has a folder for each of them, stages/<number>-<name>/, with the stage's own checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from embcomp.config.train_config import TrainConfig, load_config
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import CheckpointError, ConfigError, DataError, EmbcompError
from embcomp.io.folder_lock import folder_lock
from embcomp.training.files.run_checksums import read_checked, rewrite_checked, write_checked

REPORT_FILE = "report.json"
_CONFIG_FILE = "config.yaml"
_DATASET_FILE = "dataset.json"
# Settings that nothing in a run depends on.
_FREE = ("train.handover_memory", "train.shard_codes_above")


class StageFolder:
    """Paths of one stage of a run.

    Attributes:
        checkpoints: the stage's checkpoints.
        forms: how the tables are stored in this stage; written last of what a stage begins with.
        start_optimizer: folder of what optimizers begin with, in a run with a warm start.
        warm_start: what became of the rows of an earlier run; written last of what it begins with.
        start: folder of the tensors that the stage begins with, where they are not drawn afresh.
        progress: what an unfinished search can go on from.
        done: what the stage ended with; its presence says that the stage is finished.

    Args:
        path: the stage's folder; the run's own where it has one stage.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.forms = path / "forms.json"
        self.start = path / "start"
        self.start_optimizer = path / "start_optimizer"
        self.warm_start = path / "warm_start.json"
        self.progress = path / "progress.json"
        self.done = path / "done.json"


class RunFolder:
    """Paths of a run.

    Args:
        path: the run's folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.timing = path / "timing.jsonl"
        self.tensorboard = path / "tensorboard"
        self.report = path / REPORT_FILE

    @property
    def is_new(self) -> bool:
        """Whether there is nothing here to go on from: no checkpoint, start and report."""
        if not (self.path / _CONFIG_FILE).exists():
            return True
        begun = ("checkpoints/step-*", "stages/*/*", "start/*")
        return not (self.report.exists() or any(any(self.path.glob(each)) for each in begun))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes out, as two runs in one folder would mix their checkpoints."""
        self.path.mkdir(parents=True, exist_ok=True)
        busy = f"another process is training in {self.path}; wait for it or choose another name"
        with folder_lock(self.path, busy=ConfigError(busy)):
            yield

    def stage(self, index: int, names: Sequence[str]) -> StageFolder:
        """The folder of one of the run's stages.

        Args:
            index: the stage's place.
            names: the names of all stages.
        """
        if len(names) == 1:
            return StageFolder(self.path)
        name = re.sub(r"[^\w.@+-]", "_", names[index])  # a table's name may be in it
        return StageFolder(self.path / "stages" / f"{index + 1}-{name}")

    def config(self, data: str | Path | None = None) -> TrainConfig:
        """The run's resolved config.

        Args:
            data: where its dataset lies now; where the config says by default.
        """
        path = self.path / _CONFIG_FILE
        if not path.exists():
            raise EmbcompError(f"{self.path} is not a run folder: it has no {_CONFIG_FILE}")
        read_checked(path)
        config = load_config(path)
        return config if data is None else config.with_data(data)

    def dataset(self, config: TrainConfig) -> DatasetInfo:
        """The dataset that the run was trained on, read where its config says.

        Raises:
            DataError: When it is not there.
            ConfigError: When another one is.
        """
        self.check_dataset_is_there(config)
        info = DatasetInfo.load(config.data.path)
        self._check_dataset(config)
        return info

    def check_dataset_is_there(self, config: TrainConfig) -> None:
        """Raise with the way out when a run that has begun cannot find its dataset."""
        if not self.is_new and not (Path(config.data.path) / _DATASET_FILE).is_file():
            raise DataError(
                f"{self.path} was trained on {config.data.path}, where no dataset is now; say where "
                "it is: --data FOLDER, or data=FOLDER from Python"
            )

    def has_dataset(self, path: str | Path) -> bool:
        """Whether the dataset in a folder is the one that the run was trained on."""
        own, text = self.path / _DATASET_FILE, Path(path) / _DATASET_FILE
        if not own.is_file():
            raise CheckpointError(
                f"{own}, which says what the run was trained on, is missing: copy it again, or the whole folder"
            )
        return text.is_file() and text.read_text(encoding="utf-8") == read_checked(own)

    def _check_dataset(self, config: TrainConfig) -> None:
        if not self.has_dataset(config.data.path):
            raise ConfigError(
                f"{config.data.path} was prepared anew since the run in {self.path} began: its "
                "dataset.json differs. Choose another name or remove the folder to start afresh"
            )

    def create(self, config: TrainConfig) -> None:
        """Write down what the run is; the config last, as it marks the run as begun."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_checked(self.path / _DATASET_FILE, _dataset_text(config))
        write_checked(self.path / _CONFIG_FILE, config.to_yaml())

    def check_same(self, config: TrainConfig) -> None:
        """Raise unless the run that began here had this config and this dataset."""
        if self.has_dataset(config.data.path):  # wherever it lies now
            before = self.config(config.data.path)
        else:
            before = self.config()
        old, new = _leaves(before.model_dump()), _leaves(config.model_dump())
        changed = [
            f"{key}: {old.get(key, 'not set')} -> {new.get(key, 'not set')}"
            for key in dict.fromkeys([*old, *new])
            if old.get(key) != new.get(key) and key not in _FREE
        ]
        if changed:
            raise ConfigError(
                f"{self.path} belongs to a run with another config; changed: {'; '.join(changed)}. "
                "Choose another name, restore the config, or remove the folder to start afresh"
            )
        self._check_dataset(config)

    def follow(self, config: TrainConfig) -> None:
        """Write down where the dataset lies now, for a run that `check_same` let through."""
        if self.config().data.path != config.data.path:
            rewrite_checked(self.path / _CONFIG_FILE, config.to_yaml())


def _dataset_text(config: TrainConfig) -> str:
    return (Path(config.data.path) / _DATASET_FILE).read_text(encoding="utf-8")


def _leaves(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    leaves: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            leaves |= _leaves(item, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = item
    return leaves
