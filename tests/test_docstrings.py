"""Every example in a docstring runs, and every public name documents its arguments and results."""

import dataclasses
import doctest
import functools
import importlib
import inspect
import os
import pkgutil
import re
import tempfile

import flax
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
import jaxbn.serving
import jaxbn.testing

MODULES = ["jaxbn", *(m.name for m in pkgutil.walk_packages(jaxbn.__path__, "jaxbn."))]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

# Names that may have a summary only, and why: users do not call them, or comments on their fields document them.
SUMMARY_ONLY = {
    "jaxbn.Averaging": "the type of what constant, scheduled, cumulative and horizon return; their examples show it",
    "jaxbn.BatchNormState": "a NamedTuple that batch_norm makes; its fields say their shapes",
    "jaxbn.BatchRenormState": "a NamedTuple that batch_renorm makes; its fields say their shapes",
    "jaxbn.DomainBatchNormState": "a NamedTuple that domain_batch_norm makes; its fields say their shapes",
    "jaxbn.Diagnosis": "made by diagnose; its fields are documented",
    "jaxbn.Estimator": "a protocol, a tuple of functions; pooled and the others show it",
    "jaxbn.Finding": "part of a Diagnosis; its fields are documented",
    "jaxbn.FoldReport": "made by fold; its fields are documented",
    "jaxbn.Frozen": "made by freeze, finalize and load; its fields are documented",
    "jaxbn.GhostBatchNormState": "a NamedTuple that ghost_batch_norm makes; its fields say their shapes",
    "jaxbn.Info": "a NamedTuple in a Frozen; its fields are documented",
    "jaxbn.LayerDiagnosis": "part of a Diagnosis; its fields are documented",
    "jaxbn.LayerFold": "part of a FoldReport; its fields are documented",
    "jaxbn.LayerInfo": "a NamedTuple in a Frozen; its fields are documented",
    "jaxbn.LayerKind": "a NamedTuple in a Report; its fields are documented",
    "jaxbn.Steps": "a tuple of functions with their signatures at the fields; make_steps shows it",
    "jaxbn.linen.Norm": "the base of the layers, for a new method; the guide adding_a_method.md shows it",
    "jaxbn.linen.TrainState": "made by make_steps, whose example shows it; a class of Flax but for its last fields",
    "jaxbn.nnx.Norm": "the base of the layers, for a new method; the guide adding_a_method.md shows it",
    "jaxbn.nnx.TrainState": "made by make_steps, whose example shows it; a class of Flax but for its last field",
    "jaxbn.LayerChange": "one row of a Report, made by postproc",
    "jaxbn.MovingAverageBatchNormState": "a NamedTuple that moving_average_batch_norm makes; see its fields",
    "jaxbn.Moments": "a NamedTuple that batch_moments makes; its fields say their shapes",
    "jaxbn.NormParams": "a NamedTuple that batch_norm makes; its fields say their shapes",
    "jaxbn.NormTransform": "a tuple of functions; the protocol of each field documents its arguments",
    "jaxbn.Report": "made by postproc; its example shows it",
    "jaxbn.serving.Program": "made by load_program, whose example shows it; its fields are documented",
    "jaxbn.serving.Match": "made by match, whose example shows it; its methods are documented",
    "jaxbn.testing.Step": "a NamedTuple in a Vector; its docstring lists the contents",
    "jaxbn.testing.Vector": "a NamedTuple that load makes; its fields are documented",
}


def doctests(module_name):
    """The doctests of what a module defines itself, with the names that the docstrings may use."""
    module = importlib.import_module(module_name)
    names = {"jax": jax, "jnp": jnp, "np": np, "flax": flax, "nnx": nnx, "optax": optax, "jaxbn": jaxbn}
    names |= {"functools": functools, "os": os, "tempfile": tempfile}
    tests = doctest.DocTestFinder(exclude_empty=True).find(module, module_name, extraglobs=names)
    return [test for test in tests if test.examples]


def public_names():
    """Every public name of the packages that users import from."""
    named = {
        f"{package.__name__}.{name}": value
        for package in (jaxbn, jaxbn.linen, jaxbn.nnx, jaxbn.serving, jaxbn.testing)
        for name, value in vars(package).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    return [pytest.param(name, value, id=name) for name, value in named.items()]


def section(doc, title):
    """The indented lines below a title in a docstring; empty if there is no section of that title."""
    found = re.search(rf"^{title}:\n((?:(?: .*)?\n?)*)", doc, re.MULTILINE)
    return found.group(1) if found else ""


EXAMPLES = [pytest.param(test, id=test.name) for module in MODULES for test in doctests(module)]


@pytest.mark.sample(every=4)
@pytest.mark.parametrize("test", EXAMPLES)
def test_examples_run(test):
    report = []
    doctest.DocTestRunner(optionflags=FLAGS, verbose=False).run(test, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize(("name", "value"), public_names())
def test_public_names_are_documented(name, value):
    doc = inspect.getdoc(value) or ""
    summary = doc.split("\n\n")[0]
    assert summary and len(summary.splitlines()) == 1 and summary.endswith("."), f"{name} has no one-line summary"
    if name in SUMMARY_ONLY:
        return
    layer = inspect.isclass(value) and issubclass(value, flax.linen.Module)  # its arguments are attributes
    title, parameters = ("Attributes", fields(value)) if layer else ("Args", arguments(value))
    listed = re.findall(r"^    (\w+): ", section(doc, title), re.MULTILINE)
    missing = [parameter for parameter in parameters if parameter not in listed]
    assert not missing, f"{name} says nothing of {missing} under {title}:"
    if not inspect.isclass(value):
        assert section(doc, "Returns"), f"{name} says nothing of what it returns"
    assert section(doc, "Example"), f"{name} has no Example"


def arguments(function):
    if inspect.isclass(function):  # NNX hides the signature of the constructor behind that of its metaclass
        return list(inspect.signature(function.__init__).parameters)[1:]
    return list(inspect.signature(function).parameters)


def fields(layer):
    """The fields of a layer but for those that Flax gives every module."""
    return [field.name for field in dataclasses.fields(layer) if field.name not in ("parent", "name")]


def test_every_example_of_a_public_name_is_found():
    """A decorator such as functools.cache must not hide an example from the test above."""
    found = {param.values[0].name.rsplit(".", 1)[-1] for param in EXAMPLES}
    shown = {name.rsplit(".", 1)[-1] for name, value in (p.values for p in public_names()) if ">>>" in value.__doc__}
    assert shown and shown <= found


def test_the_exceptions_still_exist():
    assert set(SUMMARY_ONLY) <= {param.id for param in public_names()}
