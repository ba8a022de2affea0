"""The house rules: who imports whom, who computes, where collectives are, and what things are called."""

import ast
import re
import sys
from pathlib import Path

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


def room(file: Path) -> str | None:
    parts = file.relative_to(ROOT / "jaxbn").parts
    return parts[0] if len(parts) > 1 else None


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def imports(file: Path) -> tuple[set[str], set[str]]:
    """What a file imports where the code runs, and what it imports for type hints alone."""
    found, for_types = set(), set()
    tree = ast.parse(file.read_text())
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    hidden = {inner for block in blocks for inner in ast.walk(block)}
    for node in ast.walk(tree):
        names = for_types if node in hidden else found
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return found, for_types


def called(file: Path) -> set[str]:
    """Names of the functions that a file calls, and all that it takes from JAX: the x of x(), a.x() and jnp.x."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            names.add(node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id)
        elif isinstance(node, ast.Attribute) and re.match(r"(jax|jnp|lax|np)\b", ast.unparse(node)):
            names.add(node.attr)
    return names


def is_allowed(here: str | None, name: str) -> bool:
    """Whether a file of the room `here` (None: the package itself) may import `name`."""
    package, _, rest = name.partition(".")
    if package == "jaxbn":
        there = rest.split(".")[0]
        below = ROOMS if here is None else ROOMS[: ROOMS.index(here) + 1]
        return there in below and here in USERS.get(there, {here})
    relative = package == ""
    return not relative and (here is None or package in sys.stdlib_module_names or package in OUTSIDE[here])


def test_rooms_are_those_of_the_plan():
    assert {room(file) for file in FILES} == {None, *ROOMS}


def test_imports_are_absolute_and_go_down():
    wrong = set()
    for file in FILES:
        running, for_types = imports(file)
        wrong |= {(name_of(file), name) for name in running if not is_allowed(room(file), name)}
        wrong |= {(name_of(file), name) for name in for_types - TYPES_ONLY}
    assert not wrong


def test_hosts_compute_nothing():
    wrong = {(name_of(file), name) for file in FILES if room(file) in HOSTS for name in called(file) & ARITHMETIC}
    assert not wrong


def test_collectives_live_in_one_file():
    others = set(FILES) - {ROOT / "jaxbn" / "core" / "devices.py"}
    wrong = {(name_of(file), name) for file in others for name in called(file) & (COLLECTIVES - {"axis_size"})}
    assert not wrong


def test_files_are_short():
    lines = {name_of(file): len(file.read_text().splitlines()) for file in FILES}
    assert not {name: count for name, count in lines.items() if count > 320}


def test_only_re_exports_in_init():
    packages = [file for file in FILES if file.name == "__init__.py"]
    kinds = {(name_of(file), type(node)) for file in packages for node in ast.parse(file.read_text()).body}
    assert not {(name, kind) for name, kind in kinds if kind not in {ast.ImportFrom, ast.Expr}}


SHARED = {"__init__", "base", "schedules"}  # files of methods/ that are no method
METHODS = sorted({file.stem for file in (ROOT / "jaxbn" / "methods").glob("*.py")} - SHARED)


def test_one_stem_for_each_method():
    """File, factory, state, module and rows in the list of cases share one name."""
    for stem in METHODS:
        camel = "".join(word.capitalize() for word in stem.split("_"))
        factory, state = getattr(jaxbn, stem), getattr(jaxbn, f"{camel}State")
        assert factory.__module__ == state.__module__ == f"jaxbn.methods.{stem}"
        rows = [case for case in CASES if case.factory is factory]
        assert rows and all(case.name.startswith(stem) for case in rows), stem
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
