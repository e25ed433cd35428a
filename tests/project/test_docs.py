"""The documentation does what it says: snippets run, configs parse, commands and links exist."""

from __future__ import annotations

import re
import shlex
import socket
from pathlib import Path

import pytest
import torch.distributed as dist
import yaml
from typer.main import get_command

from embcomp.benchmark.benchmark_config import parse_benchmark
from embcomp.cli import app
from embcomp.config.catalog import find_recipe
from embcomp.config.train_config import parse_config
from embcomp.data_pipelines.synthetic.toy import write_toy_dataset
from embcomp.search.config.search_config import parse_search

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(page.read_text()) if language in languages]


def commands() -> list[list[str]]:
    """Every `embcomp ...` line of a shell block, as words, and where it stands."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash", "text"):
            for line in block.replace("\\\n", " ").splitlines():
                command = line.partition("  ")[0].partition("#")[0].strip()
                if command.startswith("embcomp ") and "|" not in command:
                    found.append([page.name, *shlex.split(command)])
    return found


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with a toy dataset under data/, and torchrun's variables for one process."""
    monkeypatch.chdir(tmp_path)
    names = ["data/toy", "data/criteo"]
    for name in names:
        write_toy_dataset(name, num_values=(300, 60, 8))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (variables | {"MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    yield tmp_path
    if dist.is_initialized():
        dist.destroy_process_group()


def test_there_is_something_to_check():
    assert len(PAGES) >= 8
    assert len(commands()) >= 10
    assert sum(len(blocks(page, "python")) for page in PAGES) >= 5


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem
)
def test_python_snippets_run_in_order(page, workplace):
    namespace = {"__name__": "snippet"}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, snippet {number + 1}", "exec"), namespace)  # noqa: S102


@pytest.mark.parametrize("command", commands(), ids=lambda command: " ".join(command))
def test_command_lines_name_verbs_and_options_that_exist(command):
    _, _, verb, *words = command
    verbs = get_command(app).commands
    if verb in ("-h", "--help", "--version"):
        return
    assert verb in verbs
    options = {name for parameter in verbs[verb].params for name in parameter.opts}
    for word in words:
        if word.startswith("-"):
            assert word.partition("=")[0] in options
        if verb != "cp" and word.startswith("configs/") and word.endswith(".yaml"):
            assert (ROOT / word).is_file()
    if verb == "train":
        overrides = [word for word in words if "=" in word and not word.startswith("-")]
        recipe = find_recipe(str(ROOT / words[0]) if "/" in words[0] else words[0])
        parse_config(yaml.safe_load(recipe.read_text()), overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_whole_configs_in_yaml_blocks_are_valid(page):
    for block in blocks(page, "yaml"):
        document = yaml.safe_load(block)
        if isinstance(document, dict) and {"name", "data", "model"} <= set(document):
            parse_config(document)
        if isinstance(document, dict) and {"name", "recipe", "groups"} <= set(document):
            find_recipe(parse_search(document).recipe)
        if isinstance(document, dict) and {"name", "recipe", "methods"} <= set(document):
            find_recipe(parse_benchmark(document).recipe)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"\w+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target
