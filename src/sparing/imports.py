"""Import objects that a recipe names by an import path."""

import re
import sys
from importlib import import_module
from typing import Any

from sparing.errors import InputError

PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
"""`module:Name`, with dots in the module only. A file name never matches."""


def import_object(path: str, what: str) -> Any:
    """Import the object that an import path such as "my_package.nets:MyNet" names.

    Importing a module runs its code.

    Args:
        path: module and name, separated by a colon. Python finds the module on `sys.path`; the current directory is
            there only if the user put it there, for example in PYTHONPATH.
        what: kind of the object, such as "model", for error messages.

    Raises:
        InputError: the path has another form; the module belongs to Python itself, cannot be imported, or raises an
            error of any kind; it has no such name.

    Examples:
        >>> import_object("torch.nn:Linear", "model")
        <class 'torch.nn.modules.linear.Linear'>
    """
    if not PATH.fullmatch(path):
        raise InputError(f"{what} {path!r} cannot be imported: write module:Name, such as my_package.nets:MyNet")
    module, _, name = path.partition(":")
    if module.partition(".")[0] in sys.stdlib_module_names:  # importing some of them opens windows or runs programs
        raise InputError(f"{what} {path!r} cannot be imported: {module!r} is a module of Python, which has no {what}")
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        hint = f"; install it, or add its directory to PYTHONPATH to import {module!r}"
        raise InputError(f"{what} {path!r} cannot be imported: {error}{hint}") from error
    except Exception as error:  # an error of any kind in the code of the module
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{what} {path!r} cannot be imported: {reason}") from error
    try:
        return getattr(found, name)
    except AttributeError as error:
        raise InputError(f"{what} {path!r} cannot be imported: {error}") from error
