"""From a YAML file to a validated dataclass: an unknown key is an error that names the nearest known one.

Every configuration of `longverse.data` is a frozen dataclass whose `__post_init__` checks its own values; this
module only turns plain mappings into them. Relative paths are relative to the file they stand in, so a recipe can
be run from anywhere; `${NAME:-default}` in any text of a file is filled in from the environment as it is read.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from longverse.errors import UserError, expand

T = TypeVar("T")


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """`, did you mean 'x'?` or the list of what is known, to end an error message with."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}."


def build(cls: type[T], values: Any, where: str = "the configuration") -> T:
    """An instance of dataclass `cls` from a mapping, nested dataclasses included. Raises UserError."""
    if not isinstance(values, dict):
        raise UserError(f"{where} must be a mapping of names to values, not {_kind(values)}.")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"{where} has the unknown key {key!r}{nearest(str(key), fields)}")
        arguments[key] = _convert(hints[key], value, f"{where}: {key}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise UserError(f"{where} lacks the key {name!r}, which has no default.")
    return cls(**arguments)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if origin in (tuple, list):
        if not isinstance(value, list):
            raise UserError(f"{where} must be a list, not {_kind(value)}.")
        items = [_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
        return tuple(items) if origin is tuple else items
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where} must be a mapping, not {_kind(value)}.")
        return {_convert(args[0], k, where): _convert(args[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    if hint is Any:
        return value
    if hint is float and isinstance(value, str) and _POWER.fullmatch(value):
        value = float(value)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise UserError(f"{where} must be a finite number, not {value}.")
        return float(value)
    if hint is int and isinstance(value, str):
        return _count(value, where)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, hint) or (hint in (int, float) and isinstance(value, bool)):
        raise UserError(f"{where} must be {_name(hint)}, not {_kind(value)}.")
    return value


# YAML 1.1, which the reader follows, takes 2e-4 for a text: it asks for a point and a sign, 2.0e-4.
_POWER = re.compile(r"[-+]?\d+(\.\d*)?(e[-+]?\d+)?", re.IGNORECASE)


def _count(value: str, where: str) -> int:
    """`32K` and `1M` are written 1,024 and 1,048,576 times, as context lengths are."""
    text = value.strip().upper().replace("_", "").replace(",", "")
    unit = {"K": 1024, "M": 1024**2}.get(text[-1:], 1)
    digits = text[:-1] if unit > 1 else text
    if not digits.isdigit():
        raise UserError(f"{where} must be a whole number such as 32768 or 32K, not {value!r}.")
    return int(digits) * unit


def _name(hint: Any) -> str:
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"


_VARIABLE = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_]\w*)(?P<default>:-[^{}]*)?\}|(?P<broken>\$\{)")


def fill_variables(value: Any, where: str) -> Any:
    """`value` with the environment filled into all its texts, keys excepted.

    `${NAME:-default}` becomes the variable NAME, or the default where NAME is unset or empty; `${NAME}` alone must be
    set. A text that begins with a variable and goes on with `/` is a path: a relative folder out of the environment
    then starts where the command is run, as it would in a shell (a default starts, like all paths, at the file it
    stands in). `$${` is written for a plain `${`. UserError for a variable that is not set and for a `${` of another
    form.
    """
    if isinstance(value, dict):
        return {key: fill_variables(inner, f"{where}: {key}") for key, inner in value.items()}
    if isinstance(value, list):
        return [fill_variables(inner, f"{where}[{i}]") for i, inner in enumerate(value)]
    if not isinstance(value, str) or "${" not in value:
        return value

    def one(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        if match["broken"]:
            raise UserError(
                f"{where} holds a ${{ that is no ${{NAME}} or ${{NAME:-default}}; write $${{ for a plain one."
            )
        if name is None:
            return "${"
        if not (found := os.environ.get(name, "")):
            if default is None:
                raise UserError(f"{where} needs the environment variable {name}, which is not set; set it.")
            return default.removeprefix(":-")
        begins_path = match.start() == 0 and value[match.end() :].startswith("/")
        return os.path.abspath(found) if begins_path and not found.startswith("~") else found

    return _VARIABLE.sub(one, value)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, variables of the environment filled in (see `fill_variables`). UserError for a
    missing file, a syntax error (with its line) or another shape."""
    import yaml

    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the path of a YAML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error}).") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", -1) + 1
        problem = getattr(error, "problem", None) or "a syntax error"
        raise UserError(f"{path}, line {line}: {problem}; correct the YAML.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of names to values, not {_kind(values)}.")
    return fill_variables(values, str(path))


def resolve(path: str, base: Path) -> Path:
    """`path` with `~` expanded; a relative one starts at the folder `base`."""
    found = expand(path)
    return found if found.is_absolute() else base / found
