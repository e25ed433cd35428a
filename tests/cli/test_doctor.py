"""`embcomp.cli.doctor_checks` sees good sets, broken sets and dead interpreters, and says what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embcomp.cli import app, doctor_checks as doctor
from embcomp.cli.doctor_checks import Finding, check, find_pairing, mend_line, series

GOOD_PROBE = {
    "cuda_driver": False,
    "cores": 2,
    "cuda_devices": [],
    "torch_build": "CPU",
    "threads": 2,
    "gloo": True,
    "nccl": False,
    "import torch": "2.13.0",
    "import fbgemm_gpu": "1.8.0",
    "import torchrec": "1.8.0",
    "look-up": "right rows",
}


def use_probe(monkeypatch, probe):
    monkeypatch.setattr(doctor, "run_probe", lambda: probe)


def use_versions(monkeypatch, **versions):
    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: versions.get(name, real(name)))


def by_name(report):
    return {finding.name: finding for finding in report.findings}


def test_this_environment_works_and_is_a_tested_pairing():
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "a tested set" in result.output
    assert "right rows" in result.output


def test_series_keeps_two_numbers():
    assert series("2.13.0+cpu") == "2.13"
    assert series(None) == ""


def test_known_and_unknown_pairings_are_told_apart():
    tested = find_pairing("2.13.1+cu130", "1.8.0", "1.8.0+cpu")
    assert tested is not None and tested.tested
    known = find_pairing("2.11.0", "1.6.2", "1.6.0")
    assert known is not None and not known.tested
    assert find_pairing("2.13.0", "1.8.0", "1.9.0") is None


def test_both_tested_sets_are_known():
    tested = [pairing for pairing in doctor.PAIRINGS if pairing.tested]
    assert [(p.torch, p.torchrec, p.fbgemm) for p in tested] == [
        ("2.13", "1.8", "1.8"),
        ("2.14", "1.9", "1.9"),
    ]
    assert find_pairing("2.14.1+cu130", "1.9.2", "1.9.0+cpu") is tested[1]


@pytest.mark.parametrize(
    ("versions", "wrong"),
    [
        (
            ("2.13.0", "1.8.0", "1.9.0"),
            ["fbgemm 1.9 belongs to torch 2.14, torch 2.13 takes fbgemm 1.8"],
        ),
        (
            ("2.14.1", "1.9.2", "1.8.0"),
            ["fbgemm 1.8 belongs to torch 2.13, torch 2.14 takes fbgemm 1.9"],
        ),
        (("2.13.0", "1.9.2", "1.8.0"), ["torchrec 1.9 belongs to torch 2.14"]),
        (("2.14.1", "1.8.0", "1.8.0"), ["torchrec 1.8 belongs to", "fbgemm 1.8 belongs to"]),
        (("2.14.1", "2.0.0", "1.9.0"), ["torchrec 2.0 torch 2.14 takes torchrec 1.9"]),
    ],
)
def test_every_wrong_pair_is_named(monkeypatch, versions, wrong):
    torch, torchrec, fbgemm = versions
    use_probe(monkeypatch, GOOD_PROBE)
    use_versions(monkeypatch, torch=torch, torchrec=torchrec)
    monkeypatch.setattr(doctor, "fbgemm_distribution", lambda: ("fbgemm-gpu", fbgemm, "CUDA build"))
    note = by_name(check())["pairing"].note
    assert all(text in note for text in wrong)


def failing_fbgemm(monkeypatch, torch, provider, error="OSError: cannot open shared object"):
    probe = {key: GOOD_PROBE[key] for key in GOOD_PROBE if "import" not in key and key != "look-up"}
    use_probe(monkeypatch, probe | {"import torch": torch, "error": error})
    use_versions(monkeypatch, torch=torch)
    monkeypatch.setattr(doctor, "fbgemm_distribution", lambda: provider)
    return check()


def test_fbgemm_of_another_torch_is_named_where_its_import_fails(monkeypatch):
    provider = ("fbgemm-gpu-cpu", "1.9.0", "CPU build")
    report = failing_fbgemm(monkeypatch, "2.13.0", provider)
    assert not report.works
    assert "torch 2.13 takes fbgemm 1.8" in by_name(report)["import fbgemm_gpu"].note


def test_the_cuda_build_without_a_driver_is_named(monkeypatch):
    report = failing_fbgemm(monkeypatch, "2.14.1", ("fbgemm-gpu", "1.9.0", "CUDA build"))
    assert "NVML (libnvidia-ml.so.1)" in by_name(report)["import fbgemm_gpu"].note
    assert report.mend.endswith("-m pip install -r requirements-cpu-2.14.txt")


@pytest.mark.parametrize(
    ("torch", "set_of"),
    [
        ("2.14.1", ("2.14", "1.9", "1.9")),
        ("2.13.0", ("2.13", "1.8", "1.8")),
        (None, ("2.13", "1.8", "1.8")),
    ],
)
def test_the_mending_line_keeps_the_set_of_the_torch_that_is_there(
    monkeypatch, tmp_path, torch, set_of
):
    use_versions(monkeypatch, torch=torch)
    monkeypatch.setattr(doctor, "checkout_root", lambda: tmp_path)
    broken = [Finding(name="import fbgemm_gpu", value="fails", level="fail")]
    cpu, cuda = (mend_line(broken, {"cuda_driver": driver}) for driver in (False, True))
    assert f'"torch=={set_of[0]}.*" "fbgemm-gpu-cpu=={set_of[2]}.*"' in cpu
    assert cpu.endswith(f'install --no-deps "torchrec=={set_of[1]}.*"')
    assert f'"torch=={set_of[0]}.*"' in cuda and f'"fbgemm-gpu=={set_of[2]}.*"' in cuda


def test_mismatched_set_that_still_imports_is_a_warning(monkeypatch):
    use_probe(monkeypatch, GOOD_PROBE)
    use_versions(monkeypatch, torch="2.13.0", torchrec="1.9.2")
    report = check()
    assert report.works
    assert by_name(report)["pairing"].level == "warn"


def test_import_error_fails_with_the_mending_line(monkeypatch):
    probe = {key: value for key, value in GOOD_PROBE.items() if "torchrec" not in key}
    del probe["import fbgemm_gpu"], probe["look-up"]
    use_probe(monkeypatch, probe | {"error": "OSError: libtorch_cuda.so: cannot open"})
    use_versions(monkeypatch, torch="2.13.0")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "libtorch_cuda.so" in result.output
    assert "-m pip install -r requirements-cpu.txt" in result.output
    assert "Traceback" not in result.output


def test_cuda_machine_gets_the_cuda_line(monkeypatch):
    use_versions(monkeypatch, torch="2.13.0")
    broken = [Finding(name="import fbgemm_gpu", value="fails", level="fail")]
    line = mend_line(broken, {"cuda_driver": True})
    assert '"fbgemm-gpu==1.8.*"' in line and '"torch==2.13.*"' in line
    assert "fbgemm-gpu-cpu==" not in line


def test_a_missing_package_is_mended_by_its_name_alone(monkeypatch):
    use_probe(monkeypatch, GOOD_PROBE)
    use_versions(monkeypatch, polars=None)
    report = check()
    assert not report.works
    assert report.mend.endswith("-m pip install polars")


def test_missing_tensorboard_is_harmless(monkeypatch):
    use_probe(monkeypatch, GOOD_PROBE)
    use_versions(monkeypatch, tensorboard=None)
    report = check()
    assert report.works
    assert "harmless" in by_name(report)["tensorboard"].note


def test_missing_gloo_fails(monkeypatch):
    use_probe(monkeypatch, GOOD_PROBE | {"gloo": False})
    assert by_name(check())["gloo"].level == "fail"


@pytest.mark.parametrize("kind", ["conflict", "stand-in alone", "missing"])
def test_no_single_provider_of_fbgemm_fails(monkeypatch, kind):
    use_probe(monkeypatch, GOOD_PROBE)
    monkeypatch.setattr(doctor, "fbgemm_distribution", lambda: ("fbgemm-gpu", "1.8.0", kind))
    assert by_name(check())["fbgemm_gpu from"].level == "fail"


def test_stand_in_is_recognised_as_such():
    name, version, kind = doctor.fbgemm_distribution()
    if name == "fbgemm-gpu":
        pytest.skip("this environment has the CUDA build")
    assert name == "fbgemm-gpu-cpu" and version
    assert "stand-in" in kind


def test_interpreter_killed_at_import_is_reported(monkeypatch, tmp_path):
    (tmp_path / "doctor_probe.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "doctor.py"))
    assert doctor.run_probe() == {"died": "the interpreter was killed by signal 9"}


def test_doctor_and_help_load_no_heavy_package():
    code = (
        "import sys, embcomp, embcomp.cli.doctor_checks, embcomp.cli\n"
        "heavy = {'torch', 'torchrec', 'fbgemm_gpu', 'polars', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr


def run_with_broken_torch(folder, error, verb):
    for name in ("torch", "torchrec", "fbgemm_gpu"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise {error}('broken on purpose')\n")
    return subprocess.run(
        [sys.executable, "-c", "from embcomp.cli import main; main()", *verb],
        check=False,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(folder), "PATH": str(Path(sys.executable).parent)},
    )


@pytest.mark.parametrize("error", ["OSError", "ImportError"])
def test_other_verbs_point_to_the_doctor_where_torch_is_broken(tmp_path, error):
    child = run_with_broken_torch(tmp_path, error, ["ls", "methods"])
    assert child.returncode == 1
    assert "broken on purpose" in child.stderr and "embcomp doctor" in child.stderr
    assert "Traceback" not in child.stderr


def test_command_answers_where_torch_is_broken(tmp_path):
    child = run_with_broken_torch(tmp_path, "OSError", ["doctor"])
    assert child.returncode == 1
    assert "broken on purpose" in child.stdout
    assert "pip install" in child.stdout
    assert child.stderr == ""
