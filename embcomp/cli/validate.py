"""`embcomp validate`: is a training YAML or a prepared dataset sound, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def validate(
    target: Annotated[str, typer.Argument(help="A training YAML, a recipe or a dataset folder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)
    ] = None,
) -> None:
    """Check a config (with the dataset that it names, if it is there) or read a whole dataset."""
    from embcomp.errors import ConfigError

    if Path(target).is_dir():
        if overrides:
            raise ConfigError(f"{target} is a dataset folder, which takes no overrides")
        _validate_dataset(Path(target))
    else:
        _validate_config(target, overrides or [])


def _validate_dataset(folder: Path) -> None:
    from embcomp.data_pipelines.integrity import has_checksums, without_checksums
    from embcomp.data_pipelines.validate import validate_dataset

    info = validate_dataset(folder)
    rows = sum(split.rows for split in info.splits.values())
    print(f"{folder}: a sound dataset of {rows:,} rows")
    if not has_checksums(info):
        print(without_checksums(info))


def _validate_config(target: str, overrides: list[str]) -> None:
    from embcomp.benchmark.benchmark_config import is_benchmark
    from embcomp.config.catalog import find_recipe
    from embcomp.config.train_config import load_config
    from embcomp.data_pipelines.schema import FILE_NAME
    from embcomp.planning.config_plan import plan_config, sizes_of_dataset
    from embcomp.search.config.search_config import is_search

    path = find_recipe(target)
    if is_benchmark(path):
        _validate_benchmark(path, overrides)
        return
    if is_search(path):
        _validate_search(path, overrides)
        return
    config = load_config(path, overrides)
    if not (Path(config.data.path) / FILE_NAME).is_file():
        print(f"{path}: a sound config; its dataset {config.data.path} is not here to compare with")
        return
    plan_config(config, sizes_of_dataset(config.data.path))
    print(f"{path}: a sound config that agrees with the dataset {config.data.path}")


def _validate_search(path: Path, overrides: list[str]) -> None:
    from embcomp.data_pipelines.schema import FILE_NAME
    from embcomp.search.config.search_config import load_search

    search = load_search(path, overrides)
    data = search.base().data.path
    if not (Path(data) / FILE_NAME).is_file():
        print(f"{path}: a sound search; its dataset {data} is not here to compare with")
        return
    from embcomp.search.api import prepare_search

    prepare_search(search)
    print(f"{path}: a sound search that agrees with the dataset {data}")


def _validate_benchmark(path: Path, overrides: list[str]) -> None:
    from embcomp.benchmark.benchmark_config import load_benchmark
    from embcomp.data_pipelines.schema import FILE_NAME

    benchmark = load_benchmark(path, overrides)
    data = benchmark.base().data.path
    if not (Path(data) / FILE_NAME).is_file():
        print(f"{path}: a sound benchmark; its dataset {data} is not here to compare with")
        return
    from embcomp.benchmark.cells import prepare_benchmark

    prepare_benchmark(benchmark)
    print(f"{path}: a sound benchmark that agrees with the dataset {data}")
