"""What must answer without torch imports without it: it takes seconds, and may be broken.

The command's help, `doctor`, `ls`, the check of a YAML, `generate`, `prepare` and the first moments of
a trial process are among it. One child process imports them all, with torch barred.
"""

from __future__ import annotations

import json
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

LIGHT = (
    "embcomp",
    "embcomp.io.atomic_files",
    "embcomp.tables.budget",
    "embcomp.config.catalog",
    "embcomp.cli",
    "embcomp.cli.*",
    "embcomp.config.train_config",
    "embcomp.config",
    "embcomp.config.sections",
    "embcomp.io*",
    "embcomp.tables",
    "embcomp.planning",
    "embcomp.collection",
    "embcomp.serving",
    "embcomp.search.attempts",
    "embcomp.search.config",
    "embcomp.search.evaluators",
    "embcomp.search.reporting",
    "embcomp.search.samplers",
    "embcomp.search.space",
    "embcomp.search.trials",
    "embcomp.data_pipelines",
    "embcomp.data_pipelines.*",
    "embcomp.cli.doctor_checks",
    "embcomp.cli.doctor_probe",
    "embcomp.errors",
    "embcomp.search",
    "embcomp.search.config.choices",
    "embcomp.search.config.search_config",
    "embcomp.search.evaluators.dataset_view",
    "embcomp.search.evaluators.base",
    "embcomp.search.samplers.bounded_tpe",
    "embcomp.search.reporting.importance",
    "embcomp.search.trials.trial_queue",
    "embcomp.search.trials.trial_progress",
    "embcomp.search.evaluators.trial_pruning",
    "embcomp.search.trials.worker",
    "embcomp.search.config.search_sections",
    "embcomp.search.trials.storage",
    "embcomp.search.evaluators.trial_process",
)
"""Modules, a star standing for all that begins so."""

HEAVY = (
    "embcomp.cli.__main__",
    "embcomp.io.large_pages",
    "embcomp.io.tensor_checksums",
    "embcomp.io.tensor_files",
    "embcomp.io.tensor_writing",
    "embcomp.cli.demo_steps",
    "embcomp.data_pipelines.loader.batch",
    "embcomp.data_pipelines.loader.parquet_loader",
    "embcomp.data_pipelines.loader.shuffle_buffer",
)
"""Exceptions from it: they make tensors, train, or run the command."""

LEAST = 79
"""How many modules there are in it: one that leaves the table says so here."""

CHILD = """
import json, sys
from importlib import import_module
from importlib.machinery import ModuleSpec

class Bar:
    # A finder that finds: libraries that only ask whether torch is there must hear that it is.
    def find_spec(self, name, path=None, target=None):
        barred = name.partition(".")[0] in ("torch", "torchrec", "fbgemm_gpu")
        return ModuleSpec(name, self) if barred else None

    def create_module(self, spec):
        raise ImportError(f"{spec.name} is barred")

    def exec_module(self, module):
        raise ImportError

sys.meta_path.insert(0, Bar())
failed = {}
for name in json.load(sys.stdin):
    try:
        import_module(name)
    except ImportError as error:
        failed[name] = str(error)
json.dump(failed, sys.stdout)
"""


def modules() -> list[str]:
    """Every module of the checkout under its installed name, with or without symlinks."""
    found = set()
    for top in ("embcomp", "models", "data_pipelines", "search"):
        for file in (ROOT / top).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            parts = parts if top == "embcomp" else ("embcomp", *parts)
            found.add(".".join(parts).removesuffix(".__init__"))
    return sorted(found)


def test_light_modules_import_without_torch():
    known = modules()
    unused = [p for p in (*LIGHT, *HEAVY) if not any(fnmatchcase(name, p) for name in known)]
    assert not unused, f"no module is called {unused}"
    light = [
        name
        for name in known
        if any(fnmatchcase(name, pattern) for pattern in LIGHT)
        and not any(fnmatchcase(name, pattern) for pattern in HEAVY)
    ]
    assert len(light) >= LEAST
    names = json.dumps(["embcomp.models", *light])
    command = [sys.executable, "-c", CHILD]
    done = subprocess.run(
        command, cwd=ROOT, check=False, input=names, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    failed = json.loads(done.stdout)
    assert "barred" in failed.pop("embcomp.models"), "the bar bars nothing"
    assert not failed, "\n".join(f"{name}: {error}" for name, error in failed.items())
