"""The house rules: who imports whom, who computes, where collectives are, and what things are called."""

import ast
import re
from pathlib import Path

import pytest
from cases import CASES

import jaxbn
import jaxbn.linen
import jaxbn.nnx

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "jaxbn").rglob("*.py"))
# From the bottom to the top; a room may import from those before it. The reference vectors share nothing with the rest.
ROOMS = ["testing", "core", "methods", "population", "linen", "nnx", "serving"]
HOSTS = ["linen", "nnx"]
# Who may import from a room, where not all above it may: hosts do not import from each other.
USERS = {"linen": {"linen", "serving"}, "nnx": {"nnx", "serving"}, "testing": {"testing"}}
OUTSIDE = {"core": {"jax", "numpy"}, "methods": {"jax", "numpy"}}
OUTSIDE |= {"population": {"jax", "matplotlib", "numpy", "rich", "scipy"}}
OUTSIDE |= {host: {"jax", "flax"} for host in HOSTS} | {"testing": {"numpy"}}
OUTSIDE |= {"serving": {"jax", "flax", "numpy", "orbax"}}
TYPES_ONLY = {"optax"}  # imported for type hints, where nothing runs

COLLECTIVES = set("psum pmean pmax pmin all_gather all_to_all ppermute psum_scatter axis_index axis_size".split())
ARITHMETIC = COLLECTIVES | set(
    "sum mean average var std sqrt rsqrt square power dot matmul einsum tensordot dot_general max min cumsum "
    "prod nansum nanmean nanvar reduce segment_sum logsumexp norm".split()
)

every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))


def room(file: Path) -> str | None:
    parts = file.relative_to(ROOT / "jaxbn").parts
    return parts[0] if len(parts) > 1 else None


def imports(file: Path) -> set[str]:
    found = set()
    tree = ast.parse(file.read_text())
    for_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    hidden = {inner for block in for_types for inner in ast.walk(block)}
    for node in ast.walk(tree):
        if node in hidden:
            assert not isinstance(node, ast.ImportFrom)
            assert not isinstance(node, ast.Import) or {alias.name for alias in node.names} <= TYPES_ONLY
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def called(file: Path) -> set[str]:
    """Names of the functions that a file calls, and all that it takes from JAX: the x of x(), a.x() and jnp.x."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            names.add(node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id)
        elif isinstance(node, ast.Attribute) and re.match(r"(jax|jnp|lax|np)\b", ast.unparse(node)):
            names.add(node.attr)
    return names


def test_rooms_are_those_of_the_plan():
    assert {room(file) for file in FILES} == {None, *ROOMS}


@every_file
def test_imports_go_down(file):
    here = room(file)
    for name in imports(file):
        package, *rest = name.split(".")
        if package == "jaxbn":
            there = rest[0]
            allowed = ROOMS if here is None else ROOMS[: ROOMS.index(here) + 1]
            assert there in allowed, f"{file.name} imports {name}"
            assert here in USERS.get(there, {here}), (
                f"{there} is alone, and the package itself does not need it: {name}"
            )
        elif here is not None:
            standard = package in __import__("sys").stdlib_module_names
            assert standard or package in OUTSIDE[here], f"{file.name} imports {name}"


@every_file
def test_hosts_compute_nothing(file):
    if room(file) in HOSTS:
        assert not called(file) & ARITHMETIC


@every_file
def test_collectives_live_in_one_file(file):
    if file != ROOT / "jaxbn" / "core" / "devices.py":
        assert not called(file) & (COLLECTIVES - {"axis_size"})


@every_file
def test_files_are_short(file):
    assert len(file.read_text().splitlines()) <= 320


@every_file
def test_only_re_exports_in_init(file):
    if file.name == "__init__.py":
        kinds = {type(node) for node in ast.parse(file.read_text()).body}
        assert kinds <= {ast.ImportFrom, ast.Expr}


SHARED = {"__init__", "base", "schedules"}  # files of methods/ that are no method
METHODS = sorted({file.stem for file in (ROOT / "jaxbn" / "methods").glob("*.py")} - SHARED)


@pytest.mark.parametrize("stem", METHODS)
def test_one_stem_for_each_method(stem):
    """File, factory, state, module and rows in the list of cases share one name."""
    camel = "".join(word.capitalize() for word in stem.split("_"))
    factory, state = getattr(jaxbn, stem), getattr(jaxbn, f"{camel}State")
    assert factory.__module__ == state.__module__ == f"jaxbn.methods.{stem}"
    rows = [case for case in CASES if case.factory is factory]
    assert rows and all(case.name.startswith(stem) for case in rows)
    for case in rows:
        assert (case.linen, case.nnx) == (getattr(jaxbn.linen, camel), getattr(jaxbn.nnx, camel))


def test_every_factory_has_rows():
    made_by = {case.factory.__name__ for case in CASES}
    assert made_by == set(METHODS)


def test_top_level():
    left_by_tools = {"build", "dist", "digits.png", "digits.jaxbn", "digits.program", "input_distributions.png"}
    top = {path.name for path in ROOT.iterdir() if not re.match(r"\.|.*\.egg-info$|__pycache__", path.name)}
    assert top - left_by_tools == {"pyproject.toml", "README.md", "LICENSE", "jaxbn", "tests", "examples"}


def test_version_has_one_home():
    assert not re.search(r"\d+\.\d+\.\d+", (ROOT / "jaxbn" / "__init__.py").read_text())
