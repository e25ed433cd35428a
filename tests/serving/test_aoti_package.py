"""`package.pt2` answers as the artefact, from Python and from C++, and fits where it is loaded or says so.

Compiling takes tens of seconds, so that one package of several methods serves all tests but one, which
compiles every method and is left to `make test-long`.
"""

from __future__ import annotations

import mmap
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from embcomp import load_program
from embcomp.errors import ArtefactError, DataError
from embcomp.serving.artefact_integrity import with_checksums
from embcomp.serving.exported_program import Program, program_inputs
from embcomp.serving.programs import forms
from embcomp.serving.programs.aoti_package import AotiPackage, check_fits, package_metadata
from embcomp.serving.programs.compiler import why_no_compiler
from embcomp.serving.programs.forms import check_form, write_form
from embcomp.serving.programs.processor import instruction_sets
from tests.helpers.program_cases import batches, saved
from tests.helpers.source_tree import ROOT

needs_compiler = pytest.mark.skipif(why_no_compiler() is not None, reason=str(why_no_compiler()))
METHODS = ("full", "hash", "kept", "coded")


@pytest.fixture(scope="session")
def case(tmp_path_factory):
    """A package of several methods, for bags."""
    made = saved(tmp_path_factory.mktemp("aoti") / "a", METHODS)
    config = write_form("aoti", made.serving, made.folder, made.config, bags=True)
    text = with_checksums(config, made.folder, config.tensors).to_json()
    (made.folder / "config.json").write_text(text)
    return made


@pytest.fixture(scope="session")
def client(tmp_path_factory):
    """The C++ client, built against the installed torch."""
    torch_folder = Path(torch.__file__).parent
    built = tmp_path_factory.mktemp("client") / "serve"
    command = [
        *("g++", "-std=c++20", "-O0", str(ROOT / "examples" / "serve.cpp"), "-o", str(built)),
        f"-I{torch_folder}/include",
        *(f"-L{torch_folder}/lib", "-ltorch", "-ltorch_cpu", "-lc10"),
        f"-Wl,-rpath,{torch_folder}/lib",
    ]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-2000:]
    return built


def inputs_of(case, batch):
    return program_inputs(Program(case.serving, bags=True), batch.dense, batch.sparse)


@pytest.mark.slow
@needs_compiler
def test_a_package_answers_as_the_artefact(case):
    assert check_form("aoti", case.folder, case.serving, batches(case.tables), bags=True) < 1e-6


@pytest.mark.long
@pytest.mark.slow
@needs_compiler
def test_a_package_of_every_method_answers_as_the_artefact(tmp_path):
    case = saved(tmp_path / "a")
    write_form("aoti", case.serving, case.folder, case.config, bags=True)
    assert check_form("aoti", case.folder, case.serving, batches(case.tables), bags=True) < 1e-6


@pytest.mark.slow
@needs_compiler
def test_inputs_are_taken_by_name_and_wrong_ones_are_one_line(case):
    program = load_program(case.folder, form="aoti")
    inputs = inputs_of(case, batches(case.tables)[1])
    wanted = program(inputs)
    found = program(dict(reversed(inputs.items())))
    assert all(torch.equal(found[key], own) for key, own in wanted.items())
    with pytest.raises(DataError, match=r"takes ids as \(B, 4, L\) int64; it was given .* int32"):
        program({**inputs, "ids": inputs["ids"].int()})
    with pytest.raises(DataError, match="takes ids, lengths; it was given ids"):
        program({"ids": inputs["ids"]})


@pytest.mark.slow
@needs_compiler
def test_an_id_out_of_range_is_refused_by_its_method_and_never_answered(case):
    program, package = load_program(case.folder, form="aoti"), AotiPackage(case.folder)
    inputs = inputs_of(case, batches(case.tables)[1])
    inputs["lengths"][7] = 1
    right = program(inputs)
    for n, method in enumerate(METHODS):
        for bad in (-1, 10**9):
            ids = inputs["ids"].clone()
            ids[7, n, 0] = bad
            if method == "hash":
                assert program({**inputs, "ids": ids})["f_hash"].isfinite().all()
                continue
            with pytest.raises(
                DataError, match=rf"'f_{method}': id {bad} is not in \[0, \d+\), in row 7"
            ):
                program({**inputs, "ids": ids})
            for key, own in package({**inputs, "ids": ids}).items():
                assert own[7].isnan().all()
                own[7] = right[key][7]
                torch.testing.assert_close(own, right[key], rtol=0, atol=1e-6)
    inputs["ids"][7, :, 1:] = -1  # behind the bag
    program(inputs)


