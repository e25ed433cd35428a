"""`embcomp ls | cat | cp`: look through what there is, and copy a recipe to change it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from embcomp.cli import consoles as console

if TYPE_CHECKING:
    from embcomp.backends.stages import Stage


def ls(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="recipes, methods, models, datasets or formats; all of them when left out.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[Path, typer.Option(help="Where prepared datasets lie.")] = Path("data"),
) -> None:
    """List recipes, methods, models, prepared datasets and raw formats."""
    from embcomp.config.catalog import KINDS, list_entries
    from embcomp.errors import ConfigError
    from embcomp.io.yaml_reading import did_you_mean, listed

    kinds = [known for known in KINDS if kind in (None, known)]
    if not kinds:
        raise ConfigError(
            f"cannot list {kind!r}{did_you_mean(str(kind), KINDS)}; choose from {listed(KINDS)}"
        )
    out = console.stdout()
    for each in kinds:
        if kind is None:
            out.print(f"[bold]{each}[/]")
        table = Table(show_header=False, box=None, pad_edge=False)
        entries = list_entries(each, data=data)
        for entry in entries:
            table.add_row(("  " if kind is None else "") + entry.name, escape(entry.summary))
        if entries:
            out.print(table, highlight=False)
        else:
            out.print("  [dim]none here[/]")


def cat(
    name: Annotated[str, typer.Argument(help="A recipe, method, model or dataset folder.")],
) -> None:
    """Print a recipe, the settings of a method or model, or what a dataset holds."""
    from embcomp.config.catalog import find_recipe, method_classes, model_classes

    if (Path(name) / "dataset.json").is_file():
        _print_dataset(Path(name))
    elif name in method_classes():
        _print_settings(name, method_classes()[name], "tables.method")
    elif name in model_classes():
        _print_settings(name, model_classes()[name], "model")
    else:
        print(find_recipe(name).read_text(encoding="utf-8"), end="")


def cp(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or file.")],
    destination: Annotated[str, typer.Argument(help="A new file, or a folder.")],
) -> None:
    """Copy a recipe, to be changed; an existing file is never overwritten."""
    from embcomp.config.catalog import copy_recipe

    print(copy_recipe(recipe, destination))


def _print_settings(name: str, cls: type, key: str) -> None:
    import inspect

    from embcomp.backends.base import BackendConfig
    from embcomp.config.catalog import settings_of

    out = console.stdout()
    module = inspect.getmodule(cls)
    out.print(escape(((module.__doc__ if module else None) or "").strip()), highlight=False)
    out.print(f"\nIn a config: [bold]{key}: {escape('{')}name: {name}, ...{escape('}')}[/]")
    table = Table(box=console.BOX, pad_edge=False)
    for column in ("setting", "type", "default", "meaning"):
        table.add_column(column)
    for setting in settings_of(cls):
        cells = (setting.name, setting.type, setting.default, setting.doc)
        table.add_row(*(escape(cell) for cell in cells))
    out.print(table, highlight=False)
    if issubclass(cls, BackendConfig) and len(cls().stages()) > 1:
        _print_stages(cls().stages())


def _print_stages(stages: Sequence[Stage]) -> None:
    from embcomp.config.catalog import stage_facts

    out = console.stdout()
    out.print("\nIts stages, each settable: [bold]train.stages: {name: {epochs: 1}}[/]")
    table = Table(box=console.BOX, pad_edge=False)
    for column in ("stage", "what it does", "epochs", "learns", "rows of data"):
        table.add_column(column)
    for stage in stages:
        table.add_row(*(escape(cell) for cell in stage_facts(stage)))
    out.print(table, highlight=False)


def _print_dataset(folder: Path) -> None:
    from embcomp.data_pipelines.preparing.news import growth_news
    from embcomp.data_pipelines.schema import DatasetInfo

    info = DatasetInfo.load(folder)
    out = console.stdout()
    splits = Table(box=console.BOX, pad_edge=False, title=escape(info.name), title_justify="left")
    weight = [] if info.weight is None else ["weight"]
    for column in ("split", "rows", "positives", *weight, "files"):
        splits.add_column(column, justify="left" if column == "split" else "right")
    for name, split in info.splits.items():
        share = f"{split.positives / max(1, split.rows):.2%}"
        weighs = [] if split.weight is None else [f"{split.weight:,.6g}"]
        splits.add_row(name, f"{split.rows:,}", share, *weighs, str(len(split.files)))
    out.print(splits, highlight=False)
    features = Table(box=console.BOX, pad_edge=False)
    for column in ("feature", "kind", "ids", "missing", "mean length"):
        features.add_column(column, justify="left" if column in ("feature", "kind") else "right")
    for number in info.numeric:
        kind = f"numeric, {number.transform}"
        if number.clipped:
            kind += f" ({number.clipped:,} clipped)"
        features.add_row(number.name, kind, "", f"{number.missing:,}", "")
    for feature in info.categorical:
        kind = "multi-valued" if feature.multi_valued else "categorical"
        room = "" if feature.room is None else f" ({feature.room:,} free)"
        features.add_row(
            feature.name,
            kind + (", hashed" if feature.is_hashed else ""),
            f"{feature.num_embeddings:,}{room}",
            f"{feature.missing:,}",
            f"{feature.mean_length:.2f}" if feature.multi_valued else "",
        )
    out.print(features, highlight=False)
    for line in growth_news(info):
        out.print(escape(line), highlight=False)
