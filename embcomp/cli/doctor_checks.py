"""Is this installation able to run? Checked without trusting any part of it.

torch, fbgemm_gpu and torchrec come from one build day each; a set that does not belong together
fails at import, or kills the interpreter. So nothing of theirs is imported here: versions are read
from package metadata, and the import itself is tried in a child process (`doctor_probe`).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from embcomp.io.checkout import checkout_root, package_folder
from embcomp.io.compiled_library import cache_folder
from embcomp.serving.fused.library import why_missing
from embcomp.serving.programs.compiler import why_no_compiler

Level = Literal["ok", "warn", "fail"]

PROBE_TIMEOUT_S = 180
RUNTIME = (
    "numpy",
    "polars",
    "pyarrow",
    "pydantic",
    "pyyaml",
    "typer",
    "rich",
    "safetensors",
    "matplotlib",
    "plotly",
    "psutil",
    "optuna",
    "fsspec",
    "cmaes",
)
OPTIONAL = {
    "tensorboard": "training writes no TensorBoard logs; metrics.jsonl has them all",
    "ray": "prepare runs on this machine alone; pip install 'embcomp[ray]'",
    "onnxruntime": "no ONNX programs; pip install 'embcomp[onnx]'",
}


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Versions (their first two numbers) that belong together.

    Attributes:
        requirements: the file of the checkout that installs the CPU builds of a tested set.
    """

    torch: str
    torchrec: str
    fbgemm: str
    tested: bool
    requirements: str = ""


