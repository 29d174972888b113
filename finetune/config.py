"""The settings of a command: its defaults, under a TOML file, under the flags. An unknown name is refused.

A command's `Config` is a frozen dataclass. A field that is a dataclass itself is a group of settings: a table in TOML
(`[adapter]`, `rank = 8`), flat flags on the command line (`--rank 8`). A tuple of dataclasses is a list of tables
(`[[concepts]]`), which stands outside the groups in TOML and has no flags. Everything here is read without torch.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import tomllib
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeGuard, TypeVar

import tyro

from finetune import peers, shelf, toml
from finetune.errors import Fault

C = TypeVar("C")
RECIPE = "recipe"
"""The one key of a TOML file that is no setting: the recipe that the file is made for."""


class Problem(typing.NamedTuple):
    """What is wrong with a TOML file, and where: in the `number`th table of a name, at a key."""

    table: str
    key: str
    text: str
    number: int = 0


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
        console_outputs=peers.leads(),
    )
    return config_class(**{name: value for name, value in _fields(parsed).items() if name != "config"})


def parted(words: Sequence[str], known: dict[str, int]) -> tuple[list[str], list[str]]:
    """Of a command line the words of these flags, which take so many values each, and the others."""
    own: list[str] = []
    rest: list[str] = []
    left = iter(words)
    for word in left:
        name, equals, _ = word.partition("=")
        if name not in known:
            rest.append(word)
            continue
        own.append(word)
        own += [value for _ in range(0 if equals else known[name]) if (value := next(left, None)) is not None]
    return own, rest


def file_of(argv: Sequence[str]) -> Path | None:
    """The TOML file that `--config` names."""
    named = [following for word, following in pairwise(argv) if word == "--config"]
    named += [word.removeprefix("--config=") for word in argv if word.startswith("--config=")]
    return shelf.find_settings(named[0]) if named else None


def tables(file: Path) -> dict[str, Any]:
    """What a TOML file holds, whoever's settings they are. Raises Fault when it cannot be read."""
    return _read(file)[1]


def recipe_of(file: Path) -> str | None:
    """The recipe that a TOML file says it is made for."""
    recipe = tables(file).get(RECIPE)
    return recipe if isinstance(recipe, str) else None


def new_words(settings: Mapping[str, Any]) -> list[str]:
    """The words that a run teaches, of all its settings by table: those that are named, or the triggers; none where it
    teaches none."""
    if "words" not in settings:
        return []
    data = settings.get("data") or {}
    each = [data, *(data.get("concepts") or settings.get("concepts") or ())]
    return list(dict.fromkeys(settings["words"].get("word") or [one["trigger"] for one in each if one.get("trigger")]))


def group(kind: type[C], file: Path, name: str) -> C:
    """One group of settings of a TOML file, whatever else is there; all defaults where the file has no such group.

    Raises Fault where a value is not of its kind.
    """
    table = tables(file)
    problems: list[Problem] = []
    made = _filled(kind, table.get(name, {}), None, name, problems, table)
    if problems:
        raise Fault(f"{file}: not all settings are understood:", [one.text for one in problems])
    return made


def asdict(config: Any) -> dict[str, Any]:
    """The settings as plain values that JSON can hold; groups are nested dictionaries."""
    return {name: _plain(value) for name, value in _fields(config).items()}


def dumps(config: Any) -> str:
    """The settings as a TOML text that reads back equal. None is left out: it is a default."""
    name = _recipe_name(type(config))
    parts = [[f"{RECIPE} = {toml.value(name)}"] if name in shelf.recipes() else [], [*_lines(config)]]
    groups = {name: group for name, group in _fields(config).items() if is_dataclass(group)}
    parts += [[f"[{name}]", *_lines(group)] for name, group in groups.items()]
    for owner in (config, *groups.values()):
        lists = {name: getattr(owner, name) for name in _table_lists(type(owner))}
        parts += [[f"[[{name}]]", *_lines(one)] for name, tables in lists.items() for one in tables]
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
    parser.__module__ = config_class.__module__  # where tyro finds its source, else sought in vain for each field
    return parser


def _from_file(config_class: type[C], file: Path) -> C:
    text, table = _read(file)
    _require_recipe(config_class, table.pop(RECIPE, None), file)
    problems: list[Problem] = []
    settings = _filled(config_class, table, None, "", problems, table)
    problems += _unknown(config_class, table)
    if problems:
        said = [(toml.line_of(text, one.table, one.key, one.number), one.text) for one in problems]
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
    return _filled(config_class, {}, base, "", [], {})


def _filled(
    config_class: type[C],
    table: Mapping[str, Any],
    base: Any,
    group: str,
    problems: list[Problem],
    root: Mapping[str, Any],
) -> C:
    """A `config_class` of a table's values. What the table lacks is `base`'s, or the default, or is left to the flags.

    Lists of tables are taken from `root`, the whole file. What is wrong is gathered in `problems`, so that all of it
    can be said at once.
    """
    hints, lists = typing.get_type_hints(config_class), _table_lists(config_class)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        name, hint = field.name, hints[field.name]
        standard = getattr(base, name) if base is not None else _default(field)
        given = table.get(name, {} if is_dataclass(hint) else standard)
        if is_dataclass(hint) and isinstance(given, dict):
            inner = None if standard is tyro.MISSING else standard
            values[name] = _filled(typing.cast(type, hint), given, inner, name, problems, root)
        elif name in lists:
            values[name] = _tables(name, lists[name], root[name], problems) if name in root else standard
        elif name in table and is_dataclass(hint):
            said = f"{name} is a group of settings: write [{name}] and its settings below."
            problems.append(Problem(group, name, said))
            values[name] = standard
        elif name in table:
            values[name] = _converted(name, given, hint, group, problems)
        else:
            values[name] = standard
    return config_class(**values)


