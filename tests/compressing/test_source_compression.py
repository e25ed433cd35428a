"""`embcomp compress`: every layout of a checkpoint, one clear line for bad ones, and kills."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import polars as pl
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from typer.testing import CliRunner

import embcomp
from embcomp.cli import app
from embcomp.collection.table_row_types import RowTypes
from embcomp.compressing.approximation import method_of
from embcomp.compressing.source_compression import (
    SourceJob,
    compress_source,
    kept_folder,
    open_job,
)
from embcomp.training.stages import folder_work

ROWS, DIM = 700, 12
NAME = "sparse.ebc.embedding_bags.user.weight"


def table(dtype=torch.float32, rows=ROWS):
    drawn = torch.randn(rows, DIM, generator=torch.Generator().manual_seed(0))
    return drawn.to(dtype)


def others():
    return {"over.weight": torch.ones(3, 700), f"optim.state.{NAME}.momentum1": torch.ones(ROWS, 4)}


def as_safetensors(folder, rows):
    path = folder / "model.safetensors"
    safetensors.torch.save_file({NAME: rows, **others()}, path)
    return path


def as_indexed(folder, rows):
    safetensors.torch.save_file({NAME: rows}, folder / "a.safetensors")
    safetensors.torch.save_file(others(), folder / "b.safetensors")
    places = {NAME: "a.safetensors", **dict.fromkeys(others(), "b.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def as_state_dict(folder, rows):
    path = folder / "model.pt"
    torch.save({"model": {NAME: rows, **others()}, "epoch": 3}, path)
    return path


def as_checkpoint(folder, rows):
    dcp.save({"model": {NAME: rows, **others()}}, checkpoint_id=folder, no_dist=True)
    return folder


def as_npy(folder, rows):
    path = folder / "user.npy"
    np.save(path, rows.numpy())
    return path


def job(source, method="full", budget="100%", dtype="fp32", **more):
    return open_job(
        SourceJob(
            source=source,
            method=method_of(method)(),
            budget=budget,
            types=RowTypes.of(dtype),
            **more,
        )
    )


@pytest.mark.parametrize(
    "write", [as_safetensors, as_indexed, as_state_dict, as_checkpoint, as_npy]
)
def test_rows_of_every_layout_come_out_as_they_were(write, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    opened = job(write(source, table()))
    assert [spec.name for spec in opened.specs] == ["user"]  # neither optimizer's nor the network's
    report = compress_source(opened, tmp_path / "out")
    assert report.bytes == ROWS * DIM * 4
    for rows in ("auto", "torch"):
        serving = embcomp.load(tmp_path / "out", rows=rows)
        assert torch.equal(serving.lookup("user", torch.arange(ROWS)), table())
    assert serving.lookup("user", [[1, 2, 3], [4, 5, 699]]).shape == (2, 3, DIM)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("write", [as_safetensors, as_state_dict, as_checkpoint])
def test_narrow_types_are_read_exactly(write, dtype, tmp_path):
    opened = job(write(tmp_path, table(dtype)), budget="8MiB")
    assert opened.source_bytes == ROWS * DIM * dtype.itemsize
    assert torch.equal(opened.tables[0].rows().whole(), table(dtype).float())


def test_scales_of_8_bit_rows_are_counted_in(tmp_path):
    scales, rows = torch.rand(ROWS), table(torch.float8_e4m3fn)
    path = tmp_path / "model.safetensors"
    held = {"embed.weight": rows, "embed.weight_scale": scales}
    safetensors.torch.save_file(held, path)
    (chosen,) = job(path, budget="8MiB").tables
    assert torch.equal(chosen.rows().whole(), rows.float() * scales[:, None])
    held["embed.weight_scale"] = torch.rand(7, 3)
    safetensors.torch.save_file(held, path)
    with pytest.raises(embcomp.DataError, match=r"scales of shape \(7, 3\)"):
        job(path, budget="8MiB").tables[0].rows()


@pytest.mark.parametrize(
    ("dtype", "method", "row_type", "budget", "most"),
    [
        (torch.bfloat16, "full", "int8", "52%", 0.01),
        (torch.float8_e4m3fn, "full", "int8", "260KiB", 0.01),
        (torch.float8_e4m3fn, "full", "int4", "52%", 0.12),
        (torch.bfloat16, "low_rank", "fp16", "10%", 0.05),
    ],
)
def test_the_table_of_a_language_model_is_one_tensor_among_others(
    dtype, method, row_type, budget, most, tmp_path
):
    random = torch.Generator().manual_seed(0)
    latent = torch.randn(1024, 8, generator=random) @ torch.randn(8, 256, generator=random)
    scales = latent.abs().amax(1, keepdim=True) / 448
    rows = latent.to(dtype) if dtype is torch.bfloat16 else (latent / scales).to(dtype)
    network = {"model.layers.0.mlp.up_proj.weight": torch.zeros(512, 256).bfloat16()}
    if dtype is not torch.bfloat16:
        network["model.embed_tokens.weight_scale"] = scales
    safetensors.torch.save_file({"model.embed_tokens.weight": rows}, tmp_path / "a.safetensors")
    safetensors.torch.save_file(network, tmp_path / "b.safetensors")
    places = {"model.embed_tokens.weight": "a.safetensors"}
    places |= dict.fromkeys(network, "b.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    opened = job(tmp_path, method, budget, row_type)
    compress_source(opened, tmp_path / "out")
    serving = embcomp.load(tmp_path / "out", mmap=True)
    was = opened.tables[0].rows().whole()
    now = serving.lookup("embed_tokens", torch.arange(1024).reshape(2, 512)).reshape(1024, 256)
    assert (now - was).norm() <= most * was.norm()


@pytest.mark.parametrize(
    ("method", "dtype"), [("pq", "fp32"), ("full", "int8"), ("low_rank", "int8")]
)
def test_the_artefact_stays_within_the_budget_and_is_as_far_off_as_said(method, dtype, tmp_path):
    path = as_npy(tmp_path, table())
    report = compress_source(job(path, method, "40%", dtype), tmp_path / "out")
    assert 0.3 * report.allowed < report.bytes <= report.allowed == int(0.4 * ROWS * DIM * 4)
    now = embcomp.load(tmp_path / "out").lookup("user", torch.arange(ROWS))
    lost = (now - table()).norm() / table().norm()
    assert report.tables[0].error.error == pytest.approx(float(lost), rel=1e-5)
    assert report.tables[0].bytes == report.bytes


def test_tables_of_one_name_get_longer_ones(tmp_path):
    path = tmp_path / "m.safetensors"
    held = {f"{side}.embedding.weight": table() for side in ("user", "item")}
    safetensors.torch.save_file(held, path)
    assert {spec.name for spec in job(path).specs} == {"user_embedding", "item_embedding"}


class Killed(BaseException):
    """Stands for the end of a process: nothing that handles errors sees it."""


@pytest.mark.slow
@pytest.mark.parametrize(("method", "after"), [("low_rank", 2), ("low_rank", 9), ("pq", 7)])
def test_a_killed_command_goes_on_and_leaves_what_an_undisturbed_one_does(
    method, after, tmp_path, monkeypatch
):
    monkeypatch.setattr("embcomp.layers.block_work.BLOCK_BYTES", 1 << 12)  # of 256 rows
    path, keep, made = as_npy(tmp_path, table()), folder_work.write_piece, []

    def counted(*arguments):
        made.append(arguments[0])
        if len(made) == limit:
            raise Killed
        keep(*arguments)

    monkeypatch.setattr(folder_work, "write_piece", counted)
    limit = None
    compress_source(job(path, method, "20%"), tmp_path / "whole")
    total, limit = len(made), after
    made.clear()
    with pytest.raises(Killed):
        compress_source(job(path, method, "20%"), tmp_path / "out")
    damaged = made[0] if after > 4 else None
    if damaged is not None:  # what a power cut leaves of a block
        damaged.write_bytes(damaged.read_bytes()[:-8])
    made.clear()
    limit = None
    report = compress_source(job(path, method, "20%"), tmp_path / "out")
    assert report.resumed
    assert len(made) == total - (after - 1) + (damaged is not None)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not kept_folder(tmp_path / "out").exists()


def test_kept_blocks_of_another_job_are_not_gone_on_from(tmp_path, monkeypatch):
    path, keep = as_npy(tmp_path, table()), folder_work.write_piece

    def killed(*arguments):
        keep(*arguments)
        raise Killed

    monkeypatch.setattr(folder_work, "write_piece", killed)
    with pytest.raises(Killed):
        compress_source(job(path, "low_rank", "20%"), tmp_path / "out")
    monkeypatch.setattr(folder_work, "write_piece", keep)
    os.utime(path, ns=(1, 1))  # another table of the same shape
    assert not compress_source(job(path, "low_rank", "20%"), tmp_path / "out").resumed


def damaged(path, *, keep=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    return path


def with_nan(folder):
    rows = table()
    rows[600, 3] = torch.nan
    return as_npy(folder, rows)


def no_tables(folder):
    held = {"over.weight": torch.ones(3, 700), "over.bias": torch.ones(3)}
    safetensors.torch.save_file(held, folder / "m.safetensors")
    return folder


def unknown(folder):
    (folder / "notes.txt").write_text("rows")
    return folder


def missing_part(folder):
    (as_indexed(folder, table()) / "a.safetensors").unlink()
    return folder


def unsafe_pickle(folder):
    torch.save({"a": RowTypes()}, folder / "m.pt")
    return folder / "m.pt"


@pytest.mark.parametrize(
    ("write", "words", "said"),
    [
        (lambda f: f / "nowhere", [], "no such file or folder; expected a .safetensors file"),
        (unknown, [], "unknown layout: it holds notes.txt"),
        (lambda f: unknown(f) / "notes.txt", [], "unknown layout"),
        (no_tables, [], r"no table was found .* have: over.weight \(3 x 700 fp32\); name tables"),
        (missing_part, [], "names a.safetensors, which is not in"),
        (lambda f: damaged(as_safetensors(f, table())), [], "is truncated: .* ends at byte"),
        (lambda f: damaged(as_npy(f, table())), [], "no .npy file of numbers, or truncated"),
        (lambda f: damaged(as_state_dict(f, table())), [], "no file of torch.save, or truncated"),
        (
            unsafe_pickle,
            [],
            r"holds more than plain tensors \([\w.]+\.RowTypes\), which nothing here",
        ),
        (with_nan, [], "row 600 holds NaN or an infinity"),
        (lambda f: as_npy(f, table()), ["--include", "item"], "matches no table among 1 tensor"),
        (lambda f: as_npy(f, table()), ["--include", "("], "is no regular expression"),
        (
            lambda f: as_npy(f, table()),
            ["--budget", "90"],
            r"pq reaches is \d+ bytes .* narrower rows \(int8, int4\) or another method \(.*low_dim, low_rank",
        ),
        (lambda f: as_npy(f, table()), ["--budget", "0.0001%"], "in 1 bytes; the smallest pq"),
        (
            lambda f: as_npy(f, table()),
            ["--method", "full", "--dtype", "int8"],
            r"in 6,720 bytes; the smallest full reaches is 11,200 bytes with rows in int8",
        ),
        (lambda f: as_npy(f, table()), ["--method", "hash"], "hash: cannot begin from the rows"),
        (lambda f: as_npy(f, table()), ["--method", "lowrank"], "did you mean 'low_rank'"),
        (lambda f: as_npy(f, table()), ["--dtype", "int9"], "rows are served as fp32"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(write, words, said, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    command = ["compress", str(write(folder)), str(tmp_path / "out"), "--budget", "20%", *words]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 1
    errors = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(said, errors[0])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"count": [1.0] * 9}, r"has 700 ids; expected a tensor \(700,\) .*, got \(9,\)"),
        ({"id": [1, 700], "count": [1, 2]}, "the counts name id 700"),
        ({"id": [1, 1], "count": [1, 2]}, "an id stands twice"),
        ({"id": [1], "count": [None]}, "id 1 has nan"),
        ({"id": [1]}, "expected columns `id` and `count`"),
        ({"table": ["x"], "id": [1], "count": [1]}, "no table is called 'x'"),
    ],
)
def test_counts_that_do_not_fit_are_refused(columns, said, tmp_path):
    counts = tmp_path / "counts.parquet"
    schema = {"count": pl.Int64} if columns.get("count") == [None] else None
    pl.DataFrame(columns, schema_overrides=schema).write_parquet(counts)
    with pytest.raises((embcomp.ConfigError, embcomp.DataError), match=said):
        job(as_npy(tmp_path, table()), counts=counts)


def test_counts_weigh_the_error(tmp_path):
    counts = tmp_path / "counts.parquet"
    pl.DataFrame({"id": [5, 6], "count": [3, 1]}).write_parquet(counts)
    opened = job(as_npy(tmp_path, table()), "pq", "20%", counts=counts)
    report = compress_source(opened, tmp_path / "out")
    assert report.tables[0].error.error < 1e-3  # two rows, and all codewords for them


def test_a_dry_run_says_what_fits_at_which_error_and_writes_nothing(tmp_path):
    path = as_npy(tmp_path, table())
    words = ["compress", str(path), str(tmp_path / "out"), "--budget", "30%", "--dry-run"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.stderr
    assert re.search(r"pq +fp32 +[\d,]+ +\d+\.\d% +0\.\d{4}", found.stdout)
    assert re.search(r"full +fp16 +does not fit", found.stdout)
    assert "user: user (700 x 12 fp32)" in found.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["user.npy"]
