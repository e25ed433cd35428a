"""How often ids occur that raw rows hold already, as a vocabulary.

It has the ids of the train split, each under its own number as text, so that whatever asks for
frequencies finds them where they are for other features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from embcomp.data_pipelines.preparing.counting import held_bytes, merge_counts, read_run
from embcomp.data_pipelines.preparing.given_ids import GivenIds
from embcomp.data_pipelines.preparing.row_writer import RowGroupWriter
from embcomp.data_pipelines.preparing.vocabulary import (
    VOCABULARY_SCHEMA,
    WORKING_FACTOR,
    Quantiles,
    Ranked,
)
from embcomp.data_pipelines.schema import FIRST_ID, MISSING_ID


def count_given_ids(
    runs: Sequence[Path],
    path: Path,
    *,
    feature: int,
    name: str,
    num_embeddings: int,
    partitions: int,
    missing: int,
    total: int,
    limit: int,
    scratch: Path,
) -> Ranked:
    """Merge the counts of a feature's ids and write them down by id: columns id, value, count.

    Args:
        runs: run files of the first pass.
        path: the vocabulary to write.
        feature: the feature's place.
        name: the feature's name.
        num_embeddings: how many ids there are.
        partitions: into how many parts values are cut by their hash.
        missing: how many values of the train split got id 0.
        total: how many values the train split has, `missing` among them.
        limit: bytes that merging and sorting may hold at once.
        scratch: a folder for files on the way.
    """
    ids = GivenIds(name, num_embeddings)
    files: list[Path] = []
    raw_values = kept = size = unseen = 0
    for partition in range(partitions):
        batch = feature * partitions + partition
        merged = merge_counts([read_run(run, batch) for run in runs])
        raw_values += merged.height
        numbered = merged.with_columns(ids.numbers(merged["value"]).cast(pl.Int32).alias("id"))
        reserved = numbered.filter(pl.col("id") < FIRST_ID)
        zeros = reserved.filter(pl.col("id") == MISSING_ID)
        missing += int(zeros["count"].sum())
        unseen += int(reserved["count"].sum()) - int(zeros["count"].sum())
        own = numbered.filter(pl.col("id") >= FIRST_ID).sort("id")
        if own.height:
            files.append(scratch / f"ids-{partition:05d}.arrow")
            own.write_ipc(files[-1])
            kept, size = kept + own.height, size + held_bytes(own)
    quantiles = Quantiles(missing, unseen, total)
    step = -(-num_embeddings // max(1, -(-size * WORKING_FACTOR // limit)))
    with RowGroupWriter(path, VOCABULARY_SCHEMA) as writer:
        for low in range(0, num_embeddings if files else 0, step):
            inside = pl.col("id").is_between(low, low + step, closed="left")
            frames = [pl.scan_ipc(f).filter(inside).collect(engine="streaming") for f in files]
            frame = pl.concat(frames).sort("id").select("id", "value", "count")
            quantiles.take(frame["id"].to_numpy(), frame["count"].to_numpy())
            table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
            writer.write(table.cast(VOCABULARY_SCHEMA))
    return Ranked(
        raw_values=raw_values,
        kept=kept,
        quantiles=quantiles.ids(),
        record=writer.record(),
        used=num_embeddings,
    )
