"""A dataset is the same bytes whether rows were stored on the way, numbered, or read twice."""

from __future__ import annotations

import shutil

import pytest

from embcomp.data_pipelines import prepare as prepare_module
from embcomp.data_pipelines.importers import plain_lines, text
from embcomp.data_pipelines.numbering import can_number
from embcomp.data_pipelines.prepare import prepare
from embcomp.data_pipelines.preparing import encode_pass, part_sources, passes
from tests.data_pipelines.test_prepare_checksum import write_log
from tests.data_pipelines.test_prepare_resume import KilledError, die_after
from tests.helpers.raw_logs import criteo_bytes, criteo_rows, folder_bytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not can_number(), reason="no compiler: values cannot be numbered"),
]
CRITEO = {"importer": "criteo", "min_count": 2, "blocks_per_part": 4, "max_bad_rows": 0.1}
SCHEMA = """
name: shop
label: label
numeric: [{name: price, transform: standard_log}]
categorical: [user, page, {name: tags, separator: "|"}, {name: also, column: user, encode: hash}]
"""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(text, "BLOCK_BYTES", 4000)


@pytest.fixture(scope="module")
def criteo(tmp_path_factory):
    """A log with lines of every kind: sound, malformed, with odd bytes, of odd numbers."""
    rows = criteo_rows(260, values=200)
    rows = [[*row[:14], f"only in row {i}", *row[15:]] for i, row in enumerate(rows)]
    rows[30][5] = " 7"
    rows[31][20] = "é" * 9
    rows[180][20] = '"quoted"'
    lines = criteo_bytes(rows).splitlines(keepends=True)
    lines[90] = b"1\tshort\n"
    lines[150] = lines[150].replace(b"\n", b"\r\n")
    lines[210] = lines[210].replace(b"\t", b"\t\xff", 16)
    path = tmp_path_factory.mktemp("criteo") / "train.txt"
    path.write_bytes(b"".join(lines))
    return path


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    write_log(folder / "shop.csv", 700)
    write_log(folder / "more.csv", 900)
    (folder / "shop.yaml").write_text(SCHEMA)
    return folder


def both_ways(raw, home, monkeypatch, **options):
    """The bytes of a dataset for which rows were stored, and of one for which they were read twice."""
    prepare(raw, home / "stored" / "out", **options)
    with monkeypatch.context() as patch:
        patch.setattr(passes, "can_number", lambda: False)
        patch.setattr(plain_lines, "_library", lambda: None)
        patch.setattr(part_sources, "read_stored", lambda *_: pytest.fail("stored rows are read"))
        prepare(raw, home / "twice" / "out", **options)
    return [folder_bytes(home / way / "out") for way in ("stored", "twice")]


@pytest.mark.parametrize(
    ("options", "memory"),
    [
        ({}, None),
        # Values are cut into hash partitions, many runs and several rounds of encoding.
        ({"split": "random", "numeric": {"I1": "standard_log", "I2": "bucket"}}, 150_000),
        ({"encode": {"C3": "hash"}, "numeric": "min_max", "room": "20%"}, None),
    ],
    ids=["plain", "figures, buckets and little memory", "hashes and room"],
)
def test_stored_rows_give_the_bytes_of_rows_read_twice(
    criteo, tmp_path, monkeypatch, options, memory
):
    if memory is not None:
        monkeypatch.setattr(prepare_module, "_memory_budget", lambda size: memory)
    stored, twice = both_ways(criteo, tmp_path, monkeypatch, **CRITEO, **options)
    assert stored == twice
    assert "bad_rows.tsv" in stored


def test_bags_hashes_and_extended_vocabularies_are_the_same_bytes(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "_memory_budget", lambda size: 60_000)
    options = {"importer": "table", "schema": shop / "shop.yaml", "min_count": 2}
    options["blocks_per_part"] = 3
    stored, twice = both_ways(shop / "shop.csv", tmp_path / "day1", monkeypatch, **options)
    assert stored == twice
    extend = {"extend": tmp_path / "day1" / "stored" / "out", "retire_after": 2}
    stored, twice = both_ways(
        shop / "more.csv", tmp_path / "day2", monkeypatch, **options, **extend
    )
    assert stored == twice


@pytest.mark.parametrize(
    ("damage", "memory"),
    [("missing", None), ("changed", 20_000)],
    ids=["missing", "changed, rounds"],
)
def test_stored_rows_that_were_damaged_since_are_read_from_the_input(
    shop, tmp_path, monkeypatch, damage, memory
):
    if memory is not None:
        monkeypatch.setattr(prepare_module, "_memory_budget", lambda size: memory)
    options = {"importer": "table", "schema": shop / "shop.yaml", "blocks_per_part": 3}
    prepare(shop / "shop.csv", tmp_path / "whole" / "out", **options)
    out = tmp_path / "killed" / "out"
    with monkeypatch.context() as patch:
        die_after(patch, encode_pass, "encode_part", 1)
        with pytest.raises(KilledError):
            prepare(shop / "shop.csv", out, **options)
    stored = sorted((tmp_path / "killed").glob(".out.partial/scratch/counts/*.rows"))
    assert len(stored) > 2
    if damage == "missing":
        stored[1].unlink()
    else:
        content = bytearray(stored[1].read_bytes())
        content[len(content) // 2] ^= 1
        stored[1].write_bytes(content)
    sources = []
    source = encode_pass.RawPart
    monkeypatch.setattr(
        encode_pass, "RawPart", lambda **named: (sources.append(1), source(**named))[1]
    )
    prepare(shop / "shop.csv", out, **options)
    assert len(sources) == 1
    assert folder_bytes(out) == folder_bytes(tmp_path / "whole" / "out")


def test_rows_are_read_twice_where_the_disk_has_no_room_to_store_them(shop, tmp_path, monkeypatch):
    options = {"importer": "table", "schema": shop / "shop.yaml", "blocks_per_part": 3}
    prepare(shop / "shop.csv", tmp_path / "stored" / "out", **options)
    usage = shutil.disk_usage(tmp_path)
    size = (shop / "shop.csv").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2 * size))
    monkeypatch.setattr(part_sources, "read_stored", lambda *_: pytest.fail("stored rows are read"))
    prepare(shop / "shop.csv", tmp_path / "twice" / "out", **options)
    assert folder_bytes(tmp_path / "stored" / "out") == folder_bytes(tmp_path / "twice" / "out")
