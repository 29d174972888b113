"""The recipes and ready settings that come with the package, and recipes of the user's own: found, listed, copied."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from types import ModuleType

from finetune.errors import Fault

RECIPES = "finetune.recipes"


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return _shipped(".py")


def settings() -> dict[str, Path]:
    """The ready settings that come with the package (TOML files), by name."""
    return _shipped(".toml")


def datasets() -> Path:
    """The folder of the small data sets that come with the package."""
    installed = Path(__file__).parent / "shipped_datasets"
    return installed if installed.is_dir() else Path(__file__).parents[1] / "datasets"


def find_settings(name: str) -> Path:
    """The TOML file that is meant: a path, or the name of shipped settings."""
    if Path(name).is_file():
        return Path(name)
    known = settings()
    bare = name.removesuffix(".toml")
    if bare in known:
        return known[bare]
    raise Fault(f"--config {name}: no such file, and no shipped settings of that name. {nearest(bare, known)}")


def load(name: str) -> ModuleType:
    """The module of a recipe: a shipped one by its name, the user's own by its path. It holds `Config` and `main`."""
    if name in recipes():
        return importlib.import_module(f"{RECIPES}.{name}")
    path = Path(name)
    if path.suffix != ".py" and path.name == name:
        raise Fault(f"{name}: there is no such recipe. {nearest(name, recipes())} A file of your own: ./{name}.py")
    if not path.is_file():
        raise Fault(f"{name}: there is no such file. `finetune copy lora {path.name}` gives you a recipe to change.")
    module = _load_file(path)
    missing = [part for part in ("Config", "main") if not hasattr(module, part)]
    if missing:
        raise Fault(
            f"{name}: not a recipe: it does not define {' and '.join(missing)}. A recipe has a dataclass Config, its "
            f"settings, and a function main(config). `finetune copy lora my_recipe.py` gives you one to change."
        )
    return module


def copy(name: str, target: Path) -> Path:
    """Write a shipped recipe, or shipped settings, to a file of the user's. Never over a file that is there."""
    known = {**{f"{stem}.toml": path for stem, path in settings().items()}, **settings(), **recipes()}
    if name not in known:
        raise Fault(f"{name}: there is nothing of that name to copy. {nearest(name, known)}")
    source = known[name]
    if target.suffix != source.suffix:
        raise Fault(f"{target}: {name} is a {source.suffix} file: name the copy so, e.g. {target.stem}{source.suffix}")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise Fault(f"{target}: there is a file of that name already. Name another one, or move it away.") from None
    except OSError as error:
        raise Fault(f"{target}: cannot be written: {error.strerror}.") from None
    return target


def describe(path: Path) -> str:
    """The first line of a recipe's docstring, or of the comment that opens a TOML file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".toml":
        return text.partition("\n")[0].lstrip("# ")
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


def nearest(word: str, known: Iterable[str]) -> str:
    """`Did you mean ...?` where something known is near, else what is known."""
    names = sorted(known)
    near = get_close_matches(word, names, n=1)
    return f"Did you mean {near[0]}?" if near else f"There is: {', '.join(names)}."


def _shipped(suffix: str) -> dict[str, Path]:
    folder = Path(str(files(RECIPES)))
    return {path.stem: path for path in sorted(folder.glob(f"*{suffix}")) if not path.name.startswith("_")}


def _load_file(path: Path) -> ModuleType:
    # Registered under a name that no other module has: dataclasses look their module up there.
    name = f"finetune_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise Fault(f"{path}: not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise Fault(f"{path}, line {error.lineno}: not valid Python: {error.msg}.") from None
    return module
