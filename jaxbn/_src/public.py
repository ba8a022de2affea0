"""Setup of the public packages: the module that their names belong to, and lazy imports."""

import importlib
from collections.abc import Callable
from importlib import metadata
from typing import Any


def set_home(namespace: dict[str, Any]) -> None:
    """Makes a public package the `__module__` of the classes and functions that it re-exports.

    Pickles, `help` and error messages then name `jaxbn.linen.BatchNorm` and not a private module, which may be renamed.
    As with the classes of JAX and NumPy that do this, `inspect.getsource` finds functions and methods, but raises
    OSError for a class.

    Args:
        namespace: The `globals()` of the package, at the end of its `__init__`.
    """
    for name, value in namespace.items():
        if callable(value) and not name.startswith("_") and value.__module__.startswith("jaxbn._src."):
            value.__module__ = namespace["__name__"]
            if "__firstlineno__" in vars(value):  # a line of the private file; Python 3.13 forgets it only for some
                del value.__firstlineno__


def lazy(namespace: dict[str, Any], *subpackages: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and the `__dir__` of a package, for its version and for subpackages that need no import.

    Args:
        namespace: The `globals()` of the package. Its name is also that of the distribution.
        subpackages: Names of the packages in it that are imported when they are first used.
    """
    package = namespace["__name__"]

    def getattr_(name: str) -> Any:
        if name in subpackages:
            return importlib.import_module(f"{package}.{name}")
        if name == "__version__":
            return metadata.version(package)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def dir_() -> list[str]:
        return sorted({*namespace, *subpackages, "__version__"})

    return getattr_, dir_
