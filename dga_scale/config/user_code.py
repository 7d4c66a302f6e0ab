"""Python files and modules of the user, imported before a model is loaded: what ``--import`` names.

They run with the user's rights, as ``python FILE`` would; nothing is imported that no flag or YAML file of
the command names, and never what lies in a model's folder.
"""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from types import ModuleType

from dga_scale.errors import UserError

HELP = (
    "Python files (NAME.py), or modules that Python finds, which are imported before the model is loaded: "
    "they register an architecture that is not known (docs/extending.md). Their code runs with your rights."
)

_imported: dict[str, ModuleType] = {}


def import_code(names: Sequence[str]) -> None:
    """Import files and modules, each once in a process.

    Raises:
        UserError: There is no such file or module, or its code can't be read or raises an error; with the
            file and the line.
    """
    for name in names:
        if name not in _imported:
            _imported[name] = _import(name)


def imported() -> tuple[str, ...]:
    """Return the names that this process has imported, for the processes that it starts."""
    return tuple(_imported)


def code_hashes() -> dict[str, str]:
    """Return the sha256 of each imported file by its name, by which ranks compare what they run."""
    files = {name: module.__file__ for name, module in _imported.items()}
    return {name: sha256(Path(file).read_bytes()).hexdigest() for name, file in files.items() if file}


def _import(name: str) -> ModuleType:
    path = Path(name)
    is_file = path.suffix == ".py" or len(path.parts) > 1
    if is_file and (path.suffix != ".py" or not path.is_file()):
        raise UserError(f"--import {name}: no such Python file. Give NAME.py, or the name of a module")
    try:
        return _from_file(path) if is_file else importlib.import_module(name)
    except ModuleNotFoundError as error:
        # The module itself, or a package that it is said to lie in; not what it imports.
        if not is_file and error.name and f"{name}.".startswith(f"{error.name}."):
            raise UserError(
                f"--import {name}: Python finds no module {error.name!r}. Give a file (NAME.py), or put the "
                "module's folder on PYTHONPATH"
            ) from error
        raise _broken(name, error) from error
    except (Exception, SystemExit) as error:
        raise _broken(name, error) from error


def _from_file(path: Path) -> ModuleType:
    resolved = path.resolve()
    digest = sha256(str(resolved).encode()).hexdigest()[:8]  # two files of one name are two modules
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{digest}", resolved)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _broken(name: str, error: BaseException) -> UserError:
    """Say in one line what is wrong with a file, or with what it imports, and in which line."""
    if isinstance(error, SyntaxError) and error.filename:
        where, what = f"{error.filename}:{error.lineno}", error.msg
    else:
        frames = traceback.extract_tb(error.__traceback__)
        outside = [each for each in frames if each.filename != __file__ and "importlib" not in each.filename]
        # The last line of the user's file: what is below it, in libraries, it has called.
        own = [each for each in outside if Path(each.filename).name == Path(name).name] or outside[:1]
        where = f"{own[-1].filename}:{own[-1].lineno}" if own else name
        what = " ".join(str(error).split())
    return UserError(f"--import {name}: {where}: {type(error).__name__}: {what}. Mend the file")
