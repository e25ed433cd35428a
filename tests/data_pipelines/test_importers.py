from __future__ import annotations

import gzip
from pathlib import Path

import polars as pl
import pytest

from embcomp.data_pipelines.importers import parquet
from embcomp.data_pipelines.importers.base import Importer, RawFile
from embcomp.data_pipelines.importers.libfm import LibFMImporter
from embcomp.data_pipelines.importers.registry import IMPORTERS, make_importer
from embcomp.data_pipelines.importers.table import TableImporter
from embcomp.data_pipelines.importers.table_schema import load_schema
from embcomp.data_pipelines.prepare import prepare
from embcomp.errors import DataError
from tests.helpers.raw_logs import criteo_bytes, criteo_rows, decode, read_split

ALL_TRAIN = {"kind": "chronological", "train": 1.0, "valid": 0.0, "test": 0.0}


def read_all(importer: Importer, *paths) -> tuple[pl.DataFrame, list[str], int]:
    """Every usable row, the bad rows as text, and how many rows were left out."""
    table = importer.open([RawFile(path=path) for path in paths])
    frames, bad, dropped, row = [], [], 0, 0
    for file in range(len(paths)):
        index = table.index(file, row, lambda step: None)
        row = index.blocks[-1].row + index.blocks[-1].rows
        for _, rows in table.read(index.blocks):
            frames.append(rows.frame)
            bad += [str(line) for line in rows.bad]
            dropped += rows.dropped
    table.close()
    return pl.concat(frames), bad, dropped


def test_the_registry_names_each_importer_once_by_its_own_name():
    assert {name: kind.name for name, kind in IMPORTERS.items()} == {n: n for n in IMPORTERS}
    with pytest.raises(DataError, match="did you mean 'criteo'"):
        make_importer("critio")
    with pytest.raises(DataError, match="needs a schema"):
        make_importer("table")
    with pytest.raises(DataError, match="only `table` takes a schema"):
        make_importer("criteo", "schema.yaml")


def test_criteo_reads_plain_and_gzipped_days_in_natural_order(tmp_path):
    rows = criteo_rows(30)
    (tmp_path / "day_0").write_bytes(criteo_bytes(rows[:10]))
    (tmp_path / "day_2.gz").write_bytes(gzip.compress(criteo_bytes(rows[10:20])))
    (tmp_path / "day_10").write_bytes(criteo_bytes(rows[20:])[:-1])
    (tmp_path / "readme.txt").write_text("not data")
    importer = make_importer("criteo")
    found = importer.find(tmp_path)
    assert [path.name for path in found] == ["day_0", "day_2.gz", "day_10"]
    frame, bad, _ = read_all(importer, *found)
    assert not bad
    assert frame["label"].to_list() == [float(row[0]) for row in rows]
    assert frame["I13"].to_list() == [float(row[13]) if row[13] else None for row in rows]
    assert frame["C26"].to_list() == [row[39] or None for row in rows]


AVAZU_HEADER = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,"
    "device_id,device_ip,device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
)


def avazu_line(click: str, hour: str) -> str:
    return f"1000009418,{click},{hour}," + ",".join(f"v{i}" for i in range(21))


def test_avazu_turns_its_hour_into_hour_of_day_and_weekday(tmp_path):
    path = tmp_path / "train.csv"
    # 21 October 2014 was a Tuesday, 26 October a Sunday.
    lines = [AVAZU_HEADER, avazu_line("0", "14102100"), avazu_line("1", "14102623")]
    path.write_text("\r\n".join(lines) + "\r\n")
    frame, bad, _ = read_all(make_importer("avazu"), path)
    assert not bad
    assert frame.select("label", "hour", "weekday", "C1", "C21").rows() == [
        (0.0, "0", "2", "v0", "v20"),
        (1.0, "23", "7", "v0", "v20"),
    ]
    assert frame.width == 1 + 23
    path.write_text("\n".join([*lines, avazu_line("1", "14132623"), avazu_line("1", "now")]))
    _, bad, _ = read_all(make_importer("avazu"), path)
    assert [line.split(", ", 1)[1].split(":")[0] for line in bad] == ["line 4", "line 5"]


