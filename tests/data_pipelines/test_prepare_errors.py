from __future__ import annotations

import errno
import gzip
import subprocess
import sys
import textwrap

import pyarrow.parquet as pq
import pytest

from embcomp.data_pipelines.importers import text
from embcomp.data_pipelines.prepare import prepare
from embcomp.data_pipelines.preparing import row_writer, workspace
from embcomp.data_pipelines.preparing.bad_rows import BAD_ROWS_FILE
from embcomp.data_pipelines.schema import DatasetInfo
from embcomp.data_pipelines.validate import validate_dataset
from embcomp.errors import DataError
from tests.helpers.raw_logs import (
    criteo_bytes,
    criteo_rows,
    folder_bytes,
    read_split,
    write_criteo,
)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(tmp_path):
    yield
    assert not list(tmp_path.glob(".*")), "temporary folders were left behind"


def with_line(rows: list[list[str]], at: int, line: bytes) -> bytes:
    lines = criteo_bytes(rows).splitlines()
    return b"\n".join([*lines[:at], line, *lines[at:]]) + b"\n"


GOOD = criteo_rows(1, seed=9)[0]


def changed(column: int, value: str) -> bytes:
    return "\t".join([*GOOD[:column], value, *GOOD[column + 1 :]]).encode()


BAD_LINES = {
    "too few columns": (b"1\t2\t3", "expected 40 columns, got 3"),
    "too many columns": (changed(39, "a\tb"), "expected 40 columns, got 41"),
    "a blank line": (b"", "expected 40 columns, got 1"),
    "a word for a number": (changed(3, "many"), "I3 is 'many', expected an integer"),
    "a fraction for an integer": (changed(1, "1.5"), "I1 is '1.5', expected an integer"),
    "a number beyond 64 bits": (changed(2, "9" * 20), "expected an integer"),
    "bad UTF-8": (changed(30, "x").replace(b"\tx\t", b"\t\xff\t"), "0xff) is not UTF-8"),
    "another label": (changed(0, "2"), "the label is not 0 or 1"),
    "no label": (changed(0, ""), "the label is not 0 or 1"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_malformed_line_is_named_with_file_and_line(tmp_path, name):
    line, reason = BAD_LINES[name]
    path = tmp_path / "train.txt"
    path.write_bytes(with_line(criteo_rows(300), 123, line))
    with pytest.raises(DataError) as caught:
        prepare(path, tmp_path / "out", importer="criteo")
    assert f"{path}, line 124: " in str(caught.value)
    assert reason in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_short_line_does_not_hide_behind_a_long_one(tmp_path):
    path = tmp_path / "train.txt"
    lines = [changed(39, "a\tb"), "\t".join(GOOD[:39]).encode()]
    path.write_bytes(with_line(criteo_rows(50), 20, b"\n".join(lines)))
    with pytest.raises(DataError, match="at least 2 of 52"):
        prepare(path, tmp_path / "out", importer="criteo")


def test_malformed_rows_within_the_share_are_set_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", 4000)
    rows = criteo_rows(400)
    path = tmp_path / "train.txt"
    bad = [line for line, _ in BAD_LINES.values()]
    lines = criteo_bytes(rows).splitlines()
    for i, line in enumerate(bad):
        lines.insert(i * 37, line)
    path.write_bytes(b"\n".join(lines) + b"\n")
    news: list[str] = []
    options = {
        "importer": "criteo",
        "numeric": "none",
        "split": {"kind": "chronological", "train": 0.5, "valid": 0.25, "test": 0.25},
    }
    info = prepare(path, tmp_path / "out", max_bad_rows=0.05, report=news.append, **options)
    assert (info.raw_rows, info.bad_rows) == (400 + len(bad), len(bad))
    kept = [i for s in ("train", "valid", "test") for i in read_split(info, s)["I2"].to_list()]
    assert kept == list(range(400))
    content = (tmp_path / "out" / BAD_ROWS_FILE).read_bytes()
    for i, (line, reason) in enumerate(BAD_LINES.values()):
        assert f"{path}\t{i * 37 + 1}\t".encode() in content
        assert reason.encode() in content
        assert line in content
    assert any("line 1: " in line for line in news)
    validate_dataset(tmp_path / "out")
    with pytest.raises(DataError, match="more than the share of 0.01"):
        prepare(path, tmp_path / "other", max_bad_rows=0.01, **options)


def test_an_empty_file_is_named(tmp_path):
    (tmp_path / "train.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"train\.txt is empty"):
        prepare(tmp_path / "train.txt", tmp_path / "out", importer="criteo")


@pytest.mark.parametrize("cut", [-4, -20, 200])
def test_a_truncated_gzip_file_is_named(tmp_path, cut):
    packed = gzip.compress(criteo_bytes(criteo_rows(200)))
    (tmp_path / "day_0.gz").write_bytes(packed[:cut])
    with pytest.raises(DataError, match=r"day_0\.gz is a truncated gzip file"):
        prepare(tmp_path / "day_0.gz", tmp_path / "out", importer="criteo")


def test_a_damaged_gzip_file_is_named(tmp_path):
    packed = bytearray(gzip.compress(criteo_bytes(criteo_rows(200))))
    packed[len(packed) // 2] ^= 0xFF
    (tmp_path / "day_0.gz").write_bytes(bytes(packed))
    with pytest.raises(DataError, match=r"day_0\.gz is a (damaged|truncated) gzip file"):
        prepare(tmp_path / "day_0.gz", tmp_path / "out", importer="criteo")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"PK\x03\x04zip", "unzip it"), (b"PAR1....", "Parquet"), (b"BZh91AY", "bzip2")],
)
def test_another_kind_of_file_is_named(tmp_path, content, message):
    (tmp_path / "train.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(tmp_path / "train.txt", tmp_path / "out", importer="criteo")


def test_a_file_that_is_not_parquet_is_named(tmp_path):
    (tmp_path / "s.yaml").write_text("{name: a, label: y, categorical: [u]}")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match="not a Parquet file, or a truncated one"):
        prepare(
            tmp_path / "a.parquet", tmp_path / "out", importer="table", schema=tmp_path / "s.yaml"
        )


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(tmp_path, monkeypatch):
    write_criteo(tmp_path / "train.txt", 100)

    def full(self, rows):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(row_writer.RowGroupWriter, "_flush", full)
    with pytest.raises(DataError, match="is full; the partial output was removed"):
        prepare(tmp_path / "train.txt", tmp_path / "out", importer="criteo")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", [2_000, 20_000, 60_000])
def test_a_write_that_really_fails_is_a_clear_error_without_noise(tmp_path, limit):
    """The limit on a file's size strikes inside pyarrow, as a full disk would."""
    write_criteo(tmp_path / "train.txt", 3000, values=10**6)
    script = textwrap.dedent(
        f"""
        import resource
        from embcomp.data_pipelines.prepare import prepare
        from embcomp.errors import DataError
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        try:
            prepare("train.txt", "out", importer="criteo", min_count=1)
        except DataError as error:
            print("DataError:", error)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.startswith("DataError: the disk of"), done.stderr
    assert done.stderr == ""
    assert not (tmp_path / "out").exists()


def test_too_little_room_is_said_before_any_work(tmp_path, monkeypatch):
    write_criteo(tmp_path / "train.txt", 100)
    usage = workspace.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(workspace.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match="may take up to .* free some or choose another folder"):
        prepare(tmp_path / "train.txt", tmp_path / "out", importer="criteo")


def test_too_small_a_memory_is_refused_with_the_least_that_works(tmp_path):
    write_criteo(tmp_path / "train.txt", 10)
    with pytest.raises(DataError, match="max_memory is 10 MiB.* give at least"):
        prepare(tmp_path / "train.txt", tmp_path / "out", importer="criteo", max_memory="10MiB")
    with pytest.raises(DataError, match="'lots' is not a size"):
        prepare(tmp_path / "train.txt", tmp_path / "out", importer="criteo", max_memory="lots")


def test_an_existing_dataset_is_replaced_only_on_demand_and_only_when_whole(tmp_path):
    write_criteo(tmp_path / "train.txt", 100)
    write_criteo(tmp_path / "other.txt", 60, seed=5)
    prepare(tmp_path / "train.txt", tmp_path / "out", importer="criteo")
    before = folder_bytes(tmp_path / "out")
    with pytest.raises(DataError, match="already holds a dataset"):
        prepare(tmp_path / "other.txt", tmp_path / "out", importer="criteo")
    (tmp_path / "bad.txt").write_text("not criteo\n")
    with pytest.raises(DataError, match="malformed"):
        prepare(tmp_path / "bad.txt", tmp_path / "out", importer="criteo", overwrite=True)
    assert folder_bytes(tmp_path / "out") == before
    prepare(tmp_path / "other.txt", tmp_path / "out", importer="criteo", overwrite=True)
    assert DatasetInfo.load(tmp_path / "out").raw_rows == 60
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "bad.txt",
        "other.txt",
        "out",
        "train.txt",
    ]


def test_a_folder_of_something_else_is_never_overwritten(tmp_path):
    write_criteo(tmp_path / "train.txt", 20)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="holds no dataset"):
        prepare(tmp_path / "train.txt", tmp_path / "out", importer="criteo", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importer": "criteo", "numeric": "log2"}, "'log2' of I1 is unknown"),
        ({"importer": "criteo", "numeric": {"C1": "log1p"}}, "names 'C1'"),
        ({"importer": "criteo", "min_count": 0}, "min_count of C1 is 0"),
        ({"importer": "criteo", "min_count": {"C27": 2}}, "names 'C27'"),
        ({"importer": "criteo", "group": "user"}, "group 'user'"),
        ({"importer": "criteo", "split": "files"}, "as a mapping from train"),
        ({"importer": "criteo", "split": "alphabetic"}, "is not a rule"),
        ({"importer": "criteo", "split": {"kind": "random", "train": 0.5}}, "sum to 1"),
        ({"importer": "criteo", "max_bad_rows": 2.0}, "expected a share"),
    ],
)
def test_wrong_choices_are_explained_before_any_work(tmp_path, options, message):
    write_criteo(tmp_path / "train.txt", 20)
    with pytest.raises(DataError, match=message):
        prepare(tmp_path / "train.txt", tmp_path / "out", **options)


def test_a_source_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.txt does not exist"):
        prepare(tmp_path / "nothing.txt", tmp_path / "out", importer="criteo")
    with pytest.raises(DataError, match="expected train and maybe valid"):
        prepare({"training": tmp_path}, tmp_path / "out", importer="criteo")


def test_an_input_without_train_rows_is_an_error(tmp_path):
    for name in ("users.dat", "movies.dat"):
        (tmp_path / name).write_text("")
    (tmp_path / "ratings.dat").write_text("1::1::3::0\n")
    with pytest.raises(DataError, match="1 left out by the label rule"):
        prepare(tmp_path, tmp_path / "out", importer="movielens")


def test_validation_finds_what_was_changed_after_preparing(tmp_path):
    write_criteo(tmp_path / "train.txt", 200)
    out = tmp_path / "out"
    info = prepare(tmp_path / "train.txt", out, importer="criteo", min_count=1)
    (name,) = info.split("train").files
    table = pq.read_table(out / name)
    original = (out / name).read_bytes()

    pq.write_table(table.slice(1), out / name)
    with pytest.raises(DataError, match=r"states \d+ rows"):
        validate_dataset(out)
    at = table.schema.get_field_index("C2")
    too_large = (table.column("C2").to_numpy() + 10**6).astype("int32")
    pq.write_table(table.set_column(at, table.field("C2"), [too_large]), out / name)
    with pytest.raises(DataError, match="column C2 holds ids from"):
        validate_dataset(out)
    pq.write_table(table.drop_columns(["C2"]), out / name)
    with pytest.raises(DataError, match="has columns"):
        validate_dataset(out)
    (out / name).write_bytes(original[:-10])
    with pytest.raises(DataError, match="cannot be read"):
        validate_dataset(out)
    (out / name).write_bytes(original)
    vocabulary = out / info.categorical[0].vocabulary
    pq.write_table(pq.read_table(vocabulary).slice(1), vocabulary)
    with pytest.raises(DataError, match="values, but C1 has"):
        validate_dataset(out)
