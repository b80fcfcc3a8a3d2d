"""One typed configuration, read from TOML and `section.key=value` overrides, checked as a whole.

Each folder owns the dataclasses of its own things; this file only composes them. Every problem is found
before any is reported, each with where it stands, what is wrong and the nearest thing that works. No torch
here: the command line answers in milliseconds.
"""

import difflib
import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from datetime import date, time
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter

from ..faulttol.config import SnapshotConfig
from ..kernels.config import KernelsConfig
from ..models.llama_config import LlamaConfig
from ..parallel.layout import ParallelConfig
from .data.config import DataConfig
from .optim.config import OptimConfig
from .sections import BatchConfig, CheckpointConfig, PrecisionConfig, RunSection


class ConfigError(ValueError):
    """The user's configuration cannot be; the message lists every problem, one a line."""


@dataclass(frozen=True, kw_only=True)
class CustomModel:
    """Section `[model]` of a user's own: `family` names the factory, every other key is passed to it."""

    family: str
    fields: dict[str, Any] = field(default_factory=dict)

    def problems(self) -> list[tuple[str, str]]:
        """A factory is named `package.module:factory`."""
        module, _, factory = self.family.partition(":")
        if not (all(part.isidentifier() for part in module.split(".")) and factory.isidentifier()):
            return [("family", f'is "{self.family}"; write package.module:factory, as in "my_model:build"')]
        return []


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run needs to know; equal configurations are equal runs."""

    run: RunSection = field(default_factory=RunSection)
    model: LlamaConfig | CustomModel = field(default_factory=LlamaConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    snapshot: SnapshotConfig = field(default_factory=SnapshotConfig)

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.run.dir) if self.run.dir else Path("runs") / self.run.name

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain nested values: what `config.toml` holds. Keys that stand for "not given" are left out."""
        sections = {name: asdict(getattr(self, name)) for name in SECTIONS}
        if isinstance(self.model, CustomModel):
            sections["model"] = {"family": self.model.family, **self.model.fields}
        return {
            name: {k: v for k, v in section.items() if v is not None} for name, section in sections.items()
        }


SHORT = {"kernels": "default"}  # sections that may be one value: `kernels = "reference"`

SECTIONS: dict[str, type] = {
    "run": RunSection,
    "model": LlamaConfig,
    "data": DataConfig,
    "batch": BatchConfig,
    "optim": OptimConfig,
    "precision": PrecisionConfig,
    "parallel": ParallelConfig,
    "kernels": KernelsConfig,
    "checkpoint": CheckpointConfig,
    "snapshot": SnapshotConfig,
}


@dataclass(frozen=True)
class Key:
    """One documented configuration key."""

    section: str
    name: str
    type: str
    default: Any
    unit: str
    doc: str


def documented_keys() -> list[Key]:
    """Every key with its type, default, unit and sentence, from the dataclasses themselves."""
    keys = []
    for section, cls in SECTIONS.items():
        for f in fields(cls):
            hint = _hints(cls)[f.name]
            doc, unit = (*hint.__metadata__, "")[:2]
            keys.append(Key(section, f.name, type_name(hint.__origin__), f.default, unit, doc))
    return keys


@dataclass(frozen=True)
class Settings:
    """What was read: a configuration, where each key stands, and every problem found so far.

    A key with a problem has its default in `config`, so that what depends on the others can be checked too.
    """

    config: RunConfig
    source: Mapping[str, str]
    problems: tuple[str, ...]

    def say(self, key: str, message: str) -> str:
        """A problem of `section.key`, behind the file or command line it comes from."""
        section = key.partition(".")[0]
        origin = self.source.get(key, self.source.get(section, "configuration"))
        return f"{origin}: {key}: {message}"


