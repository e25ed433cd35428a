"""Raw files as people bring them: read right, or refused by name with the way out."""

from __future__ import annotations

import bz2
import datetime as dt
import gzip
import lzma
import random
import subprocess
import sys
from contextlib import suppress

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embcomp import CompressedEmbeddingBagCollection, Full
from embcomp.data_pipelines.importers import text
from embcomp.data_pipelines.importers.base import RawFile
from embcomp.data_pipelines.importers.libfm import LibFMImporter
from embcomp.data_pipelines.importers.registry import make_importer
from embcomp.data_pipelines.prepare import prepare
from embcomp.data_pipelines.preparing.feature_names import check_names
from embcomp.data_pipelines.preparing.news import clipped_news, unseen_news
from embcomp.data_pipelines.preparing.time_order import smallest
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.data_pipelines.splits import ChronologicalSplit, RandomSplit
from embcomp.data_pipelines.validate import validate_dataset
from embcomp.errors import ConfigError, DataError
from tests.data_pipelines.test_values import ALL_TRAIN, table
from tests.helpers.raw_logs import criteo_bytes, criteo_rows, decode, folder_bytes, read_split

ROWS = 120


def csv_dataset(folder, content: str, *, split=ALL_TRAIN, bad=1e-4, **schema):
    (folder / "raw.csv").write_text(content)
    importer = table(**{"label": "y", "categorical": ["u"]} | schema)
    return prepare(
        folder / "raw.csv",
        folder / "out",
        importer=importer,
        split=split,
        max_bad_rows=bad,
    )


@pytest.mark.parametrize("words", [("True", "False"), ("true", "FALSE"), ("1.0", "0"), ("1", "-0")])
def test_labels_of_true_and_false_are_one_and_zero(tmp_path, words):
    yes, no = words
    info = csv_dataset(tmp_path, f"y,u\n{yes},a\n{no},b\n{yes},c\n")
    assert read_split(info, "train")["label"].to_list() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("rule", "labels"),
    [
        ({"positive": "== buy", "negative": "!= buy"}, [1, 0, 0, 1]),
        ({"positive": ["buy", "hold"], "negative": "== sell"}, [1, 0, 1, 1]),
        ({"positive": ["buy"], "negative": ["sell"]}, [1, 0, 1]),
    ],
)
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_words_are_labels_by_a_rule(tmp_path, form, rule, labels):
    frame = pl.DataFrame({"y": ["buy", "sell", "hold", "buy"], "u": ["a", "b", "c", "d"]})
    path = tmp_path / f"raw.{form}"
    frame.write_csv(path) if form == "csv" else frame.write_parquet(path)
    importer = table(label={"column": "y"} | rule, categorical=["u"])
    info = prepare(path, tmp_path / "out", importer=importer, split=ALL_TRAIN)
    assert read_split(info, "train")["label"].to_list() == labels
    assert info.dropped_rows == 4 - len(labels)


def test_a_word_that_no_rule_explains_is_a_malformed_label(tmp_path):
    with pytest.raises(DataError, match=r"line 3: y is 'yes', expected 0 or 1.*positive: '== yes'"):
        csv_dataset(tmp_path, "y,u\n1,a\nyes,b\n")


def hive(folder, parts, suffix="parquet"):
    for name, values in parts.items():
        (folder / name).mkdir(parents=True)
        frame = pl.DataFrame({"y": [1, 0], "u": values})
        path = folder / name / f"part-00000.{suffix}"
        frame.write_csv(path) if suffix == "csv" else frame.write_parquet(path)
    (folder / "_SUCCESS").write_text("")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_partitions_are_columns_and_come_in_natural_order(tmp_path, suffix):
    parts = {
        "hour=9/at=a%3Ab": ["k", "l"],
        "hour=10/at=c": ["m", "n"],
        "hour=__HIVE_DEFAULT_PARTITION__/at=c": ["o", "p"],
    }
    hive(tmp_path / "raw", parts, suffix)
    importer = table(categorical=["u", "at"], numeric=[{"name": "hour", "transform": "none"}])
    info = prepare(tmp_path / "raw", tmp_path / "out", importer=importer, split=ALL_TRAIN)
    frame = read_split(info, "train")
    u, at = decode(info, "u"), decode(info, "at")
    assert [u[i] for i in frame["u"]] == ["k", "l", "m", "n", "o", "p"]
    assert [at[i] for i in frame["at"]] == ["a:b", "a:b", "c", "c", "c", "c"]
    assert frame["hour"].to_list() == [9, 9, 10, 10, 0, 0]
    assert info.numeric[0].missing == 2


