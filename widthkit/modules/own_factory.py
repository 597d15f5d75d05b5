"""Factories of the user's own: ``package.module:factory`` and ``FILE.py:factory``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from widthkit.errors import ModelError, one_line


def is_own(name: str) -> bool:
    """Whether a model's name is that of a user's own factory.

    >>> is_own("my_zoo:tiny"), is_own("nets/timm/model.py:tiny"), is_own("timm/resnet18")
    (True, True, False)
    """
    return ":" in name


def own_factory(name: str) -> Callable[..., Any]:
    """Import a factory.

    A file is imported once, as ``widthkit_file_STEM``: classes that it defines have the same names in every process and
    in every folder. While it is imported, files beside it can be imported too. As everywhere in Python, a module that
    is imported already is not imported again: two files cannot have two different neighbours of one name.

    Args:
        name: ``package.module:factory``, or ``FILE.py:factory`` with a path relative to the current folder.

    Raises:
        ModelError: If there is none.
    """
    source, _, attribute = name.rpartition(":")
    try:
        target: Any = _import_file(source) if source.endswith(".py") else importlib.import_module(source)
        for part in attribute.split("."):
            target = getattr(target, part)
    except ModelError:
        raise
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ModelError(f"unknown model '{name}': {one_line(error, 200)}") from error
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ModelError(f"{source} cannot be imported: {type(error).__name__}: {one_line(error, 200)}") from error
    if not callable(target):
        raise ModelError(f"'{name}' is a {type(target).__name__}, not a factory that returns a model")
    return target  # type: ignore[no-any-return]


def own_factory_takes(name: str, argument: str) -> bool:
    """Whether a factory of the user's own takes a keyword argument.

    Args:
        name: As in :func:`own_factory`.
        argument: The keyword.

    Raises:
        ModelError: As there.

    >>> own_factory_takes("torch.nn:Linear", "bias"), own_factory_takes("torch.nn:Linear", "num_classes")
    (True, False)
    """
    try:
        parameters = inspect.signature(own_factory(name)).parameters
    except ValueError:  # callables that are written in C may have no signature
        return True
    return argument in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _import_file(source: str) -> ModuleType:
    path = Path(source).expanduser().resolve()
    if not path.is_file():
        raise ModelError(f"there is no file {path}; write FILE.py:factory with a path from the current folder")
    name = f"widthkit_file_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(path):
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up here
    try:
        with _importable(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
