"""Finding and loading search spaces: built in, from a file, or from a package."""

import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from raytickets.config import InputError, SearchSpace

FUNCTION = "space"
"""The function that a space's file defines, unless the user names another."""


def built_in() -> dict[str, Path]:
    """The spaces that come with raytickets: their files by name."""
    package = Path(__file__).parent
    # A wheel carries `search_spaces` inside the package, a checkout has it beside the package.
    folders = (package / "search_spaces", package.parent / "search_spaces")
    folder = next(folder for folder in folders if folder.is_dir())
    return {file.stem: file for file in sorted(folder.glob("*.py"))}


def load_space(spec: str, *, smoke: bool = False) -> SearchSpace:
    """The search space that `spec` names.

    `spec` is a built-in name, `path/to/file.py` (its function `space`), `path/to/file.py:function`
    or `package.module:function`. `smoke` asks the function for its smallest variant, as
    `function(smoke=True)`. Raises InputError if there is no such space or it cannot be loaded.
    """
    # As for a script of the user's: what lies in the working folder can be imported.
    _importable(Path.cwd())
    source, _, name = spec.partition(":")
    if source.endswith(".py"):
        module = _load_file(spec, Path(source))
    elif name:
        module = _run(spec, lambda: importlib.import_module(source))
    elif source in built_in():
        module = _load_file(spec, built_in()[source])
    else:
        close = difflib.get_close_matches(spec, built_in(), n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        names = ", ".join(built_in())
        allowed = f"{hint}must be one of {names}, a .py file, or package.module:function"
        raise InputError("space", spec, allowed)

    function = getattr(module, name or FUNCTION, None)
    if not callable(function):
        raise InputError("space", spec, f"must define a function `{name or FUNCTION}`")
    if smoke and "smoke" not in inspect.signature(function).parameters:
        raise InputError("smoke", True, f"the function of {spec} takes no argument `smoke`")
    space = _run(spec, lambda: function(smoke=True) if smoke else function())
    if not isinstance(space, SearchSpace):
        allowed = f"must return a SearchSpace, not {type(space).__name__}"
        raise InputError("space", spec, allowed)
    return space


def _importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _load_file(spec: str, path: Path):
    if not path.is_file():
        raise InputError("space", spec, "there is no such file")
    _importable(path.resolve().parent)
    found = importlib.util.spec_from_file_location(f"raytickets_space_{path.stem}", path)
    assert found is not None
    loader = found.loader
    assert loader is not None
    module = importlib.util.module_from_spec(found)
    # Dataclasses look the module of a class up by its name.
    sys.modules[module.__name__] = module
    _run(spec, lambda: loader.exec_module(module))
    return module


def _run(spec: str, code: Callable[[], object]):
    """What the user's code returns; what it raises as an InputError that says where."""
    try:
        return code()
    except InputError:
        raise
    except SyntaxError as error:
        where = f" in line {error.lineno} of {error.filename}" if error.lineno else ""
        allowed = f"syntax error{where}: {error.msg}"
        raise InputError("space", spec, allowed) from error
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        not_theirs = {__file__, importlib.__file__}
        theirs = [f for f in frames if Path(f.filename).is_file() and f.filename not in not_theirs]
        where = "".join(f" in line {frame.lineno} of {frame.filename}" for frame in theirs[:1])
        allowed = f"raised {type(error).__name__}{where}: {error}"
        raise InputError("space", spec, allowed) from error