def test_a_column_of_the_file_goes_before_its_folders_name(tmp_path):
    hive(tmp_path / "raw", {"u=zzz": ["k", "l"]})
    info = prepare(
        tmp_path / "raw", tmp_path / "out", importer=table(categorical=["u"]), split=ALL_TRAIN
    )
    assert set(decode(info, "u").values()) == {"k", "l"}


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_partition_that_is_no_number_is_named(tmp_path, suffix):
    hive(tmp_path / "raw", {"hour=nine": ["k", "l"]}, suffix)
    importer = table(categorical=["u"], numeric=["hour"])
    with pytest.raises(DataError, match="the folder hour=nine holds no number"):
        prepare(tmp_path / "raw", tmp_path / "out", importer=importer)


def test_a_block_of_malformed_rows_alone_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", 8)
    content = "y,u,x\n1,a,1\n" + "x\n" * 12 + "0,b,2\n"
    bags = [{"name": "u", "separator": "|"}]
    info = csv_dataset(tmp_path, content, bad=1.0, categorical=bags, numeric=["x"])
    assert (info.bad_rows, info.splits["train"].rows) == (12, 2)


def test_a_header_without_newlines_is_named(tmp_path):
    with pytest.raises(DataError, match="line 1: the header holds carriage returns"):
        csv_dataset(tmp_path, "y,u\r1,a\r")


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


PACKERS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_logs_give_the_bytes_of_plain_ones(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", 4096)
    rows = criteo_bytes(criteo_rows(200))
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "day_0").write_bytes(rows)
    (tmp_path / "packed").mkdir()
    pack = PACKERS[suffix]
    # Streams of several members are what parallel compressors write.
    (tmp_path / "packed" / f"day_0.{suffix}").write_bytes(pack(rows[:9000]) + pack(rows[9000:]))
    options = {"importer": "criteo", "blocks_per_part": 2, "name": "d"}
    for name in ("plain", "packed"):
        prepare(tmp_path / name, tmp_path / f"{name}_out", **options)
    plain, packed = (folder_bytes(tmp_path / f"{n}_out") for n in ("plain", "packed"))
    assert {k: v for k, v in plain.items() if k != "dataset.json"} == {
        k: v for k, v in packed.items() if k != "dataset.json"
    }


@pytest.mark.parametrize("suffix", ["bz2", "xz", "zst"])
def test_a_truncated_stream_is_named(tmp_path, suffix):
    packed = PACKERS[suffix](criteo_bytes(criteo_rows(200)))
    path = tmp_path / f"day_0.{suffix}"
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=f"day_0.{suffix} is a truncated .* file"):
        prepare(path, tmp_path / "out", importer="criteo")


def test_a_csv_with_a_compressed_suffix_is_a_csv(tmp_path):
    path = tmp_path / "raw.csv.zst"
    path.write_bytes(zstd(b"y,u\n1,a\n0,b\n"))
    info = prepare(path, tmp_path / "out", importer=table(categorical=["u"]), split=ALL_TRAIN)
    assert info.raw_rows == 2


@pytest.mark.parametrize(
    ("form", "message"), [("parquet", "cannot read .*Permission"), ("csv", "cannot read .*Permiss")]
)
def test_a_file_that_may_not_be_read_is_not_called_something_else(
    tmp_path, monkeypatch, form, message
):
    path = tmp_path / f"raw.{form}"
    path.write_text("y,u\n1,a\n")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pyarrow.parquet.ParquetFile", denied)
    monkeypatch.setattr("pathlib.Path.open", denied)
    with pytest.raises(DataError, match=message):
        prepare(path, tmp_path / "out", importer=table(categorical=["u"]))


