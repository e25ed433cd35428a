"""`embcomp plan`: exact bytes, placements, and exit code 1 with ways out that work."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from embcomp.cli import app
from embcomp.config.train_config import load_config
from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
from embcomp.planning.config_plan import plan_config, read_sizes, total_line
from embcomp.planning.placement import PlacementRequest, place_stages

CONFIG = """
name: planned
data: {path: data/none, batch_size: 512}
tables:
  embedding_dim: 16
  method: full
model: {name: autoint, use_wide: true}
train: {row_optimizer: {name: adagrad}}
"""
TABLES = """
user: 1000000
item: 200000
genre: {num_embeddings: 50, mean_length: 2.5}
"""
ROWS = 1_200_050


@pytest.fixture
def files(tmp_path):
    config, tables = tmp_path / "config.yaml", tmp_path / "tables.yaml"
    config.write_text(CONFIG)
    tables.write_text(TABLES)
    return str(config), str(tables)


def run(files, *arguments):
    config, tables = files
    return CliRunner().invoke(app, ["plan", config, *arguments, "--tables", tables])


def lines_of(files, *overrides):
    config, tables = files
    plan = plan_config(load_config(config, overrides), read_sizes(tables))
    return plan, plan.lines()


def test_full_tables_take_what_they_take(files):
    plan, lines = lines_of(files)
    total = total_line(lines)
    assert [line.tables[0].name for line in lines] == ["user", "item", "genre"]
    assert total.rows == ROWS
    assert total.serve == total.weights == total.full == ROWS * 16 * 4
    assert total.optimizer == ROWS * 16 * 4
    assert total.train == 2 * ROWS * 16 * 4
    first_order = total_line(plan.first_order_lines())
    # A first-order weight is trained in a row padded to four.
    assert first_order.serve == ROWS * 4 and first_order.train == 2 * ROWS * 16


def test_printed_table_shows_each_table_and_the_totals(files):
    result = run(files)
    assert result.exit_code == 0, result.output
    for text in ("user", "item", "genre", "1,000,000", "embedding tables", "first-order weights"):
        assert text in result.output
    assert "row optimizer: adagrad (fused)" in result.output


def test_tables_that_share_rows_are_one_line(files):
    _, lines = lines_of(files, "tables.method=unified", "tables.budget=10%")
    (line,) = lines
    assert len(line.tables) == 3
    assert line.serve <= ROWS * 64 // 10
    assert line.compression >= 10


def test_hashed_tables_keep_a_line_each(files):
    _, lines = lines_of(files, "tables.method={name: hash, ratio: 0.1}")
    assert [len(line.tables) for line in lines] == [1, 1, 1]
    assert [line.method for line in lines] == ["hash", "hash", "full"]
    assert lines[0].stored_rows == 100_000


def test_dataset_of_the_config_gives_the_tables(files, tmp_path):
    write_toy_dataset(tmp_path / "toy", num_values=(60, 30, 8))
    result = CliRunner().invoke(app, ["plan", files[0], f"data.path={tmp_path / 'toy'}"])
    assert result.exit_code == 0, result.output
    assert "C1" in result.output and "62" in result.output


def test_placement_prints_bytes_of_each_rank(files):
    result = run(files, "--world-size", "4", "--device-memory", "1GiB")
    assert result.exit_code == 0, result.output
    runs = re.findall(r"(\d)(?:-(\d))? +\d+ (?:row|table)_wise", result.output)
    ranks = [n for first, last in runs for n in range(int(first), int(last or first) + 1)]
    assert ranks == [0, 1, 2, 3]


def test_placement_prints_every_stage_of_a_method(files):
    memory = ("--world-size", "2", "--device-memory", "1GiB")
    result = run(files, "tables.method={name: pq, subvector_dim: 4, num_codewords: 64}", *memory)
    assert result.exit_code == 0, result.output
    stages = re.findall(
        r"^ (\d \w)", result.output, re.MULTILINE
    )  # names are cut where it is narrow
    assert stages == ["1 f", "2 c"]
    small = ("--world-size", "2", "--device-memory", "2MiB")
    result = run(files, "tables.method={name: pq, subvector_dim: 4, num_codewords: 64}", *small)
    assert result.exit_code == 1
    assert "stage 1 of 2: the tables" in result.stderr


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_not_placeable_is_exit_code_1_with_ways_out_that_work(files, device):
    arguments = ["--device-memory", "64MiB", "--world-size", "2", "--device", device]
    result = run(files, *arguments)
    assert result.exit_code == 1
    assert "do not fit on 2 x 67,108,864 bytes" in result.stderr
    memory = re.search(r"--device-memory (\d+) ", result.stderr)
    world = re.search(r"--world-size (\d+):", result.stderr)
    optimizer = re.search(r"(train.row_optimizer.name=\w+):", result.stderr)
    method = re.search(r"(tables.method=\w+) (tables.budget=\d+)", result.stderr)
    assert memory and world and optimizer and method
    for changed in (
        ["--device-memory", memory[1], "--world-size", "2"],
        ["--device-memory", "64MiB", "--world-size", world[1]],
        [*arguments, optimizer[1]],
        [*arguments, method[1], method[2]],
    ):
        again = run(files, *changed, "--device", device)
        assert again.exit_code == 0, again.output


def test_over_budget_is_exit_code_1_with_ways_out_that_work(files):
    result = run(files, "tables.method=qr", "tables.budget=50KB")
    assert result.exit_code == 1
    assert "cannot be held in 50,000 bytes" in result.stderr
    assert "Traceback" not in result.output
    ways = re.findall(
        r"^  (tables\.\S+(?: tables\.\S+)??)(?:: takes| \()", result.stderr, re.MULTILINE
    )
    assert any(way.startswith("tables.method=unified") for way in ways)
    assert any(way.startswith("tables.budget=") for way in ways)
    for way in ways:
        overrides = {"tables.method": "qr", "tables.budget": "50KB"}
        overrides |= dict(part.split("=") for part in way.split())
        again = run(files, *(f"{key}={value}" for key, value in overrides.items()))
        assert again.exit_code == 0, f"{way}: {again.output}"


def test_reserve_leaves_less_for_tables(files):
    memory = ["--device-memory", "200MiB"]
    assert run(files, *memory, "--reserve", "0%").exit_code == 0
    assert run(files, *memory).exit_code == 1  # training keeps 10 %
    assert run(files, *memory, "--reserve", "40%").exit_code == 1
    assert run(files, *memory, "--reserve", "80MiB").exit_code == 1


def test_dense_rows_are_counted_on_every_rank(files):
    mode = "train.row_optimizer={name: adam, mode: dense}"
    result = run(files, mode, "--device-memory", "1GiB", "--world-size", "8")
    assert result.exit_code == 0, result.output
    # Weights, gradient and two moments of 16 + 4 columns.
    assert f"{4 * ROWS * 20 * 4:,} bytes" in result.output
    result = run(files, mode, "--device-memory", "100MiB", "--world-size", "8")
    assert result.exit_code == 1
    assert "fused rows are sharded" in result.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping"),
        ("user: -3\n", "table 'user': num_embeddings must be a positive integer, got -3"),
        ("user: true\n", "num_embeddings must be a positive integer, got True"),
        ("user: {rows: 3}\n", "unknown key 'rows'; the keys are num_embeddings, mean_length"),
        ("user: {mean_length: 3}\n", "num_embeddings is missing"),
        ("user: {num_embeddings: 3, mean_length: 0}\n", "mean_length must be a positive number"),
        ("user: 1\nuser: 2\n", "appears twice"),
        ("{}\n", "got none"),
    ],
)
def test_bad_table_sizes_are_named(files, tmp_path, text, message):
    (tmp_path / "tables.yaml").write_text(text)
    result = run(files)
    assert result.exit_code == 1
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tables.methd=full"], "did you mean 'method'"),
        (["tables.embedding_dim=0"], "tables.embedding_dim"),
        (["tables.embedding_dim=-4"], "tables.embedding_dim"),
        (["tables.method=unifed"], "did you mean 'unified'"),
        (["tables.overrides={usr: full}"], "no table is called 'usr'"),
        (["--device-memory", "40GiBs"], "--device-memory: expected a positive number of bytes"),
        (["--device-memory", "1GiB", "--reserve", "some"], "--reserve: expected a positive number"),
        (["nonsense"], "expected key.path=value"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_1(files, arguments, message):
    result = run(files, *arguments)
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_missing_dataset_is_named(files):
    result = CliRunner().invoke(app, ["plan", files[0]])
    assert result.exit_code == 1
    assert "data/none" in result.stderr


def test_wrong_usage_is_exit_code_2():
    assert CliRunner().invoke(app, ["plan"]).exit_code == 2
    assert CliRunner().invoke(app, ["nosuchverb"]).exit_code == 2


def test_several_methods_in_stages_are_printed_stage_by_stage(files):
    alone = "tables.method={name: pq, subvector_dim: 4, num_codewords: 16}"
    chosen = (alone, "tables.overrides={genre: {name: optembed, budget: 50%}}")
    plan, _ = lines_of(files, *chosen)
    found = plan.stage_lines()
    held = {s.name: {form: [t.name for t in tables] for form, tables in s.forms} for s in found}
    assert held == {
        "dense+supernet": {"full": ["item", "user"], "optembed": ["genre"]},
        "optembed.retrain": {"full": ["item", "user"], "low_dim": ["genre"]},
        "pq.codes": {"coded": ["item", "user"], "low_dim": ["genre"]},
    }
    printed = run(files, *chosen).stdout
    for stage in held:
        assert re.search(rf"^ *{re.escape(stage)} ", printed, re.MULTILINE)
    assert found[0].train > found[-1].train
    assert len(plan.on_meta()) == len(found)
    assert not lines_of(files, alone)[0].stage_lines()


def test_codes_that_fit_once_they_are_sharded_are_a_way_out(files):
    coded = "tables.method={name: coded, subvector_dim: 4, num_codewords: 256}"
    # 4.8 MB of codes, and on each of eight ranks as much of first-order weights and their state.
    devices = ("--device-memory", "8000000", "--reserve", "0%", "--world-size", "8")
    result = run(files, coded, *devices)
    assert result.exit_code == 1 and "train.shard_codes_above=1: codes" in result.stderr
    assert run(files, coded, *devices, "train.shard_codes_above=1").exit_code == 0


def test_codes_of_large_tables_are_billed_to_each_rank_by_the_chunk(files):
    coded = "tables.method={name: coded, subvector_dim: 4, num_codewords: 256}"
    devices = ("--device-memory", "40GiB", "--world-size", "8")
    whole = run(files, coded, *devices)
    assert whole.exit_code == 0 and "are sharded" not in whole.stdout
    sharded = run(files, coded, "train.shard_codes_above=1MiB", *devices)
    # A million ids of four codes of a byte, an eighth of them on each rank.
    line = "1 coded, full: codes, bitmaps and pointers of user are sharded: 488.3 KiB of what each rank"
    assert line in " ".join(sharded.stdout.split())
    plan, _ = lines_of(files, coded)
    beside = {}
    for above in (64 << 20, 1 << 20, 1):
        query = PlacementRequest(world_size=8, device_memory=40 << 30, shard_codes_above=above)
        (placement,) = place_stages(plan.on_meta(), query)
        beside[above] = placement.beside
        assert min(placement.bytes_per_rank()) >= placement.beside
    assert beside[64 << 20] - beside[1 << 20] == 4_000_000 - 500_000
    assert beside[1 << 20] - beside[1] == 800_000 - 100_000  # `genre` is held full
