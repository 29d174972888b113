"""The settings of a command: its defaults, under a TOML file, under the flags. An unknown name is refused.

A command's `Config` is a frozen dataclass. A field that is a dataclass itself is a group of settings: a table in TOML
(`[adapter]`, `rank = 8`), flat flags on the command line (`--rank 8`). Everything here is read without torch.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import tomllib
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from finetune import shelf, toml
from finetune.errors import Fault

C = TypeVar("C")
RECIPE = "recipe"
"""The one key of a TOML file that is no setting: the recipe that the file is made for."""


def parse(config_class: type[C], argv: Sequence[str], prog: str) -> C:
    """The settings from the command line, and from the TOML file that `--config` names.

    Raises Fault for a file that is not as it must be. For flags that are not, tyro says so and exits with status 2.
    """
    _require_once(argv)
    file = file_of(argv)
    default = _defaults(config_class, None) if file is None else _from_file(config_class, file)
    parser = _with_config_flag(config_class)
    parsed = tyro.cli(
        parser,
        args=list(argv),
        prog=prog,
        default=parser(**_fields(default)),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return config_class(**{name: value for name, value in _fields(parsed).items() if name != "config"})


def file_of(argv: Sequence[str]) -> Path | None:
    """The TOML file that `--config` names."""
    named = [following for word, following in pairwise(argv) if word == "--config"]
    named += [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
    return shelf.find_settings(named[0]) if named else None


def recipe_of(file: Path) -> str | None:
    """The recipe that a TOML file says it is made for."""
    recipe = _read(file)[1].get(RECIPE)
    return recipe if isinstance(recipe, str) else None


def asdict(config: Any) -> dict[str, Any]:
    """The settings as plain values that JSON can hold; groups are nested dictionaries."""
    return {name: _plain(value) for name, value in _fields(config).items()}


def dumps(config: Any) -> str:
    """The settings as a TOML text that reads back equal. None is left out: it is a default."""
    name = _recipe_name(type(config))
    parts = [[f"{RECIPE} = {toml.value(name)}"] if name in shelf.recipes() else [], [*_lines(config)]]
    parts += [[f"[{name}]", *_lines(group)] for name, group in _fields(config).items() if is_dataclass(group)]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def _require_once(argv: Sequence[str]) -> None:
    """Of a flag that is given twice the command line would take the last without a word."""
    names = [word.partition("=")[0].replace("_", "-") for word in argv if word.startswith("--")]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise Fault(f"{', '.join(twice)}: given more than once. Several values follow one flag: --prompt ONE TWO.")


def _with_config_flag(config_class: type[C]) -> type[C]:
    """The same class with `--config` as a further flag, so that no command has to think of it."""
    text = "TOML file of settings, or the name of shipped ones (see `finetune recipes`). Flags win over it."
    flag = Annotated[str | None, tyro.conf.arg(help=text, metavar="FILE.toml")]
    field: Any = dataclasses.field(default=None, kw_only=True)
    parser = dataclasses.make_dataclass(
        config_class.__name__, [("config", flag, field)], bases=(config_class,), frozen=True
    )
    parser.__doc__ = config_class.__doc__
    return parser


def _from_file(config_class: type[C], file: Path) -> C:
    text, table = _read(file)
    _require_recipe(config_class, table.pop(RECIPE, None), file)
    problems: list[tuple[str, str, str]] = []
    settings = _filled(config_class, table, None, "", problems)
    problems += _unknown(config_class, table)
    if problems:
        said = [(toml.line_of(text, group, key), problem) for group, key, problem in problems]
        said.sort(key=lambda line: line[0] or 0)
        raise Fault(f"{file}: not all settings are understood:", [f"line {n}: {p}" if n else p for n, p in said])
    return settings


def _read(file: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        return text, tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise Fault(f"{file}: not UTF-8 text at byte {error.start}. Save the file as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        raise Fault(f"{file}: not valid TOML: {error}. Text stands in quotes, lists in [ ].") from None
    except OSError as error:
        raise Fault(f"{file}: cannot be read: {error.strerror}.") from None


def _require_recipe(config_class: type, made_for: Any, file: Path) -> None:
    """Settings of one recipe are not taken by another without a word: their learning rates differ a hundredfold."""
    own, known = _recipe_name(config_class), shelf.recipes()
    if made_for is None:
        return
    if made_for not in known:
        raise Fault(f"{file}: {RECIPE} = {toml.value(made_for)}: no such recipe. {shelf.nearest(str(made_for), known)}")
    if own in known and own != made_for:
        raise Fault(f"{file}: made for the recipe {made_for}, not for {own}: `finetune train {made_for} ...`.")


def _recipe_name(config_class: type) -> str:
    return config_class.__module__.removeprefix(f"{shelf.RECIPES}.")


def _defaults(config_class: type[C], base: C | None) -> C:
    return _filled(config_class, {}, base, "", [])


def _filled(
    config_class: type[C], table: Mapping[str, Any], base: Any, group: str, problems: list[tuple[str, str, str]]
) -> C:
    """A `config_class` of a table's values. What the table lacks is `base`'s, or the default, or is left to the flags.

    What is wrong is gathered in `problems` as (table, key, message), so that all of it can be said at once.
    """
    hints = typing.get_type_hints(config_class)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        name, hint = field.name, hints[field.name]
        standard = getattr(base, name) if base is not None else _default(field)
        given = table.get(name, {} if is_dataclass(hint) else standard)
        if is_dataclass(hint) and isinstance(given, dict):
            inner = None if standard is tyro.MISSING else standard
            values[name] = _filled(typing.cast(type, hint), given, inner, name, problems)
        elif name in table and is_dataclass(hint):
            problems.append((group, name, f"{name} is a group of settings: write [{name}] and its settings below."))
            values[name] = standard
        elif name in table:
            values[name] = _converted(name, given, hint, group, problems)
        else:
            values[name] = standard
    return config_class(**values)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return tyro.MISSING if field.default is MISSING else field.default


def _converted(name: str, given: Any, hint: Any, group: str, problems: list[tuple[str, str, str]]) -> Any:
    try:
        return toml.convert(given, hint)
    except toml.Mismatch as expected:
        problems.append((group, name, f"{name} = {toml.value(given)}: expected {expected}."))
        return tyro.MISSING


def _unknown(config_class: type, table: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The names in a file that are no settings, as (table, key, message)."""
    known = _names(config_class)
    homes = {name: group for group, names in known.items() for name in names}
    for key, value in table.items():
        if key not in known[""]:
            yield "", key, f"{key}: no such setting outside the tables. {_where_else(key, known[''], homes)}"
        elif key in known and isinstance(value, dict):
            for name in value.keys() - set(known[key]):
                yield key, name, f"{name}: no such setting in [{key}]. {_where_else(name, known[key], homes)}"