@pytest.mark.parametrize("between", ["", "\n2,plain\n"])
def test_a_newline_within_quotes_is_called_that(tmp_path, between):
    content = f'y,u\n1,a\n0,"b{between}\n""c"\n1,d\n'
    with pytest.raises(DataError, match=r"line 3: a quoted field holds a newline.* as Parquet"):
        csv_dataset(tmp_path, content, bad=1.0)


def test_quotes_are_judged_line_by_line(tmp_path):
    content = 'y,u\n1,"a,""b"""\n0,5" tv\n1,"open\n0,"c"\n'
    info = csv_dataset(tmp_path, content, bad=0.5)
    assert set(decode(info, "u").values()) == {'a,"b"', "c"}
    reasons = (tmp_path / "out" / "bad_rows.tsv").read_text()
    assert "\t3\ta quote stands within a field that is not quoted" in reasons
    assert "\t4\ta quote is not closed" in reasons


def test_columns_that_nobody_wants_may_have_any_name(tmp_path):
    info = csv_dataset(tmp_path, ",y,,u,x,x\n1,1,9,a,8,7\n2,0,9,b,8,7\n")
    assert set(decode(info, "u").values()) == {"a", "b"}
    with pytest.raises(DataError, match=r"columns named twice: \['u'\]"):
        csv_dataset(tmp_path, "y,u,u\n1,a,b\n")


def test_parts_without_rows_are_passed_over_unless_all_are(tmp_path):
    frame = pl.DataFrame({"y": [1, 0], "u": ["a", "b"]})
    (tmp_path / "raw").mkdir()
    for at, rows in enumerate((0, 2, 0)):
        frame.head(rows).write_parquet(tmp_path / "raw" / f"part-{at}.parquet")
    importer = table(categorical=["u"])
    info = prepare(tmp_path / "raw", tmp_path / "out", importer=importer, split=ALL_TRAIN)
    assert (info.raw_rows, len(info.sources)) == (2, 3)
    empty = tmp_path / "raw" / "part-0.parquet"
    with pytest.raises(DataError, match=r"part-0\.parquet has no rows"):
        prepare(empty, tmp_path / "other", importer=importer)


@pytest.mark.parametrize("mark", ["_delta_log", ".hoodie"])
def test_a_table_whose_files_are_partly_out_of_date_is_refused(tmp_path, mark):
    hive(tmp_path / "raw", {"day=1": ["a", "b"]})
    (tmp_path / "raw" / mark).mkdir()
    with pytest.raises(DataError, match="some files are out of date"):
        prepare(tmp_path / "raw", tmp_path / "out", importer=table(categorical=["u"]))


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_what_a_schema_calls_missing_is_missing_in_every_format(tmp_path, form):
    frame = pl.DataFrame({"y": [1, 0, 1], "u": ["NA", "b", None], "k": [-1, 2, 3], "x": [-1, 4, 5]})
    path = tmp_path / f"raw.{form}"
    frame.write_csv(path) if form == "csv" else frame.write_parquet(path)
    importer = table(categorical=["u", "k"], numeric=["x"], null_values=["NA", "-1"])
    info = prepare(path, tmp_path / "out", importer=importer, split=ALL_TRAIN)
    assert [f.missing for f in (*info.categorical, *info.numeric)] == [2, 1, 1]


@pytest.mark.parametrize("label", [0.99999999, 1e-50, 2.0])
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_label_that_is_nearly_one_is_malformed(tmp_path, form, label):
    frame = pl.DataFrame({"y": [1.0, label], "u": ["a", "b"]})
    path = tmp_path / f"raw.{form}"
    frame.write_csv(path) if form == "csv" else frame.write_parquet(path)
    with pytest.raises(DataError, match="line 3: the label is not 0 or 1|line 2: the label is"):
        prepare(path, tmp_path / "out", importer=table(categorical=["u"]))


# libFM and its kin


