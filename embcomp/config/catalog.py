"""What there is to choose from: recipes, methods, models, prepared datasets and raw formats."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import yaml

from embcomp.errors import ConfigError
from embcomp.io.checkout import checkout_root
from embcomp.io.yaml_reading import did_you_mean, listed, plain, read_yaml

if TYPE_CHECKING:
    from embcomp.backends.stages import Stage

Kind = Literal["recipes", "methods", "models", "datasets", "formats"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing that can be named.

    Args:
        name: what to type.
        summary: one line.
        path: its file or folder, when it has one.
    """

    name: str
    summary: str
    path: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One field of a method's or model's configuration."""

    name: str
    type: str
    default: str
    doc: str


def list_entries(kind: Kind, *, data: Path = Path("data")) -> list[Entry]:
    """Everything of a kind, by name.

    Args:
        kind: what to list.
        data: folder in which prepared datasets are looked for.
    """
    listers: dict[Kind, Callable[[], list[Entry]]] = {
        "recipes": _recipes,
        "methods": lambda: _classes(method_classes()),
        "models": lambda: _classes(model_classes()),
        "datasets": lambda: _datasets(data),
        "formats": _formats,
    }
    return sorted(listers[kind](), key=lambda entry: entry.name)


def method_classes() -> Mapping[str, type]:
    """The settings class of each method."""
    from embcomp.backends import BACKENDS

    return BACKENDS


def model_classes() -> Mapping[str, type]:
    """The settings class of each model."""
    from embcomp.models import MODELS

    return MODELS


def recipe_folder() -> Path | None:
    """`configs/` here, else that of the checkout that this package was imported from.

    Recipes belong to a checkout; an installed wheel has none.
    """
    checkout = checkout_root()
    for folder in (Path("configs"), checkout / "configs"):
        if any(folder.glob("*.yaml")):
            return folder
    return None


def find_recipe(name: str) -> Path:
    """The file of a recipe, by its name or path.

    Raises:
        ConfigError: when there is none, with the nearest name.
    """
    if Path(name).is_file():
        return Path(name)
    recipes = {entry.name: entry.path for entry in _recipes()}
    path = recipes.get(name.removesuffix(".yaml"))
    if path is None:
        hint = did_you_mean(name, recipes)
        have = f"the recipes are {listed(sorted(recipes))}" if recipes else _NO_RECIPES
        raise ConfigError(f"no recipe {name!r}{hint}; {have}")
    return path


def recipe_document(name: str, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """A recipe as a mapping, with nested overrides over it, and its file.

    Args:
        name: its name or path.
        overrides: keys that are other, nested as in its YAML.

    Raises:
        ConfigError: when there is none, or its YAML cannot be read.
    """
    path = find_recipe(name)
    document = read_yaml(path)
    put_over(document, plain(overrides))
    return document, path


def put_over(document: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Put nested overrides over a document; a mapping that names a choice replaces it whole."""
    for key, value in overrides.items():
        old = document.get(key)
        if isinstance(old, str) and isinstance(value, dict) and "name" not in value:
            old = {"name": old}  # the short form of a choice
        if isinstance(old, dict) and isinstance(value, dict) and "name" not in value:
            document[key] = dict(old)
            put_over(document[key], value)
        else:
            document[key] = value


def copy_recipe(name: str, destination: str | Path) -> Path:
    """Copy a recipe to a file, or into a folder under its own name; never over a file.

    A copy to another file name gets that name as its run's name too, so that its runs do not land
    in the original's folder.
    """
    source, target = find_recipe(name), Path(destination)
    if target.is_dir() or str(destination).endswith("/"):
        target = target / source.name
    if target.exists():
        raise ConfigError(f"{target} exists already; choose another name or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    if target.stem != source.stem:
        text = target.read_text(encoding="utf-8")
        target.write_text(re.sub(r"(?m)^name: .*$", f"name: {target.stem}", text, count=1))
    return target


def settings_of(cls: type) -> list[Setting]:
    """The fields of a settings class, with what its docstring (or a base's) says of each.

    A model's settings are described where they are used: by the network of the same name.
    """
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        neighbours = vars(inspect.getmodule(base))
        network = neighbours.get(base.__name__.removesuffix("Config"), base)
        docs |= _documented(network.__doc__ or "") | _documented(base.__doc__ or "")
    return [
        Setting(
            name=field.name,
            type=str(field.type),
            default=_default(field),
            doc=docs.get(field.name, ""),
        )
        for field in dataclasses.fields(cls)
        if field.init
    ]


def _default(field: dataclasses.Field[object]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("...\n").strip()


def _documented(docstring: str) -> dict[str, str]:
    """Name to text of an `Args:` or `Attributes:` section."""
    lines = inspect.cleandoc(docstring).splitlines()
    heads = [i for i, line in enumerate(lines) if line in ("Args:", "Attributes:")]
    if not heads:
        return {}
    found: dict[str, str] = {}
    name = ""
    for line in lines[heads[0] + 1 :]:
        if line and not line.startswith(" "):
            break
        start = re.match(r" {4}(\w+): (.*)", line)
        if start:
            name, found[start[1]] = start[1], start[2]
        elif name and line.strip():
            found[name] += " " + line.strip()
    return found


def _summary(cls: type) -> str:
    """The first line that says what it is: of the module, as settings classes only list fields."""
    module = inspect.getmodule(cls)
    text = (module.__doc__ if module else None) or cls.__doc__ or ""
    return text.strip().splitlines()[0]


def _classes(classes: Mapping[str, type]) -> list[Entry]:
    return [Entry(name=name, summary=_summary(cls)) for name, cls in classes.items()]


_NO_RECIPES = "recipes belong to a checkout, and there is no configs/ folder here"


def _recipes() -> list[Entry]:
    folder = recipe_folder()
    paths: Sequence[Path] = sorted(folder.glob("*.yaml")) if folder else []
    return [Entry(name=path.stem, summary=_head_comment(path), path=path) for path in paths]


def _head_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _datasets(data: Path) -> list[Entry]:
    from embcomp.data_pipelines.schema import FILE_NAME, DatasetInfo
    from embcomp.errors import DataError

    entries = []
    for path in sorted(data.glob(f"*/{FILE_NAME}")):
        try:
            info = DatasetInfo.load(path.parent)
        except DataError as error:
            summary = f"unreadable: {error}"
        else:
            rows = sum(split.rows for split in info.splits.values())
            ids = sum(feature.num_embeddings for feature in info.categorical)
            summary = (
                f"{rows:,} rows, {len(info.numeric)} numeric and {len(info.categorical)} "
                f"categorical features, {ids:,} ids"
            )
        entries.append(Entry(name=path.parent.name, summary=summary, path=path.parent))
    return entries


def _formats() -> list[Entry]:
    from embcomp.data_pipelines.importers.registry import IMPORTERS

    return [Entry(name=name, summary=kind.title) for name, kind in IMPORTERS.items()]


def stage_facts(stage: Stage) -> tuple[str, str, str, str, str]:
    """A stage for people: its name, purpose, epochs, what learns, and on which rows of data."""
    if stage.kind == "search":
        return stage.name, stage.purpose, "", "nothing", "search-validation"
    parts = (("rows", stage.rows), ("network", stage.network), ("structure", stage.structure))
    rows = "train, search-validation held out" if stage.holds_out else "train"
    if stage.alternate:
        rows += "; structure on search-validation"
    return (
        stage.name,
        stage.purpose,
        "train.epochs" if stage.epochs is None else str(stage.epochs),
        ", ".join(name for name, learns in parts if learns),
        rows,
    )
