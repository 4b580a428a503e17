"""Settings that refuse what they do not know.

A `Settings` class is a pydantic model: frozen, strict about types (an integer where a float is wanted is fine, a
string is not) and closed (an unknown key is an error that names the nearest known one). A TOML file plus dotted
overrides (`optim.lr=3e-4`) become one by `parse`; every complaint is a single `UsageError` line that names the key,
the value and the remedy.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from trine.engine.errors import UsageError

_UNITS = {"": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class Settings(BaseModel):
    """Base of all settings: frozen, strict, closed. `Path` fields may be given as strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


SettingsT = TypeVar("SettingsT", bound=Settings)


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file. Raises `UsageError` if it is missing, unreadable or not TOML."""
    if path.is_dir():
        inside = path / "recipe.toml"
        wanted = inside if inside.is_file() else "the path of a TOML file"
        raise UsageError(f"{path} is a folder and no recipe; give {wanted}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # programs of Windows put a byte-order mark first
    except FileNotFoundError:
        raise UsageError(f"no recipe at {path}; give the path of a TOML file") from None
    except OSError as error:
        raise UsageError(f"cannot read the recipe {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"the recipe {path} is not UTF-8 ({error.reason}); convert it") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split `a.b=value` into its key path and value.

    The value is read as TOML where it is valid TOML (`1e-3`, `true`, `[1, 2]`, `"x"`) and as a plain string otherwise.
    `True` and `False` are accepted for booleans too.
    """
    key, separator, raw = text.partition("=")
    path = key.strip().split(".")
    if not separator or not all(path):
        raise UsageError(f"override {text!r} is not of the form section.key=value")
    raw = raw.strip()
    if raw in ("True", "False"):
        raw = raw.lower()
    try:
        value = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw
    return path, value


def apply_overrides(table: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `table` with each `section.key=value` set; a number in a key path indexes a list."""
    result: dict[str, Any] = _copy(table)
    for text in overrides:
        path, value = parse_override(text)
        node: Any = result
        for depth, part in enumerate(path):
            last = depth == len(path) - 1
            if isinstance(node, list):
                if not part.isdigit() or int(part) >= len(node):
                    where = ".".join(path[:depth])
                    raise UsageError(f"override {text!r}: {where} is a list of {len(node)}, {part!r} is no index of it")
                if last:
                    node[int(part)] = value
                else:
                    node = node[int(part)]
            elif isinstance(node, dict):
                if last:
                    node[part] = value
                else:
                    node = node.setdefault(part, {})
            else:
                raise UsageError(f"override {text!r}: {'.'.join(path[:depth])} is a single value, not a section")
    return result


def parse(settings: type[SettingsT], table: dict[str, Any], *, origin: str) -> SettingsT:
    """Validate `table` as `settings`; raises one `UsageError` naming `origin`, the key and the remedy."""
    try:
        return settings.model_validate(table)
    except ValidationError as error:
        complaints = "; ".join(_describe(settings, detail) for detail in error.errors(include_url=False))
        raise UsageError(f"{origin}: {complaints}") from None


def parse_bytes(text: str, option: str) -> int:
    """`2GiB`, `800 MiB`, `1.5GB` or a plain number of bytes, the value of `option`. Raises `UsageError`."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or float(found[1]) <= 0:
        raise UsageError(f"{option} {text!r} is no size; write 2GiB, 800MB or a number of bytes")
    return int(float(found[1]) * unit)


def _describe(settings: type[Settings], detail: Any) -> str:
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location)
    if detail["type"] == "extra_forbidden":
        known = _known_keys(settings, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"
    if detail["type"] == "missing":
        return f"{key!r} is required"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{key}: {message}" if key else message
    if detail["type"] in ("model_type", "model_attributes_type"):
        return f"{key} = {detail['input']!r} should be a section of its own, [{key}]"
    return f"{key} = {detail['input']!r} {message.replace('Input should', 'should').replace('Input is', 'is')}"


def _known_keys(settings: type[Settings], path: list[str]) -> list[str]:
    """Field names of the (sub)settings at `path`; list indices in the path are passed over."""
    current: type[Settings] | None = settings
    for part in path:
        if current is None or part not in current.model_fields:
            continue
        current = _settings_in(current.model_fields[part].annotation)
    return list(current.model_fields) if current is not None else []


def _settings_in(annotation: Any) -> type[Settings] | None:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    for argument in get_args(annotation):
        found = _settings_in(argument)
        if found is not None:
            return found
    return None


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value