def libfm(folder, content: str, form: str | None = None, **options):
    (folder / "raw.txt").write_text(content)
    return prepare(
        folder / "raw.txt",
        folder / "out",
        importer=make_importer("libfm", form=form),
        split=ALL_TRAIN,
        **options,
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 3:1 20:0.375", "line 2: the weight of '20:0.375' is 0.375, not 1"),
        ("1 3:1 20:1e-3", "line 2: the weight of '20:1e-3' is 1e-3, not 1"),
        ("1 3:1 20:4", "line 2: '20:4' may be a category of a field, or a weight.*--form pairs"),
        ("1 qid:7 3:1 20:1", "line 2: 'qid:7' is a query id of ranking data"),
        ("1 3:1 20:1 # doc 7", "line 2: comments .* are not read"),
    ],
)
def test_what_svm_files_say_and_is_not_read_is_refused_by_name(tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        libfm(tmp_path, f"0 1:1 2:1\n{line}\n0 1:1 5:1 6:1\n", max_bad_rows=1.0)


@pytest.mark.parametrize("late", [0, 10_500])
def test_a_weight_of_a_libffm_token_is_the_reason(tmp_path, late):
    with pytest.raises(DataError, match="0.5, not 1, and categories have no weights"):
        libfm(tmp_path, "0 0:1:1 1:4:1\n" * late + "1 0:1:1 1:4:0.5\n", max_bad_rows=0.0)


def test_a_fraction_behind_a_number_is_a_weight_however_late_it_comes(tmp_path):
    content = "0 0:17 1:4\n" * 10_500 + "1 0:17 1:0.5\n"
    with pytest.raises(DataError, match="token '1:0.5' cannot be read: a weight is no category"):
        libfm(tmp_path, content, max_bad_rows=0.0)
    assert libfm(tmp_path, content, form="pairs").bad_rows == 0


def test_numbered_fields_that_every_row_has_are_fields(tmp_path):
    info = libfm(tmp_path, "1 0:17 1:4\n0 0:18 1:4\n")
    assert info.categorical_names == ["field_0", "field_1"]


def test_a_malformed_token_among_many_is_a_malformed_line_and_does_not_change_the_form(tmp_path):
    content = "1 0:1:1 1:4:1\n" * 200 + "0 0:1 1:4:1\n"
    info = libfm(tmp_path, content, max_bad_rows=0.01)
    assert (info.bad_rows, info.categorical_names) == (1, ["field_0", "field_1"])
    assert "\t201\ttoken '0:1' cannot be read" in (tmp_path / "out" / "bad_rows.tsv").read_text()
    with pytest.raises(
        DataError, match="line 2: tokens are .* '0:1' has 1 colons where most have 2"
    ):
        libfm(tmp_path, "1 0:1:1 1:4:1\n0 0:1 1:4:1\n")


def test_tabs_part_tokens_as_spaces_do(tmp_path):
    info = libfm(tmp_path, "1\t0:1:1 1:11:1\n0\t 0:6:1\t1:14:1 \t\n")
    assert info.raw_rows == 2
    assert set(decode(info, "field_1").values()) == {"11", "14"}


def test_fields_that_appear_late_are_features(tmp_path):
    info = libfm(tmp_path, "1 0:1:1 1:4:1\n" * 10_100 + "0 0:1:1 2:9:1 2:8:1\n")
    late = info.categorical[2]
    assert (late.name, late.multi_valued, late.missing) == ("field_2", True, 10_100)
    assert set(decode(info, "field_2").values()) == {"9", "8"}


def test_a_form_is_for_libfm_only():
    for name, form in (("criteo", "pairs"), ("libfm", "pair")):
        with pytest.raises(DataError, match=f"form '{form}' is for the importer `libfm`"):
            make_importer(name, form=form)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("ratings.csv", "userId,movieId,rating,timestamp\n1,10,4.0,978300760\n2,10,2.5,5\n"),
        ("u.data", "1\t10\t4\t978300760\n2\t10\t2\t5\n"),
    ],
)
@pytest.mark.parametrize("whole_folder", [True, False])
def test_other_movielens_sets_are_led_to_the_schema_that_reads_them(
    tmp_path, file, content, whole_folder
):
    path = tmp_path / "ml" / file
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(DataError, match="prepare table --schema") as caught:
        prepare(path.parent if whole_folder else path, tmp_path / "out", importer="movielens")
    schema = str(caught.value).partition("with the schema ")[2]
    (tmp_path / "s.yaml").write_text(schema)
    info = prepare(path, tmp_path / "out", importer="table", schema=tmp_path / "s.yaml")
    assert info.raw_rows == 2
    assert info.split_rule["kind"] == "time"


