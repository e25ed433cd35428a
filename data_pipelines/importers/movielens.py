"""MovieLens-1M: `ratings.dat`, `users.dat` and `movies.dat`, fields parted by `::`.

Labels follow AutoInt (Song et al., 2019, https://arxiv.org/abs/1810.11921): a rating above 3 is 1,
below 3 is 0, and 3 is left out. Genres are real bags: a movie has one to six of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import polars as pl
from typing_extensions import override

from embcomp.data_pipelines.importers.base import DROP, CategoricalColumn, Importer, Layout, RawFile
from embcomp.data_pipelines.importers.compressed import reading
from embcomp.data_pipelines.importers.delimited import Delimited
from embcomp.data_pipelines.importers.text import Parsed, TextTable, read_head, split_lines
from embcomp.errors import DataError

FEATURES = ("user", "movie", "gender", "age", "occupation", "zip", "year", "genres")
_HEAD = 100  # lines that tell which fields a file has
_TABLE_WAY = (
    "Other MovieLens sets are read as a table: `embcomp prepare table --schema ratings.yaml "
    "RATINGS OUTPUT`"
)
_RULE = 'label: {column: rating, positive: "> 3", negative: "< 3"}, categorical: [user, movie]'
OTHERS = {
    "ratings.csv": (
        f"of ml-latest, ml-25m or the like, not of MovieLens-1M. {_TABLE_WAY}, with the schema "
        f"{{name: movielens, {_RULE.replace('user, movie', 'userId, movieId')}, group: userId, "
        f"split: {{kind: time, column: timestamp}}}}"
    ),
    "u.data": (
        f"of MovieLens-100K, not of MovieLens-1M. {_TABLE_WAY}, with the schema {{name: movielens, "
        f"format: tsv, columns: [user, movie, rating, time], {_RULE}, group: user, "
        f"split: {{kind: time, column: time}}}}"
    ),
}
"""Names of the rating files of other distributions, and what to do with them."""


@dataclass(frozen=True, kw_only=True)
class MovieLensImporter(Importer):
    """The unpacked `ml-1m` folder, or its `ratings.dat` with the two others beside it."""

    name: ClassVar[str] = "movielens"
    title: ClassVar[str] = "MovieLens-1M: ratings.dat, users.dat, movies.dat"

    @override
    def find(self, folder: Path) -> list[Path]:
        path = folder / "ratings.dat"
        for other, what in OTHERS.items():
            if (folder / other).is_file() and not path.is_file():
                raise DataError(f"{folder / other} is {what}")
        if not path.is_file():
            raise DataError(f"{folder} lacks ratings.dat; expected {self.title}")
        return [path]

    @override
    def open(self, files: Sequence[RawFile]) -> MovieLensTable:
        return MovieLensTable(self._checked(files))

    @override
    def open_to_score(self, files: Sequence[RawFile]) -> MovieLensTable:
        return MovieLensTable(self._checked(files), to_score=True)

    def _checked(self, files: Sequence[RawFile]) -> Sequence[RawFile]:
        for file in files:
            if file.path.name in OTHERS:
                raise DataError(f"{file.path} is {OTHERS[file.path.name]}")
            head = read_head(file.path, 1)
            if head and b"::" not in head[0]:
                raise DataError(
                    f"{file.path}, line 1: fields are not parted by '::'; expected {self.title}. "
                    f"{_TABLE_WAY}"
                )
        return files


class MovieLensTable(TextTable):
    """Ratings in file order, joined with what is known of the user and the movie.

    To be scored, lines may lack the rating (`user::movie::time`), and the time with it.
    """

    def __init__(self, files: Sequence[RawFile], *, to_score: bool = False) -> None:
        layout = Layout(
            categorical=tuple(
                CategoricalColumn(name=name, multi_valued=name == "genres") for name in FEATURES
            ),
            group="user",
        )
        super().__init__(files, layout)
        folders = {file.path.parent for file in files}
        self.users = pl.concat([_users(folder) for folder in sorted(folders)]).unique(
            "user", keep="first", maintain_order=True
        )
        self.movies = pl.concat([_movies(folder) for folder in sorted(folders)]).unique(
            "movie", keep="first", maintain_order=True
        )
        whole = Delimited(
            columns=(("user", "int"), ("movie", "int"), ("rating", "int"), ("time", "int")),
            separator="\t",
        )
        self.formats = [whole] * len(self.files)
        if to_score:
            self.to_score = True
            self.formats = [_found(whole, file.path) for file in self.files]
            self.has_labels = any("rating" in each.schema for each in self.formats)

    @override
    def parse(self, data: bytes, rows: int, file: int) -> Parsed:
        if b"\t" in data:
            raise DataError(f"{self.files[0].path} has tabs; expected user::movie::rating::time")
        parsed = self.formats[file].parse(data.replace(b"::", b"\t"), rows)
        frame = parsed.frame
        if "rating" not in frame.columns:
            frame = frame.with_columns(pl.lit(None, dtype=pl.Int64).alias("rating"))
        rating = pl.col("rating")
        parsed.frame = (
            frame.with_columns(pl.col("user", "movie").cast(pl.String))
            .join(self.users, on="user", how="left", maintain_order="left")
            .join(self.movies, on="movie", how="left", maintain_order="left")
            .select(
                pl.when(rating.is_between(4, 5))
                .then(1)
                .when(rating.is_between(1, 2))
                .then(0)
                .cast(pl.Float32)
                .alias("label"),
                (rating == 3).fill_null(False).alias(DROP),
                *FEATURES[:-1],
                pl.col("genres").fill_null([]),
            )
        )
        return parsed


def _found(whole: Delimited, path: Path) -> Delimited:
    """The format of a file whose lines may lack the rating, and the time with it."""
    head = [line.replace(b"::", b"\t") for line in read_head(path, _HEAD)]
    bare = whole.without("rating")
    if whole.lacks_a_column(head):
        return bare
    if whole.lacks_a_column(head, 2):
        return bare.without("time")
    return replace(whole, lenient=("rating",))


def _fields(path: Path, count: int) -> list[list[str]]:
    # The distribution's movies.dat is Latin-1.
    if not path.exists():
        raise DataError(f"{path} is missing; it belongs beside ratings.dat")
    with reading(path):
        lines = split_lines(path.read_bytes())
    rows = [line.decode("latin-1").split("::") for line in lines]
    for number, row in enumerate(rows, 1):
        if len(row) != count:
            raise DataError(
                f"{path}, line {number}: expected {count} fields parted by '::', got {len(row)}"
            )
    return rows


def _users(folder: Path) -> pl.DataFrame:
    names = ["user", "gender", "age", "occupation", "zip"]
    rows = _fields(folder / "users.dat", len(names))
    return pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String), orient="row")


def _movies(folder: Path) -> pl.DataFrame:
    rows = []
    for movie, title, genres in _fields(folder / "movies.dat", 3):
        year = re.search(r"\((\d{4})\)\s*$", title)
        rows.append((movie, year.group(1) if year else None, [g for g in genres.split("|") if g]))
    names = ["movie", "year", "genres"]
    return pl.DataFrame(rows, schema=names, orient="row").cast(
        {"movie": pl.String, "year": pl.String, "genres": pl.List(pl.String)}
    )
