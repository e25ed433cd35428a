"""What `prepare` makes of a log is the same with every version of the packages that it uses."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow.parquet as pq

from embcomp.data_pipelines import prepare as prepare_module
from embcomp.data_pipelines.prepare import prepare
from embcomp.data_pipelines.schema import DatasetInfo

STORED = "95d13cdbf0d37fc5acc5f31b959af3b417adfa12720993c184393028d188c84b"


def draw(*key: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")


def write_log(path: Path, rows: int) -> None:
    """A table with numbers, short and long texts, missing values, ties and bags."""
    lines = ["label,price,user,page,tags"]
    for row in range(rows):
        price = "" if draw(row, "none") % 9 == 0 else str(draw(row, "price") % 5000 / 4)
        page = f"https://example.org/articles/{draw(row, 'page') % 40:x}"
        tags = "|".join(f"tag {draw(row, n, 'tag') % 60}é" for n in range(draw(row, "bag") % 4))
        user = "" if row % 31 == 0 else f"u{draw(row, 'user') % 200}"
        lines.append(f"{draw(row, 'label') % 2},{price},{user},{page},{tags}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def content(info: DatasetInfo) -> str:
    """The SHA-256 of all values, which, unlike the files, do not name the writer's version."""
    digest = hashlib.sha256()
    for file in info.files():
        table = pq.read_table(info.folder / file)
        for name in table.column_names:
            digest.update(f"{file} {name} {table[name].to_pylist()}".encode())
    return digest.hexdigest()


def test_a_prepared_log_has_the_stored_checksum(tmp_path, monkeypatch):
    write_log(tmp_path / "shop.csv", 1500)
    (tmp_path / "shop.yaml").write_text(
        "{name: shop, label: label, numeric: [{name: price, transform: log1p}], "
        "categorical: [user, page, {name: tags, separator: '|'}]}"
    )
    # So little room that values are cut into hash partitions, and ids found in several rounds.
    monkeypatch.setattr(prepare_module, "_memory_budget", lambda size: 9_000)
    info = prepare(
        tmp_path / "shop.csv",
        tmp_path / "out",
        importer="table",
        schema=tmp_path / "shop.yaml",
        min_count=2,
    )
    assert content(info) == STORED
    # No version that a machine may have otherwise is written down.
    assert set(info.versions) == {"embcomp", "pyarrow"}