def test_ratings_of_another_format_are_named(tmp_path):
    (tmp_path / "mine.dat").write_text("1,10,4\n")
    with pytest.raises(DataError, match="not parted by '::'"):
        prepare(tmp_path / "mine.dat", tmp_path / "out", importer="movielens")


# Names


@pytest.mark.parametrize(
    "name", ["type", "items", "to", "keys", "values", "a.b", "__init__", "a\x07"]
)
def test_a_name_that_no_table_can_have_is_refused_before_any_work(tmp_path, name):
    content = f'y,"{name}",n\n1,a,1\n0,b,2\n'
    with pytest.raises(DataError, match="name it anew in the schema: {name: NEW, column: OLD}"):
        csv_dataset(tmp_path, content, categorical=[name])
    info = csv_dataset(tmp_path, content, categorical=[{"name": "new", "column": name}])
    assert set(decode(info, "new").values()) == {"a", "b"}


def test_every_attribute_of_a_module_dictionary_is_refused():
    # Of a new process: what runs before this test may give torch's classes further attributes.
    names = subprocess.run(
        [sys.executable, "-c", "import torch; print(*dir(torch.nn.ModuleDict()))"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert "_modules" in names
    for name in names:
        with pytest.raises(DataError, match=f"'{name}' has a name that torch keeps"):
            check_names([name], [], "")
    check_names(["_id", "user id", "é", "a@b", "0"], ["type", "a.b"], "")


def test_a_table_that_torchrec_cannot_hold_is_named():
    from torchrec import EmbeddingBagConfig

    configs = [EmbeddingBagConfig(name="type", num_embeddings=4, embedding_dim=4)]
    with pytest.raises(ConfigError, match="cannot hold a table called 'type'"):
        CompressedEmbeddingBagCollection(tables=configs, plan=Full())


# Splits and limits


@pytest.mark.parametrize(("share", "bad"), [(0.01, 1), (0.07, 7), (0.29, 29), (0.57, 57)])
def test_a_share_of_malformed_rows_is_exact(tmp_path, share, bad):
    good = "".join(f"1,{i}\n" for i in range(100 - bad))
    info = csv_dataset(tmp_path, "y,u\n" + good + "x\n" * bad, bad=share)
    assert (info.raw_rows, info.bad_rows) == (100, bad)
    (tmp_path / "more").mkdir()
    with pytest.raises(DataError, match="malformed"):
        csv_dataset(tmp_path / "more", "y,u\n" + good[4:] + "x\n" * (bad + 1), bad=share)


def test_shares_of_rows_are_exact():
    rule = ChronologicalSplit(train=0.7, valid=0.1, test=0.2)
    assert [float(bound) for bound in rule.bounds()] == [0.7, 0.8]  # 0.7 + 0.1 < 0.8
    nothing = RandomSplit(train=0.9, valid=0.1 - 1e-10, test=0.0)
    assert nothing.bounds()[1] == 1


DAYS = [dt.datetime(2030, 1, 1) + dt.timedelta(days=i * 7 % 10) for i in range(20)]


@pytest.mark.parametrize(
    "times",
    [
        DAYS,
        [day.date() for day in DAYS],
        [day.isoformat() for day in DAYS],
        [f"{day.isoformat()}+00:00" for day in DAYS],
        [f"{day.isoformat()}Z" for day in DAYS],
        [day.timestamp() for day in DAYS],
        [int(day.timestamp()) for day in DAYS],
    ],
    ids=["timestamp", "date", "text", "text in a zone", "UTC", "float", "int"],
)
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_rows_are_split_by_a_column_of_time(tmp_path, form, times):
    frame = pl.DataFrame(
        {"y": [i % 2 for i in range(20)], "t": times, "u": list(map(str, range(20)))}
    )
    path = tmp_path / f"raw.{form}"
    frame.write_csv(path) if form == "csv" else frame.write_parquet(path)
    rule = {"kind": "time", "column": "t", "train": 0.6, "valid": 0.2, "test": 0.2}
    importer = table(categorical=["u"], split=rule)
    info = prepare(path, tmp_path / "out", importer=importer, blocks_per_part=1)
    validate_dataset(tmp_path / "out")
    assert info.split_rule == rule
    assert [info.splits[name].rows for name in ("train", "valid", "test")] == [12, 4, 4]
    early = {str(i) for i, day in enumerate(DAYS) if day < dt.datetime(2030, 1, 7)}
    assert set(decode(info, "u").values()) == early


def test_rows_of_one_time_stay_together_and_a_row_without_time_is_malformed(tmp_path):
    content = "y,t,u\n1,5,a\n0,5,b\n1,5,c\n0,7,d\n1,,e\n"
    rule = {"kind": "time", "column": "t", "train": 0.5, "valid": 0.25, "test": 0.25}
    (tmp_path / "raw.csv").write_text(content)
    importer = table(categorical=["u"], split=rule)
    info = prepare(tmp_path / "raw.csv", tmp_path / "out", importer=importer, max_bad_rows=0.5)
    assert [info.splits[name].rows for name in ("train", "valid", "test")] == [3, 0, 1]
    assert "t is no time" in (tmp_path / "out" / "bad_rows.tsv").read_text()


def test_only_a_schema_can_ask_for_a_split_by_time(tmp_path):
    (tmp_path / "train.txt").write_bytes(criteo_bytes(criteo_rows(10)))
    with pytest.raises(DataError, match="only the schema of a `table` can ask for"):
        prepare(
            tmp_path / "train.txt",
            tmp_path / "out",
            importer="criteo",
            split={"kind": "time", "column": "I1"},
        )


@pytest.mark.parametrize("values", [[5.0], [3.0, -1.0, -0.0, 0.0, 1e300, -1e300, 3.0, np.inf]])
def test_the_number_of_a_rank_is_that_of_the_sorted_numbers(tmp_path, values):
    (tmp_path / "f64").write_bytes(np.array(values).tobytes())
    assert [smallest(tmp_path / "f64", rank) for rank in range(len(values))] == sorted(values)


# Transforms


@pytest.mark.parametrize(
    ("transform", "clipped", "news"),
    [
        ("log1p", 3, "x: 3 of 5 values are negative, and log1p makes 0 of them"),
        ("standard_log", 3, "x: 3 of 5 values are negative, and standard_log makes 0"),
        ("min_max", 2, "x: 2 of 5 values lie outside the range of the train split, -2 to 3"),
        ("none", 1, "x: 1 of 5 values are beyond the numbers of float32"),
    ],
)
def test_what_a_transform_cannot_represent_is_counted_and_said(tmp_path, transform, clipped, news):
    content = "y,u,x\n1,a,-2\n0,b,3\n1,c,-1.5\n0,d,-3\n1,e,1e39\n0,f,\n"
    info = csv_dataset(
        tmp_path,
        content,
        numeric=[{"name": "x", "transform": transform}],
        split={"kind": "chronological", "train": 0.5, "valid": 0.0, "test": 0.5},
    )
    assert (info.numeric[0].clipped, info.numeric[0].missing) == (clipped, 1)
    (line,) = clipped_news(DatasetInfo.load(tmp_path / "out"))
    assert line.startswith(news)
    validate_dataset(tmp_path / "out")


@pytest.mark.parametrize("transform", ["none", "min_max", "log1p", "standard_log", "bucket"])
def test_numbers_of_any_size_stay_numbers(tmp_path, transform):
    content = "y,u,x\n" + "".join(f"1,a,{x}\n" for x in (1e308, -1e308, 1e20, -1e20, 0))
    info = csv_dataset(tmp_path, content, numeric=[{"name": "x", "transform": transform}])
    validate_dataset(tmp_path / "out")
    assert all(feature.missing == 0 for feature in (*info.numeric, *info.categorical))
    assert transform != "bucket" or (read_split(info, "train")["x"] > 0).all()


def test_nothing_is_said_when_every_number_is_kept(tmp_path):
    info = csv_dataset(tmp_path, "y,u,x\n1,a,0\n0,b,3\n", numeric=["x"])
    assert (info.numeric[0].clipped, clipped_news(info)) == (0, [])


def test_a_split_that_shares_no_value_with_train_is_named(tmp_path):
    for split, ids in (("train", "345"), ("test", "345"), ("valid", "678")):
        rows = "".join(f"1,{i}{'.0' if split == 'test' else ''},a\n" for i in ids)
        (tmp_path / f"{split}.csv").write_text("y,item,u\n" + rows)
    files = {split: tmp_path / f"{split}.csv" for split in ("train", "valid", "test")}
    info = prepare(files, tmp_path / "out", importer=table(categorical=["item", "u"]))
    assert [line.partition(";")[0] for line in unseen_news(info)] == [
        "item: no value of the valid split is known from train",
        "item: no value of the test split is known from train",
    ]


def read_whole(importer, path) -> tuple[int, int]:
    """Rows of a file that were read or named as malformed, and those that its index counts."""
    raw = importer.open([RawFile(path=path)])
    blocks = raw.index(0, 0, lambda step: None).blocks
    found = sum(rows.frame.height + len(rows.bad) + rows.dropped for _, rows in raw.read(blocks))
    raw.close()
    return found, sum(block.rows for block in blocks)


CSV = "y,u,x,b\n" + "".join(f'{i % 2},"u{i}",{i}.5,a|b\n' for i in range(6))
FFM = "".join(f"{i % 2} 0:{i}:1 1:{i}:1\n" for i in range(6))
PAIRS = "".join(f"{i % 2} u:{i} m:{i + 9}\n" for i in range(6))
JUNK = [*'\n\r",\t: \0\ufeff\x85#|', "nan", "1e999", "qid:1", "9" * 25, "True", "0.5"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "content"), [("r.csv", CSV), ("r.ffm", FFM), ("r.fm", PAIRS)])
def test_every_line_of_a_spoilt_log_is_read_or_named(tmp_path, name, content):
    bags = [{"name": "b", "separator": "|"}, "u"]
    importer = table(categorical=bags, numeric=["x"]) if name == "r.csv" else LibFMImporter()
    rng = random.Random(0)
    for _ in range(100):
        spoilt = bytearray(content.encode())
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(spoilt))
            spoilt[at : at + rng.randint(0, 2)] = rng.choice(JUNK).encode() + bytes(
                [rng.randrange(256)] * rng.randint(0, 1)
            )
        (tmp_path / name).write_bytes(spoilt)
        with suppress(DataError):
            found, counted = read_whole(importer, tmp_path / name)
            assert found == counted, bytes(spoilt)


@pytest.mark.slow
def test_a_spoilt_parquet_file_is_read_or_named(tmp_path, capfd):
    columns = {
        "y": [i % 2 for i in range(50)],
        "u": [f"ué{i}" for i in range(50)],
        "b": [["a", f"b{i}"] for i in range(50)],
        "k": pa.array([f"kk{i % 3}" for i in range(50)]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / "good.parquet", compression="none")
    good = (tmp_path / "good.parquet").read_bytes()
    importer = table(categorical=["u", "k", {"name": "b", "multi_valued": True}])
    rng = random.Random(3)
    for _ in range(500):
        spoilt = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
        (tmp_path / "raw.parquet").write_bytes(spoilt)
        with suppress(DataError):
            found, counted = read_whole(importer, tmp_path / "raw.parquet")
            assert found == counted
    assert "panicked" not in capfd.readouterr().err
