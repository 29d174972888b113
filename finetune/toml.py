"""TOML values and the types of settings: a value read is checked against its field's type, a value written reads back.

The standard library reads TOML but does not write it, and knows no types of ours.
"""

from __future__ import annotations

import json
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union

KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text in quotes",
    Path: "a path in quotes",
}


class Mismatch(Exception):
    """A value is not of the type asked for; the message names what is expected, e.g. "a whole number"."""


def convert(value: Any, hint: Any) -> Any:
    """A value from a TOML file as the type `hint` asks for it. Raises Mismatch.

    Strict, as leniency hides mistakes: `"8"` is no number, `8` no text, `1` not true. But `8` will do for 8.0, and for
    a list of one.
    """
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _first_fit(value, hint, [arm for arm in arms if arm is not type(None)])
    if origin is Literal and any(value == arm and type(value) is type(arm) for arm in arms):
        return value
    if origin is tuple and isinstance(value, list) and arms[1:] == (...,):
        return tuple(convert(item, arms[0]) for item in value)
    if origin is tuple and arms[1:] == (...,):
        return (_first_fit(value, hint, [arms[0]]),)
    if origin is tuple and isinstance(value, list) and len(arms) == len(value):
        return tuple(convert(item, arm) for item, arm in zip(value, arms, strict=True))
    if hint is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint in KINDS and type(value) is hint:
        return value
    raise Mismatch(kind(hint))


def kind(hint: Any) -> str:
    """What a value of this type is, in words."""
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(value(arm) for arm in arms)
    if origin in (Union, types.UnionType):
        return " or ".join(kind(arm) for arm in arms if arm is not type(None))
    if origin is tuple and arms[1:] == (...,):
        return f"a list, each item {kind(arms[0])}"
    if origin is tuple:
        return f"a list of {len(arms)}: {', '.join(map(kind, arms))}"
    return KINDS[hint]


def value(item: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(item, str):
        # JSON's escapes are TOML's, but for DEL, which JSON leaves as it is and TOML forbids.
        return json.dumps(item, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(item, bool):
        return "true" if item else "false"
    if isinstance(item, int | float):
        return repr(item)
    if isinstance(item, list | tuple):
        return f"[{', '.join(map(value, item))}]"
    return value(str(item))


def line_of(text: str, table: str, key: str, number: int = 0) -> int | None:
    """The line of a TOML text where a key of a table (or the table `key` itself) stands, if it is written plainly.

    `number` counts the tables of one name: 0 for the first `[[table]]`, and for a `[table]`.
    """
    here, seen = "", {"": 1}
    for count, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line.startswith("["):
            here = line.partition("]")[0].strip("[ \t\"'")
            seen[here] = seen.get(here, 0) + 1
            if not table and (here, seen[here]) == (key, number + 1):
                return count
        elif (here, seen[here]) == (table, number + 1) and line.partition("=")[0].strip(" \t\"'") == key:
            return count
    return None


def _first_fit(value: Any, hint: Any, arms: list[Any]) -> Any:
    for arm in arms:
        try:
            return convert(value, arm)
        except Mismatch:
            continue
    raise Mismatch(kind(hint))