def _where_else(key: str, names: list[str], homes: Mapping[str, str]) -> str:
    return f"It belongs in [{homes[key]}]." if homes.get(key) else shelf.nearest(key, names)


def _names(config_class: type) -> dict[str, list[str]]:
    """The settings by group; those outside the groups, and the groups themselves, under an empty name."""
    hints = typing.get_type_hints(config_class)
    groups = {"": config_class, **{name: hint for name, hint in hints.items() if is_dataclass(hint)}}
    return {name: [field.name for field in dataclasses.fields(group)] for name, group in groups.items()}


def _fields(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _lines(config: Any) -> Iterator[str]:
    """`key = value  # help`, for the settings that are no groups and not None."""
    helps = _helps(type(config))
    for name, value in _fields(config).items():
        if value is not None and not is_dataclass(value):
            yield f"{name} = {toml.value(_plain(value))}" + (f"  # {helps[name]}" if name in helps else "")


def _helps(config_class: type) -> dict[str, str]:
    """The first clause of each field's docstring, where the source is at hand."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0].body  # type: ignore[attr-defined]
    except (OSError, TypeError, SyntaxError):
        return {}
    helps = {}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            clause = re.split(r"(?<!e\.g)[.:](?:\s|$)", " ".join(str(text.value.value).split()))[0]
            helps[ast.unparse(field.target)] = clause
    return helps
