"""Methods are asked, never recognised: no class of a method is known outside `embcomp.backends`."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module

from embcomp.backends import BACKENDS
from embcomp.backends.base import BackendConfig
from tests.helpers.source_tree import modules

# The plan holds tables full that nothing compresses; the package hands on public names.
MAY_KNOW = {("embcomp.collection.plan", "Full")}
HANDS_ON = {"embcomp"}


def method_classes() -> set[str]:
    """Every class of a method in the backends' modules, those that methods share included."""
    return {
        name
        for module in modules()
        if module.startswith("embcomp.backends.")
        for name, value in vars(import_module(module)).items()
        if inspect.isclass(value)
        and issubclass(value, BackendConfig)
        and value is not BackendConfig
    }


def names_used(tree: ast.Module) -> set[str]:
    """Names that a module imports, reads, or reads of another module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in ("embcomp", "backends"):
                found.add(node.attr)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("embcomp.backends."):
            found.add(node.attr)
    return found


def outside_backends() -> dict[str, ast.Module]:
    return {
        name: tree
        for name, tree in modules().items()
        if name != "embcomp.backends" and not name.startswith("embcomp.backends.")
    }


def test_no_module_outside_the_backends_knows_a_methods_class():
    classes = method_classes()
    assert {"Full", "LowDim", "VectorQuantized", "SearchedSize"} <= classes
    known = {
        (module, name)
        for module, tree in outside_backends().items()
        if module not in HANDS_ON
        for name in names_used(tree) & classes
    }
    assert known == MAY_KNOW


def test_no_method_is_told_by_its_name():
    """`config.name == "full"` would be the same question in other words."""
    found = [
        f"{module}:{node.lineno}"
        for module, tree in outside_backends().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and compares_with_a_method(node)
    ]
    assert found == []


def compares_with_a_method(node: ast.Compare) -> bool:
    sides = [node.left, *node.comparators]
    asks_a_name = any(isinstance(side, ast.Attribute) and side.attr == "name" for side in sides)
    return asks_a_name and any(
        isinstance(side, ast.Constant) and side.value in BACKENDS for side in sides
    )
