"""What a real Spark writes, by the programs that the docs show: counts to rank, and ids to take as they are."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import polars as pl
import pytest

from embcomp.data_pipelines.prepare import prepare
from embcomp.errors import DataError
from tests.helpers.raw_logs import read_split, vocabulary

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(500)]

# One Spark for all: it takes seconds to start. `inferred` is the trap: Spark guesses types.
PROGRAM = textwrap.dedent(
    """
    import sys
    from functools import reduce
    from pyspark.sql import SparkSession, functions as f

    raw, out = sys.argv[1:]
    spark = (
        SparkSession.builder.master("local[2]")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.sql.shuffle.partitions", "3")
        .config("spark.sql.adaptive.enabled", "false")  # which would make one file of few rows
        .config("spark.driver.memory", "600m")
        .getOrCreate()
    )
    features = ["user", "item"]

    def count(rows, to):
        groups = [
            rows.groupBy(f.lit(name).alias("feature"), f.col(name).cast("string").alias("value")).count()
            for name in features
        ]
        reduce(lambda a, b: a.unionByName(b), groups).write.mode("overwrite").parquet(to)

    rows = spark.read.csv(raw, header=True, schema="y INT, user STRING, item STRING")
    count(rows, f"{out}/counts")
    count(spark.read.csv(raw, header=True, inferSchema=True), f"{out}/inferred")

    # Ids by rank, as Spark would make them: 2 and up by count, ties by value.
    encoded = rows
    for name in features:
        ranked = spark.read.parquet(f"{out}/counts").where(f.col("feature") == name)
        ranked = ranked.where("value is not null").orderBy(f.desc("count"), "value").collect()
        ids = [(row["value"], place + 2) for place, row in enumerate(ranked)]
        table = spark.createDataFrame(ids, f"{name} STRING, id INT")
        encoded = encoded.join(f.broadcast(table), name, "left").drop(name)
        encoded = encoded.withColumnRenamed("id", name)
    encoded.repartition(3).write.mode("overwrite").parquet(f"{out}/encoded")
    spark.stop()
    """
)


def why_not() -> str | None:
    """What a machine lacks for it; None when nothing is."""
    if importlib.util.find_spec("pyspark") is None:
        return "pyspark is not installed (pip install pyspark)"
    if shutil.which("java") is None:
        return "Java is not installed (apt-get install openjdk-17-jre-headless)"
    return None


@pytest.fixture(scope="module")
def spark(tmp_path_factory):
    """Raw rows in two CSV files, and what Spark made of them."""
    reason = why_not()
    if reason and os.environ.get("CI"):
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("spark")
    rng = np.random.default_rng(5)
    rows = 500
    frame = pl.DataFrame(
        {
            "y": rng.integers(0, 2, rows),
            "user": [f"{n + 1234567}d" for n in rng.zipf(1.5, rows).clip(max=60)],
            "item": [f"{n:03d}" for n in rng.integers(0, 40, rows)],
        }
    )
    (folder / "raw").mkdir()
    # Spark reads the larger file first, whatever the names.
    frame[:100].write_csv(folder / "raw" / "a.csv")
    frame[100:].write_csv(folder / "raw" / "b.csv")
    environment = {**os.environ, "PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder / "raw"), str(folder)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "s.yaml").write_text("{name: s, label: y, categorical: [user, item], format: csv}")
    return folder, frame


def run(spark, out, **options):
    options = {"split": {"kind": "chronological", "train": 1, "valid": 0, "test": 0}} | options
    return prepare(spark[0] / "raw", out, importer="table", schema=spark[0] / "s.yaml", **options)


def test_counts_of_a_group_by_give_the_vocabulary_that_counting_gives(spark, tmp_path):
    assert len(list((spark[0] / "counts").glob("part-*.parquet"))) > 1
    own = run(spark, tmp_path / "own", name="s")
    given = run(spark, tmp_path / "given", name="s", vocabulary=spark[0] / "counts")
    assert given.digest == own.digest
    for name in ("user", "item"):
        assert vocabulary(given, name).equals(vocabulary(own, name))


def test_counts_of_inferred_types_are_refused(spark, tmp_path):
    """`1234567d` became 1234567.0, and `007` became 7."""
    inferred = pl.read_parquet(spark[0] / "inferred" / "*.parquet")
    assert "1234568.0" in inferred["value"].to_list()
    with pytest.raises(DataError, match="none of the 500 values of 'user'.*inferSchema"):
        run(spark, tmp_path / "out", vocabulary=spark[0] / "inferred")
    assert not (tmp_path / "out").exists()


def test_rows_that_spark_encoded_are_taken_as_they_are(spark, tmp_path):
    own = run(spark, tmp_path / "own", name="s")
    sizes = {f.name: f.num_embeddings for f in own.categorical}
    (tmp_path / "ids.yaml").write_text(
        f"{{name: s, label: y, categorical: ["
        f"{{name: user, encode: ids, num_embeddings: {sizes['user']}}}, "
        f"{{name: item, encode: ids, num_embeddings: {sizes['item']}}}]}}"
    )
    info = prepare(
        spark[0] / "encoded",
        tmp_path / "out",
        importer="table",
        schema=tmp_path / "ids.yaml",
        encode="ids",
        split={"kind": "chronological", "train": 1, "valid": 0, "test": 0},
    )
    columns = ["label", "user", "item"]
    ours, theirs = (read_split(i, "train").select(columns).sort(columns) for i in (own, info))
    assert ours.equals(theirs)
    assert [f.frequency_quantiles for f in info.categorical] == [
        f.frequency_quantiles for f in own.categorical
    ]
