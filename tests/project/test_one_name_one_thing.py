"""A public class has one meaning, and a file one name, throughout the product."""

from __future__ import annotations

import ast
from collections import defaultdict

from tests.helpers.source_tree import is_package, modules

# File names that may stand twice, each with the reason.
SHARED_FILE_NAMES = {
    "base": "the interface of its folder: methods, models, importers, samplers, evaluators",
    "api": "what the command line calls: training, search, benchmark",
}
VERBS = "embcomp.cli."  # a verb's file is called as the verb, beside the module that does its work


def test_no_two_public_classes_have_one_name():
    homes = defaultdict(list)
    for module, tree in modules().items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(module)
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_no_two_files_have_one_name():
    homes = defaultdict(list)
    for module in modules():
        if not is_package(module) and not module.startswith(VERBS):
            homes[module.rpartition(".")[2]].append(module)
    twice = {name: found for name, found in homes.items() if len(found) > 1}
    assert {name: found for name, found in twice.items() if name not in SHARED_FILE_NAMES} == {}
    assert set(twice) == set(SHARED_FILE_NAMES)  # no exception outlives its reason


def test_the_top_of_the_package_stays_small():
    top = {name.split(".")[1] for name in modules() if name.count(".")}
    assert len(top) + len(["__init__", "py.typed"]) <= 20
