"""The architecture rules: imports, where arithmetic and collectives may be, and names."""

import ast
import inspect
import pickle
import pydoc
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from cases import CASES
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
import jaxbn.serving
import jaxbn.testing

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "jaxbn" / "_src"
FILES = sorted((ROOT / "jaxbn").rglob("*.py"))
PRIVATE = sorted(SOURCE.rglob("*.py"))
FRAMEWORKS = ["linen", "nnx", "pytree"]
# The floors, from the bottom up: a room may import from itself and from the rooms of the floors before its own.
FLOORS = [
    ["internals", "testing", "public"],
    ["numerics", "display"],
    ["methods", "tracing"],
    ["framework"],
    ["statistics"],
    ["diagnostics", "inference"],
    FRAMEWORKS,
    ["serving", "interop"],
]
ARRAYS, TOOLS = {"jax", "numpy"}, {"jax", "numpy", "scipy"}
# What each room may import of other packages.
OUTSIDE = {
    "internals": {"jax"}, "public": set(), "testing": {"numpy"}, "numerics": ARRAYS,
    "display": ARRAYS | {"matplotlib", "rich"}, "methods": ARRAYS, "tracing": ARRAYS, "framework": ARRAYS,
    "statistics": TOOLS, "diagnostics": TOOLS, "inference": ARRAYS, "linen": {"jax", "flax"}, "nnx": {"jax", "flax"},
    "pytree": {"jax"},
    "serving": ARRAYS | {"flax", "orbax"}, "interop": ARRAYS | {"flax"},
}  # fmt: skip
TYPES_ONLY = {"optax"}  # imported for type hints only

COLLECTIVES = set("psum pmean pmax pmin all_gather all_to_all ppermute psum_scatter axis_index axis_size".split())
ARITHMETIC = COLLECTIVES | set(
    "sum mean average var std sqrt rsqrt square power dot matmul einsum tensordot dot_general max min cumsum "
    "prod nansum nanmean nanvar reduce segment_sum logsumexp norm".split()
)


