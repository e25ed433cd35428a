"""Dependencies point one way: between the rooms of the house, inside them, and between modules."""

from __future__ import annotations

import re

import pytest

from tests.helpers.source_tree import ROOT, imports_of, is_package, modules

# Left to right: a name imports what stands in groups before its own, and nothing beside itself in
# its group. A name stands for a module or a folder; docs/architecture.md shows the same lines.
ORDER = {
    "embcomp": "errors < io < tables, data_pipelines, models < layers < backends < collection, tools"
    " < config, serving, testing < planning < training < compressing, search < benchmark < cli",
    "embcomp.backends": "stages < base < discovery, full, hashed_rows, row_type_choice, pruned_directory"
    " < followed_pruning < hash, qr, unified, blocks, low_dim, mde, tt"
    " < cafe, codebooks, dhe, double_hash, integer_rows, mapped, mlet, private_ids, robe, sparse, typed_blocks"
    " < adapt, cce, dedup, pruned_elements, widths < autodim, dnis, element_pruning < deeplight, pep",
    "embcomp.training": "distributed < optim, files, loop_state < build < checkpoint, run_folder,"
    " served_rows < reporting < data, steps < second_order < stages < loop < run < api, export",
    "embcomp.search": "config < space, liveness < attempts < samplers, evaluators < trials"
    " < prepared, reporting < search_run < api",
    "embcomp.benchmark": "benchmark_config, significance < cells < planned_runs"
    " < tuning, training_jobs, seed_halving, ledger"
    " < final_scores, benchmark_result, benchmark_progress < benchmark_run, benchmark_page"
    " < benchmark_picture < api",
    "embcomp.data_pipelines": "description, splits < schema < integrity"
    " < numbering, tabulated < transforms, frequencies, bayes_metrics, sample_weights"
    " < importers, loader < preparing"
    " < prepare, followed_values < synthetic, validate",
}


def ranks(order: str) -> dict[str, int]:
    groups = [re.split(r",\s*", group.strip()) for group in order.split("<")]
    return {name: place for place, group in enumerate(groups) for name in group}


def child(package: str, module: str) -> str | None:
    """The name right below `package` that `module` belongs to."""
    if not module.startswith(package + "."):
        return None
    return module[len(package) + 1 :].split(".")[0]


@pytest.mark.parametrize("package", ORDER)
def test_every_name_of_a_room_has_a_place_in_its_order(package):
    names = {child(package, module) for module in modules()} - {None}
    assert names == set(ranks(ORDER[package]))


@pytest.mark.parametrize("package", ORDER)
def test_no_import_goes_up_or_sideways(package):
    place = ranks(ORDER[package])
    wrong = []
    for module in modules():
        name = child(package, module)
        if name is None:
            continue
        for target in imports_of(module):
            other = child(package, target)
            if other in place and other != name and place[other] >= place[name]:
                wrong.append(f"{module} -> {target}")
    assert wrong == []


def test_no_two_modules_import_each_other():
    """No circle of any length, type-only imports included. A package hands on its own names only."""
    edges = {
        module: imports_of(module) & set(modules())
        for module in modules()
        if not is_package(module)
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done or module not in edges:
            return
        for target in sorted(edges[module]):
            visit(target, (*path, module))
        done.add(module)

    for module in sorted(edges):
        visit(module, ())


def test_the_order_stands_in_the_documentation():
    text = re.sub(r"\s+", " ", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    missing = [order for order in ORDER.values() if re.sub(r"\s+", " ", order) not in text]
    assert missing == []
