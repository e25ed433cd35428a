"""What training cannot make sense of is said in its first second, or with what caused it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.errors import ConfigError, EmbcompError
from embcomp.training import train
from tests.helpers.long import long_but
from tests.helpers.resealed import reseal
from tests.helpers.training_cases import toy_config, write_dataset

pytestmark = pytest.mark.slow

DENSE_MODE = """
import sys
from embcomp.config.train_config import load_config
from embcomp.training import train
train(load_config(sys.argv[1]), runs=sys.argv[2], quiet=True)
"""


@pytest.fixture
def dataset(tmp_path):
    return write_dataset(tmp_path / "dataset")


def change_column(dataset: Path, split: str, name: str, change) -> None:
    for file in DatasetInfo.load(dataset).split(split).files:
        table = pq.read_table(dataset / file)
        index = table.column_names.index(name)
        values = pa.array(change(table[name].to_numpy()), pa.float32())
        pq.write_table(table.set_column(index, table.schema.field(name), values), dataset / file)
    reseal(dataset)


def one_class(dataset: Path, label: int) -> None:
    change_column(dataset, "valid", "label", lambda values: values * 0 + label)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("option", ["early_stop={patience: 2}", "plateau={factor: 0.5}"])
@pytest.mark.parametrize("monitor", ["auc", "gauc"])
def test_a_watch_on_a_metric_that_cannot_exist_is_refused(
    dataset, tmp_path, label, option, monitor
):
    one_class(dataset, label)
    config = toy_config(dataset, f"train.{option}", f"train.monitor={monitor}")
    with pytest.raises(ConfigError, match=f"all of its 75 labels are {label}.*log_loss"):
        train(config, runs=tmp_path / "runs", quiet=True)
    assert not (tmp_path / "runs").exists()


def test_without_a_watch_or_with_log_loss_one_class_trains(dataset, tmp_path):
    one_class(dataset, 0)
    options = ("train.early_stop={patience: 2}", "train.monitor=log_loss", "train.max_steps=2")
    assert train(toy_config(dataset, *options), runs=tmp_path, quiet=True).best_step == 2
    plain = toy_config(dataset, "name=plain", "train.max_steps=2")
    assert train(plain, runs=tmp_path, quiet=True).valid["auc"] is None


def test_gauc_without_groups_is_refused(dataset, tmp_path):
    info = DatasetInfo.load(dataset)
    info.group = None
    info.save(dataset)
    with pytest.raises(ConfigError, match="gauc needs groups.*--group"):
        train(toy_config(dataset, "train.monitor=gauc"), runs=tmp_path / "runs", quiet=True)


def test_a_loss_that_overflows_names_the_column_that_reaches_far(dataset, tmp_path):
    change_column(dataset, "train", "I2", lambda values: values * 0 + 3e38)
    config = toy_config(dataset, "model={name: dcnv2, hidden_units: [8]}")
    with pytest.raises(EmbcompError, match=r"near step 1;.*'I2' goes from 3e\+38 to 3e\+38"):
        train(config, runs=tmp_path, quiet=True)


def test_a_loss_that_overflows_by_its_learning_rate_blames_no_column(dataset, tmp_path):
    config = toy_config(dataset, "train.dense_optimizer={name: sgd, learning_rate: 1e30}")
    with pytest.raises(EmbcompError, match="clip_norm$"):
        train(config, runs=tmp_path, quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", long_but(["dense"], ["dense", "fused"]))
def test_no_warning_of_a_library_reaches_a_user_of_either_mode(dataset, tmp_path, mode):
    config = toy_config(dataset, f"train.row_optimizer.mode={mode}", "train.max_steps=2")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-c", DENSE_MODE, tmp_path / "config.yaml", tmp_path / "runs"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    assert done.stdout == ""
    assert "warn" not in done.stderr.lower(), done.stderr