def test_avazu_without_its_header_is_named(tmp_path):
    (tmp_path / "train").write_text(avazu_line("0", "14102100") + "\n")
    with pytest.raises(DataError, match="does not start with Avazu's header"):
        make_importer("avazu").open([RawFile(path=tmp_path / "train")])


@pytest.fixture
def movielens(tmp_path):
    (tmp_path / "ratings.dat").write_text(
        "1::10::5::978300760\n2::11::3::978300761\n1::11::1::978300762\n2::10::4::978300763\n"
    )
    (tmp_path / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072\n")
    (tmp_path / "movies.dat").write_bytes(
        "10::Misérables, Les (1995)::Drama|Musical\n11::Jumanji (1995) ::Comedy\n".encode("latin-1")
    )
    return tmp_path


def test_movielens_has_autoints_labels_and_genres_as_bags(movielens):
    importer = make_importer("movielens")
    frame, bad, dropped = read_all(importer, *importer.find(movielens))
    assert (bad, dropped) == ([], 1)
    assert frame.rows() == [
        (1.0, "1", "10", "F", "1", "10", "48067", "1995", ["Drama", "Musical"]),
        (0.0, "1", "11", "F", "1", "10", "48067", "1995", ["Comedy"]),
        (1.0, "2", "10", "M", "56", "16", "70072", "1995", ["Drama", "Musical"]),
    ]
    info = prepare(movielens, movielens / "out", importer="movielens", split=ALL_TRAIN)
    assert (info.group, info.raw_rows, info.dropped_rows) == ("user", 4, 1)
    genres = info.categorical[-1]
    assert (genres.multi_valued, genres.max_length) == (True, 2)
    assert genres.mean_length == pytest.approx(5 / 3)
    values = decode(info, "genres")
    bags = [[values[i] for i in bag] for bag in read_split(info, "train")["genres"].to_list()]
    assert bags == [["Drama", "Musical"], ["Comedy"], ["Drama", "Musical"]]


def test_movielens_wants_all_three_files_and_ratings_of_one_to_five(movielens):
    importer = make_importer("movielens")
    with (movielens / "ratings.dat").open("a") as file:
        file.write("1::10::7::0\n")
    _, bad, _ = read_all(importer, movielens / "ratings.dat")
    assert bad == [f"{movielens}/ratings.dat, line 5: the label is not 0 or 1: '1::10::7::0'"]
    (movielens / "users.dat").unlink()
    with pytest.raises(DataError, match=r"users\.dat is missing"):
        importer.open([RawFile(path=movielens / "ratings.dat")])


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (
            "1 4:1 9:1\n-1 4:1 8:1 \n0 3:1.0 8:1\n",
            [
                {"label": 1.0, "field_0": "4", "field_1": "9"},
                {"label": 0.0, "field_0": "4", "field_1": "8"},
                {"label": 0.0, "field_0": "3", "field_1": "8"},
            ],
        ),
        (
            "1 4:1 9:1 3:1\n0 4:1\n0\n",
            [
                {"label": 1.0, "index": ["4", "9", "3"]},
                {"label": 0.0, "index": ["4"]},
                {"label": 0.0, "index": []},
            ],
        ),
        (
            "1 user:17 movie:5\n0 movie:6 user:17\n+1 user:18\n",
            [
                {"label": 1.0, "movie": "5", "user": "17"},
                {"label": 0.0, "movie": "6", "user": "17"},
                {"label": 1.0, "movie": None, "user": "18"},
            ],
        ),
        (
            "1 10:4:1 2:9:1 2:7:1\n0 2:8:1\n",
            [
                {"label": 1.0, "field_2": ["9", "7"], "field_10": "4"},
                {"label": 0.0, "field_2": ["8"], "field_10": None},
            ],
        ),
    ],
    ids=["indices", "bag", "pairs", "ffm"],
)
def test_libfm_forms_are_told_apart(tmp_path, content, rows):
    (tmp_path / "a.libfm").write_text(content)
    frame, bad, _ = read_all(LibFMImporter(), tmp_path / "a.libfm")
    assert not bad
    assert frame.to_dicts() == rows