@pytest.mark.slow
@needs_compiler
def test_rows_are_mapped_from_the_artefacts_file(case):
    metadata = package_metadata(case.folder / "package.pt2")
    count = int(metadata["tables"])
    lines = [metadata[f"table.{n}"] for n in range(count)]
    assert count > len(METHODS) and all(line.startswith("model.safetensors ") for line in lines)
    with (case.folder / "model.safetensors").open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    rows = content[len(content) - 200 :]
    with zipfile.ZipFile(case.folder / "package.pt2") as archive:
        assert not [name for name in archive.namelist() if rows in archive.read(name)]
    moved = case.folder.with_name("moved")
    shutil.copytree(case.folder, moved)
    (moved / "model.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"has no model.safetensors, which config.json lists"):
        load_program(moved, form="aoti")


@pytest.mark.slow
@needs_compiler
def test_the_client_in_c_answers_the_same_without_python(case, client):
    for batch in batches(case.tables)[1:]:
        inputs = inputs_of(case, batch)
        size, _, bag = inputs["ids"].shape
        numbers = " ".join(str(n) for own in inputs.values() for n in own.flatten().tolist())
        command = [str(client), str(case.folder), str(size), str(bag)]
        done = subprocess.run(command, input=numbers, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        wanted = case.serving(batch.sparse).to_dict()
        assert len(lines) == len(wanted)
        for line, own in zip(lines, wanted.values()):
            found = torch.tensor([float(word) for word in line.split()]).view(own.shape)
            torch.testing.assert_close(found, own, rtol=0, atol=1e-6)
    short = subprocess.run(command, input="1 2", capture_output=True, text=True, check=False)
    assert short.returncode == 1 and short.stderr == "too few numbers came\n"


def test_what_was_compiled_for_something_else_is_refused(tmp_path):
    here = {"torch": torch.__version__.partition("+")[0], "processor": ""}
    check_fits(here, tmp_path)
    with pytest.raises(
        ArtefactError, match=r"compiled for torch 2.9.1, and this is torch .*; export"
    ):
        check_fits({**here, "torch": "2.9.1"}, tmp_path)
    sets = " ".join([*instruction_sets(), "avx9000"])
    with pytest.raises(
        ArtefactError, match=r"for a processor with avx9000, which this one has not"
    ):
        check_fits({**here, "processor": sets}, tmp_path)
    (tmp_path / "package.pt2").write_bytes(b"nothing")
    with pytest.raises(ArtefactError, match=r"package.pt2 is no package of AOTInductor"):
        package_metadata(tmp_path / "package.pt2")


def test_instruction_sets_are_those_that_compilers_use(tmp_path):
    described = tmp_path / "cpuinfo"
    described.write_text(
        "model name\t: some\nflags\t\t: fpu avx avx2 fma hypervisor\nflags\t: sse\n"
    )
    assert instruction_sets(described) == {"avx", "avx2", "fma"}
    assert instruction_sets(tmp_path / "none") == set()


def test_without_a_compiler_the_way_out_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(ArtefactError) as raised:
        forms.check_forms(["aoti"])
    assert str(raised.value) == (
        "a package is compiled: no C++ compiler: /nowhere/c++ is not on the path; install one (Debian: "
        "g++), or set CXX to the one there is. Nothing was written; --format pt2 needs none"
    )


def test_a_compiler_that_fails_is_one_line(tmp_path, monkeypatch):
    made = saved(tmp_path / "a", ("full",))

    def fails(*_, **__):
        raise RuntimeError("C++ compile error\n\nmany lines")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fails)
    monkeypatch.setenv("CXX", sys.executable)
    with pytest.raises(
        ArtefactError, match="could not compile the program: C.. compile error many"
    ):
        write_form("aoti", made.serving, made.folder, made.config, bags=True)