def read_config(path: Path | None, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a TOML file (or none), put `section.key=value` overrides over it, check everything.

    Raises `ConfigError` with every problem found.
    """
    return _whole(read_settings(path, overrides))


def check_config(values: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """Build a `RunConfig` from plain values; raises `ConfigError` with every problem in them."""
    return _whole(_build(values, source={}, problems=[]))


def read_settings(path: Path | None, overrides: Iterable[str] = ()) -> Settings:
    """As `read_config`, but problems are returned. Raises `ConfigError` when `path` cannot be read at all."""
    values: dict[str, dict[str, Any]] = {}
    source: dict[str, str] = {}
    problems: list[str] = []
    if path is not None:
        for section, keys in _read_toml(path).items():
            if not isinstance(keys, Mapping) and section in SHORT:
                keys = {SHORT[section]: keys}
            if not isinstance(keys, Mapping):
                problems.append(
                    f"{path}: {section}: stands outside any section; move it under {_owners(section)}"
                )
                continue
            values.setdefault(section, {}).update(keys)
            source.update({f"{section}.{key}": str(path) for key in keys})
            source[section] = str(path)
    for text in overrides:
        if problem := _apply_override(text, values, source):
            problems.append(f"command line: {problem}")
    return _build(values, source=source, problems=problems)


def _whole(settings: Settings) -> RunConfig:
    if settings.problems:
        raise ConfigError("\n".join(settings.problems))
    return settings.config


def _build(
    values: Mapping[str, Mapping[str, Any]], *, source: Mapping[str, str], problems: list[str]
) -> Settings:
    built: dict[str, Any] = {}
    wrong: list[tuple[str, str]] = []
    unknown = []
    for section, keys in values.items():
        if section in SECTIONS:
            built[section], found = _build_section(section, keys)
            wrong += [(f"{section}.{key}", message) for key, message in found]
        else:
            near = difflib.get_close_matches(section, SECTIONS, n=1, cutoff=0.0)[0]
            origin = source.get(section, "configuration")
            unknown.append(f"{origin}: [{section}]: no such section; nearest: [{near}]")
    settings = Settings(RunConfig(**built), source, ())
    said = [settings.say(key, message) for key, message in wrong]
    return replace(settings, problems=(*problems, *unknown, *said))


def _build_section(section: str, keys: Mapping[str, Any]) -> tuple[Any, list[tuple[str, str]]]:
    family = keys.get("family", "llama")
    if section == "model" and isinstance(family, str) and family != "llama":
        custom = CustomModel(family=family, fields={k: v for k, v in keys.items() if k != "family"})
        return custom, [(key, m if ":" in family else f'{m} (or "llama")') for key, m in custom.problems()]
    cls = SECTIONS[section]
    hints = _hints(cls)
    good, wrong = {}, []
    for key, value in keys.items():
        if key not in hints:
            wrong.append((key, f"unknown key; {_nearest(key, section)}"))
            continue
        try:
            # strict JSON rules: no text for a number, but 1 for 1.0 and a list for a pair
            good[key] = _adapter(hints[key]).validate_json(json.dumps(value, allow_nan=False), strict=True)
        except (ValueError, TypeError):  # pydantic's ValidationError, and json's for infinities and dates
            wrong.append((key, _type_problem(value, hints[key].__origin__)))
    made = cls(**good)
    given = {key for key, _ in wrong}
    impossible = [(key, message) for key, message in made.problems() if key not in given]
    possible = {key: value for key, value in good.items() if key not in dict(impossible)}
    return cls(**possible), wrong + impossible


def _type_problem(value: Any, hint: Any) -> str:
    message = f"is {json.dumps(value, default=str)}; expected {type_name(hint)}"
    choices = [arg for arg in get_args(hint) if isinstance(arg, str)]
    if isinstance(value, str) and choices:
        message += f'; nearest: "{difflib.get_close_matches(value, choices, n=1, cutoff=0.0)[0]}"'
    elif isinstance(value, str) and type_name(hint) in ("int", "float", "bool"):
        message += ", without quotes"
    return message


def _nearest(key: str, section: str) -> str:
    """The most similar key of this section, or the same key where another section has it."""
    names = list(_hints(SECTIONS[section]))
    if near := difflib.get_close_matches(key, names, n=1, cutoff=0.6):
        return f"nearest: {section}.{near[0]}"
    if owners := [s for s, cls in SECTIONS.items() if key in _hints(cls)]:
        return f"nearest: {owners[0]}.{key}"
    return f"nearest: {section}.{difflib.get_close_matches(key, names, n=1, cutoff=0.0)[0]}"


def _owners(key: str) -> str:
    owners = [f"[{s}]" for s, cls in SECTIONS.items() if key in _hints(cls)]
    return " or ".join(owners) or "a section"


def _apply_override(text: str, values: dict[str, dict[str, Any]], source: dict[str, str]) -> str | None:
    """Put one `section.key=value` into `values`; returns what is wrong with it, if anything."""
    path, equals, raw = text.partition("=")
    path = path.strip()
    section, dot, key = f"{path}.{SHORT[path]}".partition(".") if path in SHORT else path.partition(".")
    if not (equals and dot and key):
        return f'"{text}": an override reads section.key=value, as in optim.lr=1e-3'
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()  # a bare word is a string: run.name=first
    values.setdefault(section, {})[key] = value
    source[f"{section}.{key}"] = "command line"
    source.setdefault(section, "command line")
    return None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.toml")], n=1, cutoff=0.0
        )
        hint = f"; nearest: {path.parent / near[0]}" if near else ""
        raise ConfigError(f"{path}: no such file{hint}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as TOML: {error}") from None


def write_toml(config: RunConfig) -> str:
    """The whole configuration as TOML that `read_config` reads back to an equal one."""
    lines = []
    for section, keys in config.to_dict().items():
        lines += [
            f"[{section}]",
            *(f"{_toml_key(key)} = {_toml_value(value)}" for key, value in keys.items()),
            "",
        ]
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return (
            "{ " + ", ".join(f"{_toml_key(key)} = {_toml_value(item)}" for key, item in value.items()) + " }"
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    # other JSON scalars are TOML's, but for surrogate pairs and a bare DEL
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def type_name(hint: Any) -> str:
    """A type as a reader of the documentation would write it."""
    if hint is type(None):
        return ""
    if hint is Ellipsis:
        return "..."
    origin, args = get_origin(hint), get_args(hint)
    if origin is Union or str(origin) == "<class 'types.UnionType'>":
        return " | ".join(name for name in map(type_name, args) if name)
    if str(origin) == "typing.Literal":
        return " | ".join(json.dumps(arg) for arg in args)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(type_name, args))}]"
    return {"str": "text"}.get(hint.__name__, hint.__name__)


@cache
def _hints(cls: type) -> dict[str, Any]:
    assert is_dataclass(cls), f"{cls} is no configuration section"
    return get_type_hints(cls, include_extras=True)


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint)