@pytest.mark.parametrize(
    ("form", "line", "reason"),
    [
        ("indices", "1 4:1", "expected 2 tokens after the label, got 1"),
        ("indices", "1 4:1 9:2", "a token is not index:1"),
        ("indices", "2 4:1 9:1", "the label is not 0 or 1"),
        ("pairs", "1 a:1 c:1", "token 'c:1' cannot be read"),
        ("pairs", "1 a:1 a:2", "token 'a:1' repeats its field"),
        ("bag", "1 4:0.5", "token '4:0.5' cannot be read"),
    ],
)
def test_libfm_lines_of_another_shape_are_malformed(tmp_path, form, line, reason):
    good = "1 a:4 b:5\n" if form == "pairs" else "1 4:1 9:1\n"
    (tmp_path / "a.libfm").write_text(good + line + "\n")
    table = LibFMImporter(form=form).open([RawFile(path=tmp_path / "a.libfm")])
    if form == "pairs":
        (tmp_path / "b.libfm").write_text(good)
        table = LibFMImporter(form=form).open([RawFile(path=tmp_path / "b.libfm")])
        table.files = [RawFile(path=tmp_path / "a.libfm")]
    index = table.index(0, 0, lambda step: None)
    ((_, rows),) = table.read(index.blocks)
    table.close()
    assert rows.frame.height == 1
    (bad,) = rows.bad
    assert (bad.line, bad.reason) == (2, reason)


SCHEMA = """
name: shop
label: {column: stars, positive: "> 3", negative: "< 3"}
numeric: [price]
categorical:
  - user
  - {name: tags, separator: "|"}
group: user
null_values: [NA]
split: {kind: chronological, train: 1.0, valid: 0.0, test: 0.0}
"""


def test_a_csv_is_read_by_its_schema(tmp_path):
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    (tmp_path / "shop.csv").write_text(
        'user,stars,unused,price,tags\nann,5,x,2.5,a|b\n"bo,b",1,"say ""hi""",NA,\nNA,3,z,1e3,c\n'
        "cy,4,,nan,|c|\n"
    )
    importer = TableImporter.from_yaml(tmp_path / "schema.yaml")
    frame, bad, dropped = read_all(importer, tmp_path / "shop.csv")
    assert (bad, dropped) == ([], 1)
    assert frame.rows() == [
        (1.0, 2.5, "ann", ["a", "b"]),
        (0.0, None, "bo,b", []),
        (1.0, None, "cy", ["c"]),
    ]
    info = prepare(tmp_path / "shop.csv", tmp_path / "out", importer=importer)
    assert info.split_rule["kind"] == "chronological"
    assert info.group == "user"


