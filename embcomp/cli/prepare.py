"""`embcomp prepare`: raw click logs to a dataset folder."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from embcomp.cli import consoles as console
from embcomp.cli.stopping import stoppable

if TYPE_CHECKING:
    from embcomp.data_pipelines.preparing.engine import Engine


def prepare(
    format: Annotated[
        str, typer.Argument(help="Raw format: criteo, avazu, movielens, libfm or table.")
    ],
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="[RAW]... OUTPUT",
            help="Raw files or a folder; the output folder. Each a path, or a URL as s3://bucket/day1.",
        ),
    ],
    train: Annotated[list[str] | None, typer.Option(help="Raw files of the train split.")] = None,
    valid: Annotated[list[str] | None, typer.Option(help="Raw files of the valid split.")] = None,
    test: Annotated[list[str] | None, typer.Option(help="Raw files of the test split.")] = None,
    schema: Annotated[
        Path | None, typer.Option(help="Schema YAML that the format 'table' needs.")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(help="What libFM tokens are: indices, bag, pairs or ffm; else guessed."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The dataset's name; the output folder's by default.")
    ] = None,
    split: Annotated[
        Literal["random", "chronological"] | None,
        typer.Option(help="How rows are split; the format's own rule by default."),
    ] = None,
    shares: Annotated[
        str | None, typer.Option(help="Shares of train, valid and test, as 0.8,0.1,0.1.")
    ] = None,
    split_seed: Annotated[int, typer.Option(min=0, help="Seed of the random split.")] = 0,
    min_count: Annotated[
        list[str] | None,
        typer.Option(help="Rarer values get id 1: a number, or FEATURE=NUMBER; repeatable."),
    ] = None,
    numeric: Annotated[
        list[str] | None,
        typer.Option(help="Transform of numeric columns, or FEATURE=TRANSFORM; repeatable."),
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Categorical feature that GAUC groups by.")
    ] = None,
    weight: Annotated[
        str | None,
        typer.Option(help="Raw column of the rows' weights, of the format 'table'."),
    ] = None,
    encode: Annotated[
        list[str] | None,
        typer.Option(
            help="hash: ids are hashes of values; ids: values are ids; or FEATURE=hash; repeatable."
        ),
    ] = None,
    encoded: Annotated[
        bool, typer.Option(help="All values are ids already, as the schema sizes them.")
    ] = False,
    vocabulary: Annotated[
        str | None,
        typer.Option(help="A folder of counts taken elsewhere: Parquet of feature, value, count."),
    ] = None,
    extend: Annotated[
        str | None,
        typer.Option(help="An earlier dataset: its values keep their ids, new ones come after."),
    ] = None,
    room: Annotated[
        str | None,
        typer.Option(help="Ids to reserve for values to come, as 20% of those in use."),
    ] = None,
    decay: Annotated[
        float | None,
        typer.Option(help="What counts are multiplied by from day to day; 0.9 by default."),
    ] = None,
    retire_after: Annotated[
        int | None,
        typer.Option(help="Values unseen in so many datasets in a row lose their ids."),
    ] = None,
    max_memory: Annotated[
        str, typer.Option(help="Bytes that the process may take in all.")
    ] = "4GiB",
    max_bad_rows: Annotated[
        float, typer.Option(help="Share of malformed rows above which nothing is made.")
    ] = 1e-4,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing dataset.")] = False,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(help="Where parts are worked on: this process, or a Ray cluster."),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of the Ray cluster's head; else what Ray finds by itself."),
    ] = None,
) -> None:
    """Prepare raw logs: count, rank ids by frequency, encode to Parquet."""
    from embcomp.data_pipelines.importers.registry import make_importer
    from embcomp.data_pipelines.prepare import prepare as run
    from embcomp.data_pipelines.preparing.engine import LocalEngine
    from embcomp.data_pipelines.preparing.news import value_news
    from embcomp.errors import DataError

    *raw, output = paths
    given = {"train": train, "valid": valid, "test": test}
    by_split = {split: files for split, files in given.items() if files}
    if bool(raw) == bool(by_split):
        raise DataError(
            "give the raw files before the output folder, or by --train, --valid and --test; "
            f"got {len(raw)} before it and {len(by_split)} split(s) by option"
        )
    if encoded and encode:
        raise DataError("--encoded says it for all features; leave out --encode")
    if engine == "local" and address is not None:
        raise DataError("--address is of a Ray cluster; give --engine ray with it")
    with (
        stoppable(lambda: f"what {output} has so far is kept; the same command goes on from there"),
        _ray(address) if engine == "ray" else nullcontext(LocalEngine()) as where,
    ):
        info = run(
            by_split if by_split else list(raw),
            output,
            importer=make_importer(format, schema, form),
            name=name,
            split=_rule(split, shares, split_seed),
            min_count=_per_feature(min_count, "--min-count", int),
            numeric=_per_feature(numeric, "--numeric", str),
            group=group,
            weight=weight,
            encode="ids" if encoded else _per_feature(encode, "--encode", str),
            vocabulary=vocabulary,
            extend=extend,
            room=room,
            decay=decay,
            retire_after=retire_after,
            max_memory=max_memory,
            max_bad_rows=max_bad_rows,
            overwrite=overwrite,
            engine=where,
            progress=console.stderr().is_terminal,
            report=lambda line: console.stderr().print(line, markup=False, highlight=False),
        )
    for line in value_news(info):
        console.stderr().print(line, markup=False, highlight=False)
    rows = ", ".join(f"{split} {found.rows:,}" for split, found in info.splits.items())
    ids = sum(feature.num_embeddings for feature in info.categorical)
    print(
        f"{output}: {rows} rows; {len(info.numeric)} numeric and {len(info.categorical)} "
        f"categorical features, {ids:,} ids{', weighted rows' if info.weight is not None else ''}"
    )


def _ray(address: str | None) -> AbstractContextManager[Engine]:
    from embcomp.data_pipelines.preparing.ray_engine import RayEngine

    return RayEngine(address)


def _rule(split: str | None, shares: str | None, seed: int) -> dict[str, Any] | None:
    from embcomp.errors import DataError

    if split is None:
        if shares is None and seed == 0:
            return None
        raise DataError("--shares and --split-seed need --split random or --split chronological")
    rule: dict[str, Any] = {"kind": split}
    if split == "random":
        rule["seed"] = seed
    if shares is not None:
        try:
            train, valid, test = (float(share) for share in shares.split(","))
        except ValueError:
            raise DataError(
                f"--shares: expected three numbers as 0.8,0.1,0.1; got {shares!r}"
            ) from None
        rule |= {"train": train, "valid": valid, "test": test}
    return rule


def _per_feature(values: list[str] | None, option: str, kind: type) -> Any:
    """One value for all features, or a mapping; None when the option was not given."""
    from embcomp.errors import DataError

    if not values:
        return None
    pairs = [value.rpartition("=") for value in values]
    try:
        if len(values) == 1 and not pairs[0][1]:
            return kind(values[0])
        named = {name: kind(value) for name, equals, value in pairs if equals and name}
    except ValueError:
        raise DataError(f"{option}: expected a number, got {' '.join(values)}") from None
    if len(named) != len(values):
        raise DataError(
            f"{option}: expected one value for all features, or FEATURE=VALUE once for each; "
            f"got {' '.join(values)}"
        )
    return named
