"""The wheel holds the whole tree under `embcomp`, and nothing beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from embcomp.backends import BACKENDS
from embcomp.cli.doctor_checks import PAIRINGS

pytestmark = pytest.mark.slow

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
MAPPED = ("models", "data_pipelines", "search")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def package_folder(package: str) -> Path:
    """The folder of a package: its own mapping, or that of its nearest mapped parent."""
    mapping = PROJECT["tool"]["setuptools"]["package-dir"]
    parts = package.split(".")
    for end in range(len(parts), 0, -1):
        if (mapped := mapping.get(".".join(parts[:end]))) is not None:
            return ROOT.joinpath(mapped, *parts[end:])
    return ROOT.joinpath(*parts)


def source_files() -> set[str]:
    """Every module of the checkout, by the path that it has inside the wheel."""
    found = set()
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        for file in package_folder(package).glob("*.py"):
            found.add(f"{package.replace('.', '/')}/{file.name}")
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy without symlinks, as a zip download has none."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    ignored = shutil.ignore_patterns("__pycache__", *MAPPED)
    shutil.copytree(ROOT / "embcomp", copy / "embcomp", ignore=ignored)
    for name in MAPPED:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), str(copy)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_every_folder_with_an_init_is_listed_as_a_package():
    found = set()
    for top in ("embcomp", *MAPPED):
        prefix = "" if top == "embcomp" else "embcomp."
        for init in (ROOT / top).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            if top != "embcomp" or len(parts) < 2 or parts[1] not in MAPPED:
                found.add(prefix + ".".join(parts))
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


@pytest.mark.parametrize("name", MAPPED)
def test_symlink_shows_the_mapped_folder(name):
    link = ROOT / "embcomp" / name
    if os.name == "nt" or not link.is_symlink():
        pytest.skip("this checkout has no symlinks")
    assert link.resolve() == ROOT / name
    assert link.readlink() == Path("..") / name


def test_wheel_holds_every_module_and_only_embcomp(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"embcomp", f"{wheel.name[:13]}.dist-info"}
    assert {name for name in names if name.endswith(".py")} == source_files()
    assert "embcomp/py.typed" in names
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)


def test_installed_wheel_imports_away_from_the_checkout(wheel, tmp_path):
    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(wheel)], check=True)
    code = (
        "import embcomp, embcomp.models, embcomp.data_pipelines, embcomp.search, embcomp.cli\n"
        "print(embcomp.__file__, embcomp.models.__file__, embcomp.data_pipelines.__file__)\n"
        "print(*embcomp.BACKENDS)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
    )
    assert done.returncode == 0, done.stderr
    files, methods = done.stdout.splitlines()
    assert all(Path(file).is_relative_to(target) for file in files.split())
    assert methods.split() == list(BACKENDS)


def requirements() -> dict[str, Requirement]:
    found = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
    return {requirement.name: requirement for requirement in found}


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def test_pins_admit_the_sets_that_doctor_calls_tested_and_nothing_beside_them():
    admitted = requirements()
    tested = [pairing for pairing in PAIRINGS if pairing.tested]
    for name, own in (("torch", "torch"), ("torchrec", "torchrec"), ("fbgemm-gpu", "fbgemm")):
        series = [getattr(pairing, own) for pairing in tested]
        major, last = (int(number) for number in series[-1].split("."))
        first = int(series[0].split(".")[1])
        for minor in range(first - 1, last + 2):
            allowed = admitted[name].specifier.contains(f"{major}.{minor}.1")
            assert allowed is (f"{major}.{minor}" in series), (name, minor)


@pytest.mark.parametrize("pairing", [pairing for pairing in PAIRINGS if pairing.tested])
def test_each_tested_set_has_requirements_with_its_own_stand_in(pairing):
    pinned = pins(pairing.requirements)
    assert pinned["torch"].startswith(f"{pairing.torch}.")
    assert pinned["torchrec"].startswith(f"{pairing.torchrec}.")
    assert pinned["fbgemm-gpu-cpu"].startswith(f"{pairing.fbgemm}.")
    text = (ROOT / pairing.requirements).read_text()
    (folder,) = [line for line in text.splitlines() if line.startswith("./packaging/")]
    stand_in = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
    assert stand_in["version"] == f"{pinned['fbgemm-gpu-cpu']}+cpu"
    assert stand_in["dependencies"] == [f"fbgemm-gpu-cpu=={pinned['fbgemm-gpu-cpu']}"]


def test_the_lowest_versions_that_are_tested_are_the_floors():
    lowest = pins(".ci/lowest.txt")
    floors = {
        name: requirement
        for name, requirement in requirements().items()
        if name not in ("torch", "torchrec", "fbgemm-gpu")
    }
    assert set(lowest) == set(floors)
    for name, requirement in floors.items():
        (floor,) = requirement.specifier
        assert floor.operator == ">="
        assert Version(floor.version) == Version(lowest[name])


def test_doctor_names_every_runtime_dependency():
    from embcomp.cli.doctor_checks import RUNTIME

    names = {
        dependency.split("=")[0].split(">")[0] for dependency in PROJECT["project"]["dependencies"]
    }
    assert names - {"torch", "torchrec", "fbgemm-gpu"} == set(RUNTIME)
