"""`embcomp plan`: what a config's tables will take, and where TorchRec would put them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from embcomp.cli import consoles as console
from embcomp.tables.budget import RESERVE

if TYPE_CHECKING:
    from embcomp.config.train_config import TrainConfig
    from embcomp.planning.config_plan import ConfigPlan, TableBytes, TableSize
    from embcomp.planning.placement import Placement
    from embcomp.tables.specs import TableSpec

NAMES_SHOWN = 3


def plan(
    config: Annotated[
        str, typer.Argument(help="A training YAML, a recipe's name, or a run's folder.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)
    ] = None,
    tables: Annotated[
        Path | None,
        typer.Option(
            help="YAML of 'name: num_embeddings', in place of the dataset that data.path names.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Where the dataset is now, in place of data.path.", show_default=False),
    ] = None,
    world_size: Annotated[int, typer.Option(min=1, help="Ranks to place the tables on.")] = 1,
    device_memory: Annotated[
        str | None,
        typer.Option(help="Memory of one device, as 40GiB: asks TorchRec's planner."),
    ] = None,
    device: Annotated[
        Literal["cuda", "cpu"], typer.Option(help="Kind of the devices to place on.")
    ] = "cuda",
    reserve: Annotated[
        str,
        typer.Option(
            help="Memory of each device kept for all but tables, as 4GiB or a share of the device; "
            f"training keeps {RESERVE}."
        ),
    ] = RESERVE,
) -> None:
    """Show bytes per table and in total; exit code 1 when over budget or not placeable.

    Of a method that finds its size by training a config says the most that it may take, and a run
    what it has found.
    """
    from embcomp.config.catalog import find_recipe
    from embcomp.config.train_config import load_config
    from embcomp.errors import BudgetError
    from embcomp.planning.config_plan import plan_config, read_sizes, sizes_of_dataset
    from embcomp.tables.budget import parse_budget, reserved_bytes

    forms = None
    if (Path(config) / "config.yaml").is_file():
        from embcomp.training.stages.loading import forms_of_run

        loaded = load_config(Path(config) / "config.yaml", overrides or [])
        forms = forms_of_run(config, data)
    else:
        loaded = load_config(find_recipe(config), overrides or [])
    if data is not None:
        loaded = loaded.with_data(data)
    sizes = read_sizes(tables) if tables else sizes_of_dataset(loaded.data.path)
    memory = None
    if device_memory is not None:
        memory = parse_budget(device_memory, name="--device-memory")
    try:
        found = plan_config(loaded, sizes, forms)
    except BudgetError as error:
        from embcomp.planning.suggestions import for_budget

        console.fail(str(error))
        _print_ways_out(for_budget(loaded, sizes))
        raise typer.Exit(1) from None
    _print_lines(found)
    _print_stages(found)
    if memory is None:
        return
    kept = reserved_bytes(reserve, memory, name="--reserve")
    if found.dense_rows:
        _replicate(found, world_size, memory - kept)
    else:
        _place(loaded, sizes, found, world_size, memory, reserve, device)


def _print_lines(found: ConfigPlan) -> None:
    from embcomp.planning.config_plan import total_line

    table = Table(box=console.BOX, pad_edge=False)
    for name in ("tables", "method"):
        table.add_column(name, overflow="fold")
    for name in ("rows", "dim", "stored rows", "stored dim"):
        table.add_column(name, justify="right")
    for name in ("weights", "indices", "optimizer", "training", "serving", "compression"):
        table.add_column(name, justify="right")
    lines, first_order = found.lines(), found.first_order_lines()
    for line in lines:
        table.add_row(*_cells(line))
    if lines:
        table.add_section()
        table.add_row(*_cells(total_line(lines), label="embedding tables"), style="bold")
    if first_order:
        table.add_row(*_cells(total_line(first_order), label="first-order weights"))
        table.add_row(*_cells(total_line([*lines, *first_order]), label="all"), style="bold")
    out = console.stdout()
    out.print(table, highlight=False)
    mode = "dense, whole tables on each rank" if found.dense_rows else "fused"
    out.print(f"row optimizer: {found.optimizer} ({mode})", highlight=False)


def _print_stages(found: ConfigPlan) -> None:
    """The forms of several methods in stages, from one stage to the next."""
    from embcomp.tables.budget import format_bytes

    stages = found.stage_lines()
    if not stages:
        return
    table = Table(box=console.BOX, pad_edge=False)
    table.add_column("stage")
    table.add_column("tables are held as", overflow="fold")
    table.add_column("training", justify="right")
    for stage in stages:
        forms = (f"{form} ({_named(names)})" for form, names in stage.forms)
        table.add_row(escape(stage.name), escape("; ".join(forms)), format_bytes(stage.train))
    console.stdout().print(table, highlight=False)


def _named(tables: Sequence[TableSpec]) -> str:
    return _listed([table.name for table in tables])


def _listed(names: Sequence[str]) -> str:
    label = ", ".join(names[:NAMES_SHOWN])
    return label + (f", ... ({len(names)} tables)" if len(names) > NAMES_SHOWN else "")


def _cells(line: TableBytes, label: str = "") -> list[str]:
    from embcomp.tables.budget import format_bytes

    label = label or _named(line.tables)
    dims = {table.embedding_dim for table in line.tables}
    sizes = [line.weights, line.indices, line.optimizer, line.train]
    return [
        escape(label),
        line.method,
        f"{line.rows:,}",
        str(dims.pop()) if len(dims) == 1 else "",
        f"{line.stored_rows:,}",
        line.stored_dim,
        *(format_bytes(size) for size in sizes),
        ("<= " if line.learnt else "") + format_bytes(line.serve),
        (">= " if line.learnt else "") + f"{line.compression:.2f}x" if line.serve else "",
    ]


def _place(
    config: TrainConfig,
    sizes: Sequence[TableSize],
    found: ConfigPlan,
    world_size: int,
    memory: int,
    reserve: str,
    device: Literal["cuda", "cpu"],
) -> None:
    from embcomp.planning.placement import SHARDING, PlacementError, PlacementRequest, place_stages
    from embcomp.planning.suggestions import for_devices
    from embcomp.tables.budget import parse_budget, reserved_bytes

    chosen = config.train.sharding
    query = PlacementRequest(
        world_size=world_size,
        device_memory=memory,
        device=device,
        optimizer=found.optimizer,
        batch_size=-(-config.data.batch_size // world_size),
        reserved=reserved_bytes(reserve, memory, name="--reserve"),
        reserve=reserve,
        sharding=SHARDING if chosen == "auto" else (chosen,),
        pooling_factors=found.pooling_factors(),
        shard_codes_above=parse_budget(config.train.shard_codes_above),
    )
    try:
        placements = place_stages(found.on_meta(), query)
    except PlacementError as error:
        console.fail(str(error))
        _print_ways_out(for_devices(config, sizes, found, query))
        raise typer.Exit(1) from None
    _print_placements(found.stage_names(), placements)


def _print_placements(names: Sequence[str], placements: Sequence[Placement]) -> None:
    """One section a stage, one line for ranks that hold the same; what is sharded beside rows."""
    from embcomp.tables.budget import format_bytes

    table = Table(box=console.BOX, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    table.add_column("rank", justify="right")
    table.add_column("tables")
    for name in ("weights", "optimizer", "buffers", "beside", "total", "of device"):
        table.add_column(name, justify="right")
    for number, (name, placement) in enumerate(zip(names, placements), 1):
        for first, last in placement.equal_ranks():
            label = f"{number} {name}".rstrip() if first == 0 else ""
            table.add_row(label, *_rank_cells(placement, first, last))
        table.add_section()
    out = console.stdout()
    out.print(table, highlight=False)
    for number, (name, placement) in enumerate(zip(names, placements), 1):
        beside = placement.beside_rows
        if beside.tables:
            out.print(
                f"{number} {name}: codes, bitmaps and pointers of {_listed(beside.tables)} are sharded: "
                f"{format_bytes(beside.sharded)} of what each rank holds beside rows",
                highlight=False,
            )


def _rank_cells(placement: Placement, first: int, last: int) -> list[str]:
    """Of ranks that hold equally much."""
    from embcomp.tables.budget import format_bytes

    shards, total = placement.on_rank(first), placement.bytes_per_rank()[first]
    kinds = [shard.sharding for shard in shards]
    sizes = [
        sum(shard.weight_bytes for shard in shards),
        sum(shard.optimizer_bytes for shard in shards),
        sum(shard.buffer_bytes for shard in shards),
        placement.beside,
        total,
    ]
    return [
        str(first) if first == last else f"{first}-{last}",
        ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))),
        *(format_bytes(size) for size in sizes),
        f"{(total + placement.reserved) / placement.device_memory:.1%}",
    ]


def _replicate(found: ConfigPlan, world_size: int, free: int) -> None:
    """Dense rows need no planner: every rank holds every table, its gradient and its state."""
    from embcomp.tables.budget import format_bytes

    each = found.replicated_bytes
    console.stdout().print(
        f"each of {world_size} rank(s) holds all tables, their gradient and the optimizer's "
        f"state: {format_bytes(each)} ({each:,} bytes)",
        highlight=False,
    )
    if each > free:
        console.fail(f"{each:,} bytes do not fit in {free:,} bytes of device memory")
        _print_ways_out(
            [
                "train.row_optimizer='{name: rowwise_adagrad}': fused rows are sharded over ranks",
                f"--device-memory of {format_bytes(each)} or more",
            ]
        )
        raise typer.Exit(1)


def _print_ways_out(ways: list[str]) -> None:
    err = console.stderr()
    if ways:
        err.print("Ways out:", highlight=False)
    for way in ways:
        err.print(f"  {escape(way)}", highlight=False)
