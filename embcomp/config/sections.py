"""What every part of a YAML file is made of: strict mappings, and choices of an entry by its name."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from typing_extensions import Self, override

from embcomp.errors import ConfigError
from embcomp.io.numeric_settings import MOST, SEEDS, why_no_number
from embcomp.io.yaml_reading import (
    apply_override,
    bind_dataclass,
    config_error,
    describe_errors,
    did_you_mean,
    listed,
    plain,
    read_yaml,
)
from embcomp.tables.budget import why_unreadable

if TYPE_CHECKING:
    from embcomp.backends.base import BackendConfig
    from embcomp.models import ModelConfig

PositiveInt = Annotated[int, Field(gt=0, le=MOST)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]


def readable_bytes(value: Any) -> Any:
    """A number of bytes, or a share, as it is written; an error where it cannot be read."""
    if problem := why_unreadable(value):
        raise config_error(problem)
    return value


Bytes = Annotated[int | str, BeforeValidator(readable_bytes)]


def folder_name(name: str) -> str:
    """A name that becomes a folder; an error where it cannot be one."""
    if name in (".", "..") or any(character in name for character in '/\\:*?"<>|\0'):
        raise config_error(f"the name becomes a folder; {name!r} cannot be one")
    if any(unicodedata.category(character) in _UNPRINTABLE for character in name):
        raise config_error(f"the name becomes a folder; {name!r} holds a control character")
    if name != name.strip() or len(name.encode()) > _LONGEST_NAME:
        raise config_error(
            f"the name becomes a folder; expected at most {_LONGEST_NAME} bytes without spaces "
            f"around them, got {name[:40]!r}"
        )
    return name


_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")
_LONGEST_NAME = 200  # file systems take 255, and names of files beside it begin with it

FolderName = Annotated[str, Field(min_length=1), AfterValidator(folder_name)]


class Section(BaseModel):
    """One mapping of the YAML: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic would take for a number, such as `true`."""
        name = info.field_name or ""
        hint = cls.model_fields[name].annotation
        if isinstance(value, bool | list | tuple | Mapping) and (
            p := why_no_number(name, value, hint)
        ):
            raise config_error(p.partition(": ")[2])
        return value


class YamlConfig(Section):
    """A whole YAML file: read, overridden, checked, and written back."""

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Read and check a file.

        Args:
            path: the YAML file.
            overrides: `key.path=value` strings; a value is parsed as YAML.

        Raises:
            ConfigError: on any problem, with every problem found and the keys that are valid.
        """
        return cls.parse(read_yaml(Path(path)), overrides, source=str(path))

    @classmethod
    def parse(cls, raw: Mapping[str, Any], overrides: Iterable[str], *, source: str) -> Self:
        """Check what is a mapping already; `source` says in errors where it is from."""
        document = plain(raw)
        for change in overrides:
            apply_override(document, change)
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise ConfigError(f"{source}: {describe_errors(error, cls)}") from None

    def to_yaml(self) -> str:
        """The resolved config, defaults included; reading it gives an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class Choice(Section):
    """`{name: qr, num_remainders: 1000}`: a registry's entry and the fields of its dataclass.

    A bare string is short for a mapping with a name only.
    """

    name: str
    settings: Any = Field(repr=False)
    kind: ClassVar[str] = "entry"

    @classmethod
    def registry(cls) -> Mapping[str, type]:
        """The dataclass behind each name."""
        raise NotImplementedError

    @model_validator(mode="before")
    @classmethod
    def _bind(cls, value: Any) -> Any:
        if isinstance(value, cls):
            return {"name": value.name, "settings": value.settings}
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping):
            raise config_error(f"expected a mapping with the key 'name', got {value!r}")
        options = dict(value)
        if set(options) == {"name", "settings"} and dataclasses.is_dataclass(options["settings"]):
            return options
        registry = cls.registry()
        if "name" not in options:
            raise config_error(f"the key 'name' is missing; the {cls.kind}s are {listed(registry)}")
        name = options.pop("name")
        if not isinstance(name, str) or name not in registry:
            hint = did_you_mean(str(name), registry)
            raise config_error(
                f"unknown {cls.kind} {name!r}{hint}; the {cls.kind}s are {listed(registry)}"
            )
        return {"name": name, "settings": bind_dataclass(registry[name], options)}

    @model_serializer
    def _flatten(self) -> dict[str, Any]:
        return {"name": self.name, **plain(dataclasses.asdict(self.settings))}


class MethodConfig(Choice):
    """A compression method of `embcomp.backends`."""

    kind: ClassVar[str] = "method"

    @classmethod
    @override
    def registry(cls) -> Mapping[str, type[BackendConfig]]:
        # Imported on use: reading a YAML should not wait for torch before its first complaint.
        from embcomp.backends import BACKENDS

        return BACKENDS


class ModelChoice(Choice):
    """A model of `embcomp.models`."""

    kind: ClassVar[str] = "model"

    @classmethod
    @override
    def registry(cls) -> Mapping[str, type[ModelConfig]]:
        from embcomp.models import MODELS

        return MODELS
