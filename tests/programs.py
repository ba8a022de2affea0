"""Imports the programs of examples/ for the tests."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_program(name: str) -> ModuleType:
    """A file of the examples as a module; it imports from its folder, as a program does."""
    file = EXAMPLES / name
    spec = importlib.util.spec_from_file_location(f"{file.stem}_example", file)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(file.parent))
        spec.loader.exec_module(module)
    return module


def in_standard_promotion(optimizer: Any) -> Any:
    """An optimizer of optax without the strict dtype promotion of the tests: optax mixes integers and floats."""

    def update(*arguments: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(*arguments)

    return optimizer._replace(update=update)