PAIRINGS = (
    Pairing(
        torch="2.13", torchrec="1.8", fbgemm="1.8", tested=True, requirements="requirements-cpu.txt"
    ),
    Pairing(
        torch="2.14",
        torchrec="1.9",
        fbgemm="1.9",
        tested=True,
        requirements="requirements-cpu-2.14.txt",
    ),
    Pairing(torch="2.11", torchrec="1.6", fbgemm="1.6", tested=False),
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report: what was looked at, what was found, and how bad that is."""

    name: str
    value: str
    level: Level = "ok"
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class DoctorReport:
    """All findings, and the pip line that mends the set when something failed."""

    findings: list[Finding] = field(default_factory=list)
    mend: str = ""

    @property
    def works(self) -> bool:
        """Whether nothing failed; warnings are allowed."""
        return all(finding.level != "fail" for finding in self.findings)


def check() -> DoctorReport:
    """Look at the interpreter, the packages, the pairing, the devices and the process groups."""
    probe = run_probe()
    findings = [_python(), _embcomp(), *_set_versions(), _pairing(), _fbgemm_provider()]
    findings += _imports(probe)
    findings += _devices(probe)
    findings += _dependencies()
    findings.append(_compiled_lookup())
    findings.append(_ahead_of_time())
    return DoctorReport(findings=findings, mend=mend_line(findings, probe))


def _compiled_lookup() -> Finding:
    missing = why_missing()
    if missing is None:
        return Finding(name="compiled look-up", value=f"built, in {cache_folder()}")
    note = "artefacts are served all the same, more slowly: " + missing
    return Finding(name="compiled look-up", value="none", level="warn", note=note)


def _ahead_of_time() -> Finding:
    missing = why_no_compiler()
    if missing is None:
        return Finding(name="aoti packages", value="can be compiled")
    note = "harmless but for `embcomp export --format aoti`: " + missing
    return Finding(name="aoti packages", value="none", level="warn", note=note)


def installed(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def series(version: str | None) -> str:
    """The first two numbers of a version: `2.13.0+cpu` is of series `2.13`."""
    match = re.match(r"(\d+\.\d+)", version or "")
    return match.group(1) if match else ""


def find_pairing(torch: str | None, torchrec: str | None, fbgemm: str | None) -> Pairing | None:
    """The known pairing that these versions form, or None."""
    wanted = (series(torch), series(torchrec), series(fbgemm))
    for pairing in PAIRINGS:
        if (pairing.torch, pairing.torchrec, pairing.fbgemm) == wanted:
            return pairing
    return None


def set_for(torch: str | None) -> Pairing:
    """The tested set of the torch that is installed; the first one where there is no such set."""
    tested = [pairing for pairing in PAIRINGS if pairing.tested]
    return next((pairing for pairing in tested if pairing.torch == series(torch)), tested[0])


def wrong_pairs(torch: str | None, torchrec: str | None, fbgemm: str | None) -> str:
    """What does not belong to this torch: `fbgemm 1.9 belongs to torch 2.14, torch 2.13 ...`; or ""."""
    wanted = next((known for known in PAIRINGS if known.torch == series(torch)), None)
    if wanted is None:
        return ""
    found = []
    for name, version, right in (
        ("torchrec", series(torchrec), wanted.torchrec),
        ("fbgemm", series(fbgemm), wanted.fbgemm),
    ):
        if version and version != right:
            owner = next((p.torch for p in PAIRINGS if getattr(p, name) == version), None)
            belongs = f"belongs to torch {owner}, " if owner else ""
            found.append(f"{name} {version} {belongs}torch {wanted.torch} takes {name} {right}")
    return "; ".join(found)


def fbgemm_distribution() -> tuple[str, str | None, str]:
    """Which distribution provides `fbgemm_gpu`: its name, its version and a word on what it is.

    The CUDA build, the CPU build and the metadata-only stand-in share names, so files decide: the
    stand-in owns no file of the import package.
    """
    owners = []
    for name in ("fbgemm-gpu", "fbgemm-gpu-cpu"):
        try:
            files = metadata.distribution(name).files or []
        except metadata.PackageNotFoundError:
            continue
        if any(file.parts[:1] == ("fbgemm_gpu",) for file in files):
            owners.append(name)
    if len(owners) == 2:
        return "fbgemm-gpu and fbgemm-gpu-cpu", installed("fbgemm-gpu"), "conflict"
    if owners == ["fbgemm-gpu"]:
        return "fbgemm-gpu", installed("fbgemm-gpu"), "CUDA build"
    if owners == ["fbgemm-gpu-cpu"]:
        stand_in = installed("fbgemm-gpu")
        kind = "CPU build" + (f", with the fbgemm-gpu {stand_in} stand-in" if stand_in else "")
        return "fbgemm-gpu-cpu", installed("fbgemm-gpu-cpu"), kind
    if installed("fbgemm-gpu"):
        return "fbgemm-gpu", installed("fbgemm-gpu"), "stand-in alone"
    return "none", None, "missing"


def run_probe() -> dict[str, Any]:
    """Try torch, fbgemm_gpu, torchrec and one look-up in a child process; see `doctor_probe`."""
    # As source text, away from here: run as a file, its neighbours would shadow other packages.
    command = [sys.executable, "-c", Path(__file__).with_name("doctor_probe.py").read_text()]
    try:
        child = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
            cwd=sys.prefix,
        )
    except subprocess.TimeoutExpired:
        return {"died": f"no answer within {PROBE_TIMEOUT_S} s"}
    found: dict[str, Any] = {}
    for line in child.stdout.splitlines():
        if line.startswith("{"):
            found.update(json.loads(line))
    if child.returncode < 0:
        found["died"] = f"the interpreter was killed by signal {-child.returncode}"
    elif child.returncode > 0 and "error" not in found:
        last = child.stderr.strip().splitlines()[-1:]
        found["died"] = last[0] if last else f"exit code {child.returncode}"
    return found


def mend_line(findings: list[Finding], probe: dict[str, Any]) -> str:
    """The pip line that mends what failed, for the kind of machine this one is; or ""."""
    failed = {finding.name: finding for finding in findings if finding.level == "fail"}
    if not failed:
        return ""
    if set(failed) == {"packages"}:
        return f"{sys.executable} -m {failed['packages'].note}"
    tested = set_for(installed("torch"))
    pins = f"torch=={tested.torch}.* torchrec=={tested.torchrec}.*"
    python = f"{sys.executable} -m pip"
    clean = f"{python} uninstall -y fbgemm-gpu fbgemm-gpu-cpu"
    if probe.get("cuda_driver"):
        return f'{clean}; {python} install {_quote(pins)} "fbgemm-gpu=={tested.fbgemm}.*"'
    checkout = checkout_root()
    if (checkout / tested.requirements).is_file():
        return f"{clean}; cd {checkout} && {python} install -r {tested.requirements}"
    # Without the checkout there is no stand-in: torchrec must not pull the CUDA build in.
    cpu = f'"torch=={tested.torch}.*" "fbgemm-gpu-cpu=={tested.fbgemm}.*"'
    extra = "tensordict torchmetrics pyre-extensions tqdm"
    return (
        f"{clean}; {python} install {cpu} {extra} && "
        f'{python} install --no-deps "torchrec=={tested.torchrec}.*"'
    )


def _quote(pins: str) -> str:
    return " ".join(f'"{pin}"' for pin in pins.split())


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding(name="python", value=f"{version} ({sys.executable})")


def _embcomp() -> Finding:
    version = installed("embcomp")
    where = str(package_folder())
    if version is None:
        note = "run from a checkout that is not installed: pip install -e ."
        return Finding(name="embcomp", value=where, level="warn", note=note)
    return Finding(name="embcomp", value=f"{version} ({where})")


def _set_versions() -> Iterator[Finding]:
    for name in ("torch", "torchrec"):
        version = installed(name)
        yield Finding(name=name, value=version or "missing", level="ok" if version else "fail")


def _pairing() -> Finding:
    torch, torchrec = installed("torch"), installed("torchrec")
    fbgemm = fbgemm_distribution()[1]
    value = f"torch {torch} + torchrec {torchrec} + fbgemm {fbgemm}"
    pairing = find_pairing(torch, torchrec, fbgemm)
    if pairing is None:
        known = "; ".join(f"{p.torch} + {p.torchrec} + {p.fbgemm}" for p in PAIRINGS)
        wrong = wrong_pairs(torch, torchrec, fbgemm)
        note = f"not a known set (torch + torchrec + fbgemm: {known})"
        note = f"{wrong}: {note}" if wrong else note
        return Finding(name="pairing", value=value, level="warn", note=note)
    if not pairing.tested:
        note = "these versions belong together, but embcomp's tests run on another set"
        return Finding(name="pairing", value=value, level="warn", note=note)
    return Finding(name="pairing", value=value, note="a tested set")


def _fbgemm_provider() -> Finding:
    name, version, kind = fbgemm_distribution()
    bad = {
        "conflict": "both builds own the same files (torchrec requires fbgemm-gpu, the CUDA build, and "
        "pip put it over the CPU build): uninstall both, then install one",
        "stand-in alone": "the stand-in has no code: install fbgemm-gpu-cpu too",
        "missing": "nothing provides the module fbgemm_gpu",
    }
    value = f"{name} {version or ''}".strip()
    if kind in bad:
        return Finding(name="fbgemm_gpu from", value=value, level="fail", note=bad[kind])
    return Finding(name="fbgemm_gpu from", value=value, note=kind)


def _imports(probe: dict[str, Any]) -> Iterator[Finding]:
    for step in ("import torch", "import fbgemm_gpu", "import torchrec", "look-up"):
        if step in probe:
            yield Finding(name=step, value=probe[step])
            continue
        why = str(probe.get("error") or probe.get("died") or "no answer")
        if step == "import fbgemm_gpu":
            why += _why_fbgemm_fails(probe)
        yield Finding(name=step, value="fails", level="fail", note=why)
        return


def _why_fbgemm_fails(probe: dict[str, Any]) -> str:
    """What is known about the set beside the library's own words, which name neither."""
    _, version, kind = fbgemm_distribution()
    reasons = []
    if wrong := wrong_pairs(installed("torch"), None, version):
        reasons.append(wrong)
    if kind == "CUDA build" and not probe.get("cuda_driver"):
        reasons.append(
            "the CUDA build of fbgemm-gpu does not import without the driver's NVML "
            "(libnvidia-ml.so.1), and no driver was found: this machine takes fbgemm-gpu-cpu"
        )
    return "".join(f"; {reason}" for reason in reasons)


def _devices(probe: dict[str, Any]) -> Iterator[Finding]:
    if "import torch" not in probe:
        return
    cores = f"cpu ({probe['cores']} cores, {probe['threads']} threads)"
    yield Finding(name="devices", value=", ".join([cores, *probe["cuda_devices"]]))
    if probe["cuda_driver"] and not probe["cuda_devices"]:
        note = f"a driver is here, but torch is the {probe['torch_build']} build"
        yield Finding(name="cuda", value="not usable", level="warn", note=note)
    if not probe["gloo"]:
        note = "training needs a process group even on one process"
        yield Finding(name="gloo", value="missing", level="fail", note=note)
    else:
        yield Finding(name="gloo", value="available")
    if not probe["nccl"]:
        needed = bool(probe["cuda_devices"])
        note = "several GPUs cannot train together" if needed else "only GPUs need it"
        yield Finding(name="nccl", value="missing", level="warn" if needed else "ok", note=note)
    else:
        yield Finding(name="nccl", value="available")


def _dependencies() -> Iterator[Finding]:
    missing = [name for name in RUNTIME if installed(name) is None]
    if missing:
        note = f"pip install {' '.join(missing)}"
        yield Finding(name="packages", value=f"missing: {missing}", level="fail", note=note)
    else:
        found = ", ".join(f"{name} {installed(name)}" for name in RUNTIME)
        yield Finding(name="packages", value=found)
    for name, loss in OPTIONAL.items():
        version = installed(name)
        if version is None:
            yield Finding(name=name, value="missing", level="warn", note=f"harmless: {loss}")
        else:
            yield Finding(name=name, value=version)
