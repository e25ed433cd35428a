"""The toy dataset is a prepared dataset in every respect that readers rely on."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embcomp.data_pipelines.schema import FIRST_ID, DatasetInfo
from embcomp.data_pipelines.synthetic.toy import write_toy_dataset


def _train(folder, info, column):
    tables = [pq.read_table(folder / file) for file in info.splits["train"].files]
    values = [t[column].combine_chunks() for t in tables]
    return np.concatenate([v.flatten() if pa.types.is_list(v.type) else v for v in values])


def test_description_and_files_agree(tmp_path):
    write_toy_dataset(tmp_path, multi_valued=["C2"], group="C3", files_per_split=3)
    info = DatasetInfo.load(tmp_path)
    assert info.group == "C3"
    for split, count in (("train", 512), ("valid", 128), ("test", 128)):
        files = info.split(split).files
        assert len(files) == 3
        tables = [pq.read_table(tmp_path / file) for file in files]
        assert sum(len(table) for table in tables) == info.split(split).rows == count
        assert sum(np.asarray(t["label"]).sum() for t in tables) == info.split(split).positives
        assert tables[0].column_names == ["label", "I1", "I2", "C1", "C2", "C3"]


def test_ids_are_ranked_by_train_frequency_and_fill_the_table(tmp_path):
    info = write_toy_dataset(tmp_path, num_values=(40, 20), multi_valued=["C2"])
    assert [feature.num_embeddings for feature in info.categorical] == [42, 22]
    for feature in info.categorical:
        counts = np.bincount(_train(tmp_path, info, feature.name))
        assert len(counts) == feature.num_embeddings
        assert counts[1] == 0
        assert (np.diff(counts[FIRST_ID:]) <= 0).all()
        assert counts.min(initial=1, where=np.arange(len(counts)) != 1) > 0


def test_same_seed_same_bytes(tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_toy_dataset(tmp_path / folder, seed=seed)
    file = "train/part-00000.parquet"
    a, b, c = ((tmp_path / folder / file).read_bytes() for folder in "abc")
    assert a == b
    assert a != c


def test_an_unknown_multi_valued_feature_is_named(tmp_path):
    with pytest.raises(ValueError, match="C9"):
        write_toy_dataset(tmp_path, multi_valued=["C9"])
