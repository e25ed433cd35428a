"""Which methods there are: those in the modules of this package, and those that other packages add.

A method of the package is found by being there. One of another package is announced by an entry point
in the group `embcomp.backends`, so that every process knows it, ranks and trials included; or it
is registered in a process that needs nothing else.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import TypeVar

from embcomp.backends.base import BackendConfig
from embcomp.errors import ConfigError, one_line

ENTRY_POINTS = "embcomp.backends"

Method = TypeVar("Method", bound=type[BackendConfig])


def methods_of(package: ModuleType) -> list[type[BackendConfig]]:
    """The methods that a package's modules define, its folders' included, by module and name."""
    found: list[type[BackendConfig]] = []
    modules = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
    for name in sorted(module.name for module in modules):
        defined = vars(import_module(name)).items()
        found += [
            value for _, value in sorted(defined) if is_method(value) and value.__module__ == name
        ]
    return found


def is_method(value: object) -> bool:
    """Whether a value is the class of a method: nothing is missing, and it has a name of its own."""
    return (
        inspect.isclass(value)
        and issubclass(value, BackendConfig)
        and not inspect.isabstract(value)
        and "name" in vars(value)
    )


class Methods(Mapping[str, type[BackendConfig]]):
    """Methods by name, in the order of their names.

    Those of other packages are loaded when methods are first asked for, and not before: their
    modules import embcomp themselves.

    Args:
        methods: those that are there from the beginning.
        group: the entry points that announce more.
    """

    def __init__(
        self, methods: Iterable[type[BackendConfig]] = (), group: str | None = None
    ) -> None:
        self._known: dict[str, type[BackendConfig]] = {}
        self._group = group
        for method in methods:
            self.register(method)

    def __getitem__(self, name: str) -> type[BackendConfig]:
        return self._loaded()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded())

    def __len__(self) -> int:
        return len(self._loaded())

    def __or__(self, other: Mapping[str, type]) -> dict[str, type]:
        return {**self, **other}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self)})"

    def register(self, method: Method) -> Method:
        """Add a method, so that its name is known wherever methods are named in this process.

        Args:
            method: the class of its settings.

        Returns:
            The class, so that this decorates one.

        Raises:
            ConfigError: for what is no method, or one of a name that another has.
        """
        if not is_method(method):
            raise ConfigError(f"{_place(method)} is no method: {_what_is_missing(method)}")
        other = self._known.get(method.name)
        if other is not None and other is not method:
            raise ConfigError(
                f"two methods are called {method.name!r}: {_place(other)} and {_place(method)}; "
                "give one of them another name"
            )
        self._known[method.name] = method
        self._known = {name: self._known[name] for name in sorted(self._known)}
        return method

    def _loaded(self) -> dict[str, type[BackendConfig]]:
        if self._group is not None:
            group, self._group = self._group, None  # what is loaded here may ask for methods
            try:
                for entry in sorted(entry_points(group=group), key=lambda entry: entry.name):
                    self.register(_load(entry))
            except BaseException:
                self._group = group
                raise
        return self._known


def _load(entry: EntryPoint) -> type[BackendConfig]:
    try:
        method: type[BackendConfig] = entry.load()
    except Exception as error:
        package = f"package {entry.dist.name!r}" if entry.dist else "an installed package"
        raise ConfigError(
            f"{package} announces the method {entry.name!r} as {entry.value!r}, which cannot be "
            f"loaded: {type(error).__name__}: {one_line(error)}. Mend or uninstall it"
        ) from error
    return method


def _place(value: object) -> str:
    if inspect.isclass(value):
        return f"{value.__module__}.{value.__qualname__}"
    return repr(value)


def _what_is_missing(value: object) -> str:
    if not inspect.isclass(value) or not issubclass(value, BackendConfig):
        return "expected a subclass of embcomp.BackendConfig"
    if inspect.isabstract(value):
        return f"{', '.join(sorted(value.__abstractmethods__))} must be defined"
    return "it has no `name` of its own, by which a configuration file calls it"
