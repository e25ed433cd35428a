"""Methods are found where they lie; those of other packages go everywhere that ours go."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import embcomp
import embcomp.backends
from embcomp.backends import BACKENDS, Full, Hash, register
from embcomp.backends.discovery import Methods, methods_of
from embcomp.errors import ConfigError
from embcomp.testing import BackendCase, check_backend
from tests.helpers import toy_method
from tests.helpers.source_tree import ROOT, modules
from tests.helpers.toy_method import Neighbours

pytestmark = pytest.mark.slow


@pytest.fixture
def toy_package(tmp_path, monkeypatch):
    """A package of methods: two modules and a folder, with classes that are no methods."""
    folder = tmp_path / "toy_package"
    (folder / "wing").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "wing" / "__init__.py").touch()
    shutil.copy(toy_method.__file__, folder / "wing" / "toy.py")
    (folder / "hashed.py").write_text(
        "from embcomp.backends import Full, Hash\n"
        "class Unnamed(Hash): ...\n"
        "class Again(Hash):\n    name = 'again'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield import_module("toy_package")
    for name in [name for name in sys.modules if name.split(".")[0] == "toy_package"]:
        del sys.modules[name]


def test_methods_are_found_in_every_folder_where_they_are_defined(toy_package):
    found = methods_of(toy_package)
    assert [(method.__module__, method.name) for method in found] == [
        ("toy_package.hashed", "again"),
        ("toy_package.wing.toy", "neighbours"),
    ]
    assert list(Methods([*reversed(found), Full])) == ["again", "full", "neighbours"]


def test_two_methods_of_one_name_are_refused(toy_package: ModuleType):
    toy = next(method for method in methods_of(toy_package) if method.name == "neighbours")
    with pytest.raises(
        ConfigError, match=r"called 'neighbours': .*toy_method\.Neighbours and toy_"
    ):
        Methods([Neighbours, toy])
    taken = type("Mine", (Hash,), {"name": "full"})
    with pytest.raises(
        ConfigError, match=r"two methods are called 'full': embcomp\.backends\.full"
    ):
        register(taken)
    assert BACKENDS["full"] is Full


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (Full(), "expected a subclass of embcomp.BackendConfig"),
        (dict, "expected a subclass of embcomp.BackendConfig"),
        (type("Mine", (Hash,), {}), "has no `name` of its own"),
        (type("Mine", (embcomp.BackendConfig,), {"name": "mine"}), "build, .* must be defined"),
    ],
)
def test_what_is_no_method_is_not_registered(value, why):
    with pytest.raises(ConfigError, match=why):
        register(value)
    assert "mine" not in BACKENDS


def test_registering_gives_the_class_back_and_twice_is_once():
    methods = Methods([Full])
    assert methods.register(Neighbours) is methods.register(Neighbours) is Neighbours
    assert list(methods) == ["full", "neighbours"]


def test_the_packages_own_methods_are_sorted_and_importable():
    ours = methods_of(embcomp.backends)
    assert list(BACKENDS) == sorted(BACKENDS) and set(ours) <= set(BACKENDS.values())
    for method in ours:
        assert getattr(embcomp.backends, method.__name__) is method
        assert method.__name__ in embcomp.backends.__all__


@pytest.mark.parametrize("package", ["embcomp", "embcomp.backends"])
def test_type_checkers_see_every_method_that_has_a_section_in_the_documentation(package):
    text = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    titles = [line.split() for line in text.splitlines() if line.startswith("## ")]
    published = {
        method.__name__
        for method in methods_of(embcomp.backends)
        if any(method.name in title for title in titles)
    }
    assert len(published) > 10
    typed = {
        alias.asname
        for node in modules()[package].body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for line in node.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    }
    assert published <= typed


def test_a_toy_method_passes_every_check(monkeypatch):
    monkeypatch.setattr("embcomp.testing.conformance.BACKENDS", Methods([Neighbours]))
    check_backend(BackendCase(config=Neighbours(share=3)))


SESSION = """
from typer.testing import CliRunner
from embcomp.cli import app
from embcomp.data_pipelines.synthetic.toy import write_toy_dataset

def run(*arguments):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, (arguments, result.output, result.exception)
    return result.output

write_toy_dataset("toy")
assert "neighbours" in run("ls", "methods")
assert "share" in run("cat", "neighbours")
assert "neighbours" in run("plan", "config.yaml")
run("train", "config.yaml", "--quiet")
run("export", "runs/toy_run", "artefact")
assert "neighbours" in run("inspect", "artefact")
"""

CONFIG = """
name: toy_run
data: {path: toy, batch_size: 64, eval_batch_size: 128}
tables: {embedding_dim: 8, method: neighbours, budget: 40%}
model: {name: fm}
train: {epochs: 1, max_steps: 2, device: cpu}
"""


def announce(folder: Path, value: str) -> None:
    """Install a distribution that announces one method, as `pip install` would."""
    info = folder / "toy_methods-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[embcomp.backends]\nneighbours = {value}\n")


def python(code: str, site: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": path},
    )


def test_an_announced_method_is_planned_trained_exported_and_inspected(tmp_path):
    announce(tmp_path / "site", "toy_methods:Neighbours")
    shutil.copy(toy_method.__file__, tmp_path / "site" / "toy_methods.py")
    (tmp_path / "config.yaml").write_text(CONFIG)
    done = python(SESSION, tmp_path / "site")
    assert done.returncode == 0, done.stderr


def test_the_announced_module_may_be_imported_first(tmp_path):
    announce(tmp_path / "site", "toy_methods:Neighbours")
    shutil.copy(toy_method.__file__, tmp_path / "site" / "toy_methods.py")
    code = "import toy_methods, embcomp; print(embcomp.BACKENDS['neighbours'].__module__)"
    done = python(code, tmp_path / "site")
    assert done.stdout == "toy_methods\n", done.stderr


def test_an_announced_method_that_is_not_there_names_its_package(tmp_path):
    announce(tmp_path / "site", "not_there:Method")
    code = (
        "from embcomp.cli import main\nimport sys\nsys.argv = ['embcomp', 'ls', 'methods']\nmain()"
    )
    done = python(code, tmp_path / "site")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = " ".join(done.stderr.split())
    assert "package 'toy-methods' announces the method 'neighbours' as 'not_there:Method'" in said