def _tables(name: str, kind: type, given: Any, problems: list[Problem]) -> tuple[Any, ...]:
    """The settings of each of a list of tables, `[[name]]`."""
    if not (isinstance(given, list) and all(isinstance(one, dict) for one in given)):
        problems.append(Problem("", name, f"{name} is a list of tables: write [[{name}]] and its settings below."))
        return ()
    made: list[Any] = []
    for number, table in enumerate(given):
        found: list[Problem] = []
        made.append(_filled(kind, table, None, name, found, {}))
        missing = [field for field, value in _fields(made[-1]).items() if value is tyro.MISSING and field not in table]
        found += [Problem("", name, f"[[{name}]] number {number + 1} lacks {field}.") for field in missing]
        problems += [one._replace(number=number) for one in found]
    return tuple(made)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return tyro.MISSING if field.default is MISSING else field.default


def _converted(name: str, given: Any, hint: Any, group: str, problems: list[Problem]) -> Any:
    try:
        return toml.convert(given, hint)
    except toml.Mismatch as expected:
        problems.append(Problem(group, name, f"{name} = {toml.value(given)}: expected {expected}."))
        return tyro.MISSING


def _unknown(config_class: type, table: Mapping[str, Any]) -> Iterator[Problem]:
    """The names in a file that are no settings."""
    known, lists = _names(config_class), _all_lists(config_class)
    homes = {name: _heading(group, lists) for group, names in known.items() for name in names}
    for key, value in table.items():
        if key not in known[""]:
            yield Problem("", key, f"{key}: no such setting outside the tables. {_where_else(key, known[''], homes)}")
            continue
        tables = value if isinstance(value, list) else [value]
        for number, inner in enumerate(tables if key in known else ()):
            for name in inner.keys() - set(known[key]) if isinstance(inner, dict) else ():
                hint = f"Write [[{name}]]." if name in lists else _where_else(name, known[key], homes)
                yield Problem(key, name, f"{name}: no such setting in {_heading(key, lists)}. {hint}", number)


def _heading(name: str, lists: Collection[str]) -> str:
    return f"[[{name}]]" if name in lists else f"[{name}]" if name else ""


def _where_else(key: str, names: list[str], homes: Mapping[str, str]) -> str:
    """Where a setting belongs that is none here."""
    return f"It belongs in {homes[key]}." if homes.get(key) else shelf.nearest(key, names)


def _names(config_class: type) -> dict[str, list[str]]:
    """The settings by group or list of tables; under an empty name those outside, and the groups and lists."""
    lists = _all_lists(config_class)
    tables: dict[str, type] = {**lists, "": config_class, **_groups(config_class)}
    names = {
        table: [field.name for field in dataclasses.fields(kind) if field.name not in lists]
        for table, kind in tables.items()
    }
    return {**names, "": [*names[""], *lists]}


def _is_group(hint: Any) -> TypeGuard[type]:
    return isinstance(hint, type) and is_dataclass(hint)


def _groups(config_class: type) -> dict[str, type]:
    return {name: hint for name, hint in typing.get_type_hints(config_class).items() if _is_group(hint)}


def _all_lists(config_class: type) -> dict[str, type]:
    """The lists of tables of a command, in its groups too."""
    owners = [config_class, *_groups(config_class).values()]
    return {name: kind for owner in owners for name, kind in _table_lists(owner).items()}


def _table_lists(config_class: type) -> dict[str, type]:
    """The fields that hold several tables, and the dataclass of each."""
    hints = typing.get_type_hints(config_class)
    shapes = {name: (typing.get_origin(hint), typing.get_args(hint)) for name, hint in hints.items()}
    return {
        name: arms[0]
        for name, (origin, arms) in shapes.items()
        if origin is tuple and arms[1:] == (...,) and _is_group(arms[0])
    }


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
    kind: type = type(config)
    helps, lists = _helps(kind), _table_lists(kind)
    for name, value in _fields(config).items():
        if value is not None and not is_dataclass(value) and name not in lists:
            yield f"{name} = {toml.value(_plain(value))}" + (f"  # {helps[name]}" if name in helps else "")


@cache
def _helps(config_class: type) -> dict[str, str]:
    """The first clause of each field's docstring, where the source is at hand."""
    try:
        body = _classes(inspect.getmodule(config_class))[config_class.__qualname__].body
    except (OSError, TypeError, SyntaxError, KeyError):
        return {}
    helps = {}
    for field, text in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            clause = re.split(r"(?<!e\.g)[.:](?:\s|$)", " ".join(str(text.value.value).split()))[0]
            helps[ast.unparse(field.target)] = clause
    return helps


@cache
def _classes(module: Any) -> dict[str, ast.ClassDef]:
    """Those of a module by name, which is parsed once for all of them."""
    parsed = ast.parse(inspect.getsource(module)).body
    return {node.name: node for node in parsed if isinstance(node, ast.ClassDef)}