def test_parquet_lists_and_numbers_are_read_by_the_schema(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "BLOCK_ROWS", 4)
    (tmp_path / "schema.yaml").write_text(
        "{name: p, label: y, categorical: [user, {name: tags, multi_valued: true}], numeric: [x]}"
    )
    frame = pl.DataFrame(
        {
            "x": [float(i) for i in range(23)],
            "user": [i % 5 if i % 7 else None for i in range(23)],
            "tags": [["t"] * (i % 3) if i % 4 else None for i in range(23)],
            "y": [i % 2 == 0 for i in range(23)],
        }
    )
    frame.write_parquet(tmp_path / "p.parquet", row_group_size=10)
    importer = TableImporter.from_yaml(tmp_path / "schema.yaml")
    found, bad, _ = read_all(importer, tmp_path / "p.parquet")
    assert not bad
    assert found["label"].to_list() == [float(y) for y in frame["y"]]
    assert found["x"].to_list() == frame["x"].to_list()
    assert found["user"].to_list() == [None if u is None else str(u) for u in frame["user"]]
    assert found["tags"].to_list() == [t or [] for t in frame["tags"].to_list()]
    # Reading from the middle of a row group gives the same rows as reading from the start.
    table = importer.open([RawFile(path=tmp_path / "p.parquet")])
    blocks = table.index(0, 0, lambda step: None).blocks
    assert [block.rows for block in blocks] == [4, 4, 2, 4, 4, 2, 3]
    rest = pl.concat([rows.frame for _, rows in table.read(blocks[4:])])
    assert rest.equals(found.slice(14))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{name: a, label: y, categorical: [u], colour: 1}", "colour: unknown key"),
        ("{name: a, label: y, categorcal: [u]}", "did you mean 'categorical'"),
        (
            "{name: a, label: y, categorical: [{name: u, separater: x}]}",
            "did you mean 'separator'",
        ),
        ("{name: a, label: y, numeric: [{name: u, transform: log}]}", "'log' is not a transform"),
        ("{name: a, label: {column: y, positive: '> 3'}, categorical: [u]}", "give both"),
        (
            "{name: a, label: {column: y, positive: big, negative: '< 3'}, categorical: [u]}",
            "'big'",
        ),
        ("{name: a, label: y}", "there are no features"),
        ("{name: a, label: y, categorical: [u, u]}", "named twice"),
        ("{name: a, label: y, categorical: [u], group: v}", "group 'v'"),
        ("{name: a, label: y, categorical: [u], split: {kind: files, seed: 1}}", "seed"),
        ("{name: a", "not valid YAML"),
        ("{name: a, label: y, label: z, categorical: [u]}", "'label' appears twice"),
        ("{name: a, label: y, categorical: [y, u]}", "'y' is the label and a feature too"),
        ("just text", "expected a mapping"),
        ("{name: a, label: y, categorical: [u], columns: [y, u, u]}", "columns named twice"),
        ("{name: a, label: y, categorical: [u], separator: é}", "cannot part fields"),
    ],
)
def test_a_wrong_schema_is_explained(tmp_path, text, message):
    (tmp_path / "schema.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        load_schema(tmp_path / "schema.yaml")


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{name: a, label: y, categorical: [usr]}", "did you mean 'user'"),
        ("{name: a, label: user, categorical: [x]}", "'user' holds String, but the schema uses"),
        ("{name: a, label: y, categorical: [tags]}", "holds lists; set `multi_valued: true`"),
        (
            "{name: a, label: y, categorical: [{name: user, multi_valued: true}]}",
            "not lists; give a `separator`",
        ),
    ],
)
def test_a_schema_that_disagrees_with_the_data_is_explained(tmp_path, schema, message):
    (tmp_path / "schema.yaml").write_text(schema)
    pl.DataFrame({"y": [1], "x": [1], "user": ["u"], "tags": [["t"]]}).write_parquet(
        tmp_path / "a.parquet"
    )
    importer = TableImporter.from_yaml(tmp_path / "schema.yaml")
    with pytest.raises(DataError, match=message):
        importer.open([RawFile(path=tmp_path / "a.parquet")])


def test_every_schema_that_comes_along_is_sound():
    schemas = sorted((Path(__file__).parents[2] / "configs" / "datasets").glob("*.yaml"))
    assert schemas
    for path in schemas:
        assert load_schema(path).categorical


def test_csv_files_of_one_table_are_read_by_the_names_of_their_columns(tmp_path):
    (tmp_path / "schema.yaml").write_text("{name: a, label: y, categorical: [u, v]}")
    (tmp_path / "a.csv").write_text("y,u,v\n1,a,5\n")
    (tmp_path / "b.csv").write_text("v,w,u,y\n6,x,b,0\n")
    importer = TableImporter.from_yaml(tmp_path / "schema.yaml")
    frame, bad, _ = read_all(importer, tmp_path / "a.csv", tmp_path / "b.csv")
    assert not bad
    assert frame.rows() == [(1.0, "a", "5"), (0.0, "b", "6")]
    (tmp_path / "c.csv").write_text("y,u,w\n1,a,5\n")
    with pytest.raises(DataError, match=r"c\.csv has no column 'v'"):
        importer.open([RawFile(path=tmp_path / name) for name in ("a.csv", "c.csv")])