def room(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def imports(file: Path) -> tuple[set[str], set[str]]:
    """The imports of a file at run time, and its imports for type hints only."""
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


def floor(name: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if name in rooms)


def is_allowed(here: str, name: str) -> bool:
    """Whether a file of the room `here` may import `name`."""
    package, *rest = name.split(".")
    if package == "jaxbn":
        there = rest[1] if rest[0] == "_src" else None  # the public packages are for users
        return there == here or (there not in (None, "testing") and floor(there) < floor(here))
    return package != "" and (package in sys.stdlib_module_names or package in OUTSIDE[here])


def imported_files(file: Path) -> set[Path]:
    """The files of jaxbn that a file imports."""
    names = {name for found in imports(file) for name in found if name.startswith("jaxbn.")}
    paths = {ROOT / f"{part.replace('.', '/')}.py" for name in names for part in (name, name.rpartition(".")[0])}
    return paths & set(PRIVATE)


def test_rooms_are_those_of_the_plan():
    assert {room(file) for file in PRIVATE} == {"__init__", *OUTSIDE}
    assert {file.relative_to(ROOT / "jaxbn").parts[0] for file in set(FILES) - set(PRIVATE)} == {
        "__init__.py", "linen", "nnx", "serving", "testing"
    }  # fmt: skip


def test_imports_are_absolute_and_go_down():
    wrong = set()
    for file in PRIVATE:
        running, for_types = imports(file)
        wrong |= {(name_of(file), name) for name in running if not is_allowed(room(file), name)}
        wrong |= {(name_of(file), name) for name in for_types - TYPES_ONLY}
    assert not wrong


def test_no_file_imports_itself_by_way_of_others():
    left = {file: imported_files(file) for file in PRIVATE}
    while free := [file for file, needs in left.items() if not needs & left.keys()]:
        left = {file: needs for file, needs in left.items() if file not in free}
    assert not {name_of(file) for file in left}


def test_only_tests_import_around_the_public_packages():
    files = [*(ROOT / "examples").rglob("*.py"), *(ROOT / "README.md", *(ROOT / "examples").rglob("*.md"))]
    assert not {name_of(file) for file in files if re.search(r"import .*_src|from jaxbn\._src", file.read_text())}


def test_frameworks_contain_no_arithmetic():
    wrong = {
        (name_of(file), name) for file in PRIVATE if room(file) in FRAMEWORKS for name in called(file) & ARITHMETIC
    }
    assert not wrong


def test_collectives_live_in_one_file():
    others = set(FILES) - {SOURCE / "numerics" / "collectives.py"}
    wrong = {(name_of(file), name) for file in others for name in called(file) & (COLLECTIVES - {"axis_size"})}
    assert not wrong


def test_files_are_short():
    lines = {name_of(file): len(file.read_text().splitlines()) for file in FILES}
    assert not {name: count for name, count in lines.items() if count > 320}


def test_only_re_exports_in_init():
    packages = [file for file in FILES if file.name == "__init__.py"]
    kinds = {(name_of(file), type(node)) for file in packages for node in ast.parse(file.read_text()).body}
    others = {(name, kind) for name, kind in kinds if kind not in {ast.ImportFrom, ast.Expr}}
    assert others == {("jaxbn/__init__.py", ast.If), ("jaxbn/__init__.py", ast.Import)}  # for the lazy imports


PUBLIC = [jaxbn, jaxbn.linen, jaxbn.nnx, jaxbn.serving, jaxbn.testing]


def test_public_names_live_in_the_public_packages():
    """Pickles, help and error messages then name what users import."""
    for package in PUBLIC:
        named = {name: value for name, value in vars(package).items() if name[0] != "_" and callable(value)}
        assert named and {value.__module__ for value in named.values()} == {package.__name__}
        assert all(pickle.loads(pickle.dumps(value)) is value for value in named.values())


def test_pickles_name_no_private_module():
    """Pickles of users can be read after a private module was renamed."""
    x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
    layer, model = jaxbn.linen.BatchNorm(use_running_average=True), jaxbn.nnx.BatchNorm(2, rngs=nnx.Rngs(0))
    frozen = jaxbn.linen.freeze(*jaxbn.linen.postproc(layer.apply, layer.init(jax.random.key(0), x), [x]))
    states = [case.factory(**case.arguments).init(2) for case in CASES]
    pickled = [pickle.dumps(value) for value in (layer, model, frozen, states)]
    assert not [data for data in pickled if b"jaxbn" not in data or b"jaxbn._src" in data]
    again = [pickle.loads(data) for data in pickled]
    assert again[0] == layer and type(again[1]) is jaxbn.nnx.BatchNorm and again[2].info == frozen.info


def test_one_import_is_enough():
    """The subpackages come when they are first used, and `dir` and `help` show them before."""
    code = """
import sys, jaxbn
packages = ["linen", "nnx", "serving", "testing"]
assert not any(f"jaxbn.{name}" in sys.modules for name in packages) and {*packages, "__version__"} <= {*dir(jaxbn)}
assert all(getattr(jaxbn, name) is sys.modules[f"jaxbn.{name}"] for name in packages)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="module 'jaxbn' has no attribute 'lenin'"):
        jaxbn.lenin  # noqa: B018
    text = pydoc.plain(pydoc.render_doc(jaxbn))
    assert "class BatchNormState" in text and "\n    batch_norm(" in text


SHARED = {"__init__", "captured", "protocol", "batch_renorm_schedules"}  # files of methods/ that are not a method
METHODS = sorted({file.stem for file in (SOURCE / "methods").glob("*.py")} - SHARED)


def test_one_stem_for_each_method():
    """File, factory, state, module and rows in the list of cases share one name."""
    for stem in METHODS:
        camel = "".join(word.capitalize() for word in stem.split("_"))
        factory, state = getattr(jaxbn, stem), getattr(jaxbn, f"{camel}State")
        assert Path(inspect.getfile(factory)).stem == stem and factory.__module__ == state.__module__ == "jaxbn"
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
    assert jaxbn.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert not re.search(r"\d+\.\d+\.\d+", (ROOT / "jaxbn" / "__init__.py").read_text())
