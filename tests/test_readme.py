"""README and guides are correct: blocks run and print the text shown, errors are raised, and links resolve."""

import contextlib
import doctest
import inspect
import io
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import optax
import pytest

import jaxbn
import jaxbn.linen
import jaxbn.nnx
import jaxbn.serving
import jaxbn.testing
from jaxbn._src.serving import atomic_files
from jaxbn._src.serving.files import KIND

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GUIDES = ROOT / "examples" / "guides"
DOCUMENTS = [README, ROOT / ".github" / "CONTRIBUTING.md", *sorted(GUIDES.glob("*.md"))]
ERROR_TABLE = (GUIDES / "errors.md").read_text()

# Commands that users copy on a fresh machine, in a clone of the repository.
COMMANDS = ['pip install ".[examples]" && python examples/digits.py', 'pip install ".[test]" && pytest -n auto']


class Block(NamedTuple):
    """A block of Python with its expected output: comments after `print(...)`, or the block of text below."""

    code: str
    output: str


def blocks_of(document):
    """The Python blocks of a document; they run one after the other with the same names."""
    text = document.read_text()
    found = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", text, re.MULTILINE | re.DOTALL)
    return [Block(code, output or comments(code)) for code, output in found]


def comments(code):
    return "".join(f"{line}\n" for line in re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE))


def per_document(documents):
    return pytest.mark.parametrize("document", documents, ids=lambda path: path.stem)


@per_document([document for document in DOCUMENTS if blocks_of(document)])
def test_blocks_run_and_print_what_they_say(document, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the blocks save files
    names = {"__name__": "document"}
    for block in blocks_of(document):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block.code, document.name, "exec"), names)
        assert lines(printed.getvalue()) == lines(block.output), block.code


def lines(text):
    return [line.rstrip() for line in text.splitlines()]


@per_document(DOCUMENTS)
def test_no_block_escapes(document):
    """Every block of Python is found, and every print shows its output."""
    blocks = blocks_of(document)
    assert len(blocks) == document.read_text().count("```python")
    assert all(block.output for block in blocks if "print(" in block.code)


def test_the_loop_is_that_of_the_docstring():
    example = doctest.DocTestParser().get_examples(jaxbn.linen.make_steps.__doc__)
    source = "".join(part.source for part in example if "frozen.info" not in part.source)
    guide = (GUIDES / "training_loops.md").read_text()
    assert source in guide.replace("\n\n", "\n").replace("\n\n", "\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_stand_on_one_line(command):
    assert f"```sh\n{command}\n```" in README.read_text()


def test_readme_is_short():
    text = README.read_text().splitlines()
    assert len(text) <= 250 and text.index("```python") < 20


def anchors(document):
    """The anchors of the headings of a document, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@per_document(DOCUMENTS)
def test_local_links_lead_somewhere(document):
    missing = []
    for link in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not link.startswith("http") and (not target.exists() or anchor and anchor not in anchors(target)):
            missing.append(link)
    assert not missing


def test_readme_leads_to_every_guide():
    links = re.findall(r"\(examples/guides/(\w+)\.md", README.read_text())
    assert set(links) == {guide.stem for guide in GUIDES.glob("*.md")}


@pytest.mark.parametrize("package", [jaxbn, jaxbn.linen, jaxbn.nnx, jaxbn.serving, jaxbn.testing])
def test_api_at_a_glance_is_complete(package):
    """Every public name has one line."""
    section = re.split(r"^## ", (GUIDES / "api.md").read_text(), flags=re.MULTILINE)
    text = next(part for part in section if part.startswith(f"`{package.__name__}`\n"))
    public = {name for name, value in vars(package).items() if name[0] != "_" and not inspect.ismodule(value)}
    modules = {"checkpoint_policies"} if package is jaxbn else set()
    assert sorted(re.findall(r"^\| `(\w+)` \| \S", text, re.MULTILINE)) == sorted(public | modules)


# From here on, the table of errors.

X = jnp.arange(6.0).reshape(2, 3)
LAYER = jaxbn.linen.BatchNorm(use_running_average=False)
EVALUATION = jaxbn.linen.BatchNorm(use_running_average=True)
TRANSFORM = jaxbn.batch_norm()


def variables():
    return LAYER.init(jax.random.key(0), X)


def params_alone():
    return {"params": variables()["params"]}


def train(x=X, transform=TRANSFORM, **kwargs):
    return transform.train(*TRANSFORM.init(3), x, **kwargs)


def postproc(batches, **options):
    return jaxbn.linen.postproc(EVALUATION.apply, variables(), batches, **options)


def read_before():
    batches = iter([X])
    postproc(batches)
    return batches


def on_devices(**kwargs):
    return jaxbn.linen.BatchNorm(use_running_average=False, axis_name="devices", **kwargs)


def make_steps(model, **kwargs):
    return jaxbn.linen.make_steps(model, lambda y, batch: (y.mean(), {}), optax.sgd(0.1), inputs=lambda x: x, **kwargs)


def steps_on_devices():
    class Net(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x, train):
            return jaxbn.linen.BatchNorm(use_running_average=not train)(x)

    steps = make_steps(Net(), axis_name="devices")
    jax.vmap(lambda x: steps.train_step(steps.init(jax.random.key(0), x), x), axis_name="devices")(X[None])


def load_cut_off():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network")
        jaxbn.serving.save(path, jaxbn.linen.freeze(jaxbn.linen.postproc(EVALUATION.apply, variables(), [X])[0]))
        path.write_bytes(path.read_bytes()[:-1])
        jaxbn.serving.load(path)


def load_forged():
    """Of which the checksum is right."""
    with tempfile.TemporaryDirectory() as folder:
        atomic_files.write(path := Path(folder, "network"), KIND, {})
        jaxbn.serving.load(path)


def export(call, example=X):
    with tempfile.TemporaryDirectory() as folder:
        jaxbn.serving.export(Path(folder, "program"), call, variables(), example)


def capture_members(in_axes):
    params, state = TRANSFORM.init(3)
    members = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state)
    call = jax.vmap(lambda state, x: TRANSFORM.eval(params, state, x), in_axes=(in_axes, None))
    return jaxbn.capture_moments(call)(members, X)


def fold(x):
    net = flax.linen.Sequential([flax.linen.Dense(3), EVALUATION])
    jaxbn.linen.fold(net.apply, net.init(jax.random.key(0), X), x)


# For each row of the table, by the start of its message: the type, and calls that raise it.
ERRORS = {
    "Cannot update variable": (flax.errors.ModifyScopeVariableError, [lambda: LAYER.apply(variables(), X)]),
    "Tried to access": (
        flax.errors.ScopeCollectionNotFound,
        [lambda: LAYER.apply(params_alone(), X), lambda: EVALUATION.apply(params_alone(), X)],
    ),
    "unbound axis name": (
        NameError,
        [
            lambda: on_devices().apply(variables(), X, mutable=["batch_stats"]),
            lambda: train(transform=jaxbn.batch_norm(axis_name="devices")),
        ],
    ),
    'Parameter "use_running_average" was passed': (
        ValueError,
        [lambda: EVALUATION.apply(variables(), X, use_running_average=True)],
    ),
    'Parameter "use_running_average" must be passed': (
        ValueError,
        [lambda: jaxbn.linen.BatchNorm().apply(variables(), X)],
    ),
    "but the parameters and statistics are for": (
        ValueError,
        [lambda: train(jnp.ones((2, 5))), lambda: EVALUATION.apply(variables(), jnp.ones((2, 5)))],
    ),
    "has one value per channel": (
        ValueError,
        [lambda: train(X[:1]), lambda: LAYER.apply(variables(), X[:1], mutable=["batch_stats"])],
    ),
    "gave statistics that are not finite": (ValueError, [lambda: postproc([X, X * jnp.nan])]),
    "does not broadcast to the input": (ValueError, [lambda: train(mask=jnp.ones(2, bool))]),
    'No Variable named "count"': (
        flax.errors.ScopeVariableNotFoundError,
        [lambda: jaxbn.linen.BatchNorm(True, momentum=jaxbn.cumulative()).apply(variables(), X)],
    ),
    'No Variable named "step"': (
        flax.errors.ScopeVariableNotFoundError,
        [lambda: jaxbn.linen.BatchRenorm(True).apply(variables(), X)],
    ),
    "There was no batch to estimate statistics from": (
        ValueError,
        [lambda: postproc([]), lambda: postproc(read_before())],
    ),
    "a diagnosis compares batches": (
        ValueError,
        [lambda: jaxbn.linen.diagnose(EVALUATION.apply, variables(), [X])],
    ),
    "The folded model was rejected": (ValueError, [lambda: fold(X * jnp.nan)]),
    "stop_when needs standard errors": (
        ValueError,
        [lambda: postproc([X], stop_when=0.1, estimator=jaxbn.moving_average())],
    ),
    "There are no statistics of a normalization layer": (
        ValueError,
        [lambda: jaxbn.linen.postproc(EVALUATION.apply, params_alone(), [X])],
    ),
    "There is no state of a normalization method": (
        ValueError,
        [lambda: jaxbn.postproc(lambda state, x: x, params_alone(), [X])],
    ),
    "different types at key path": (
        ValueError,
        [lambda: capture_members(jaxbn.BatchNormState(0, 0, None))],
    ),
    "were never estimated: they are the initial values": (ValueError, [lambda: jaxbn.linen.freeze(variables())]),
    "are not those that the report is about": (
        ValueError,
        [lambda: jaxbn.linen.freeze(variables(), jaxbn.linen.postproc(EVALUATION.apply, variables(), [X])[1])],
    ),
    "would keep running averages": (ValueError, [steps_on_devices]),
    "does not take train": (TypeError, [lambda: make_steps(EVALUATION)]),
    "is damaged or incomplete": (ValueError, [load_cut_off]),
    "normalizes with the statistics": (
        ValueError,
        [lambda: export(lambda variables, x: LAYER.apply(variables, x, mutable=["batch_stats"])[0])],
    ),
    "needs a fixed number of examples": (ValueError, [lambda: export(lambda variables, x: x.reshape(-1, 6))]),
    "accepts it with an additional first axis": (ValueError, [lambda: export(lambda variables, x: x @ X.T, X[0])]),
    "cannot call functions outside of XLA": (
        ValueError,
        [lambda: export(lambda variables, x: x + jnp.linalg.cholesky(jnp.eye(3)).sum())],
    ),
    "is not a frozen network written by jaxbn": (ValueError, [load_forged]),
    "can't apply forward-mode": (
        TypeError,
        [
            lambda: jax.jvp(lambda x: train(x)[0], (X,), (X,)),
            lambda: jax.jacfwd(lambda x: train(x)[0])(X),
        ],
    ),
}


def quoted():
    """The messages in the first column of the table."""
    return re.findall(r"^\| `([^`]+)`(?:, `[^`]+`)* \|", ERROR_TABLE, re.MULTILINE)


def test_every_row_of_the_error_table_is_tested():
    assert len(quoted()) == ERROR_TABLE.count("\n| ") - 1  # the heads
    assert [next(start for start in ERRORS if message.startswith(start)) for message in quoted()] == list(ERRORS)


@pytest.mark.parametrize("message", quoted())
def test_quoted_errors_are_the_real_ones(message):
    error, calls = next(ERRORS[start] for start in ERRORS if message.startswith(start))
    for call in calls:
        with pytest.raises(error, match=re.escape(message)):
            call()


def test_the_fixes_of_the_error_table_work():
    LAYER.apply(variables(), X, mutable=["batch_stats"])
    jaxbn.linen.BatchNorm(use_running_average=False, momentum=None).apply(variables(), X)
    on_devices()  # and where the axis has the name, a batch of one per device is large enough
    jax.vmap(lambda x: on_devices().apply(variables(), x, mutable=["batch_stats"]), axis_name="devices")(X[:, None])
    train(mask=jnp.ones(2, bool)[:, None])
    counted = variables()
    counted["batch_stats"]["count"] = jnp.zeros(())
    jaxbn.linen.BatchNorm(True, momentum=jaxbn.cumulative()).apply(counted, X)
    renorm = jaxbn.linen.BatchRenorm(True)
    renorm.apply(jaxbn.linen.convert_norms(variables(), like=renorm.init(jax.random.key(0), X)), X)
    capture_members(0)
    jax.jvp(lambda x: train(x, jaxbn.batch_norm(autodiff=True))[0], (X,), (X,))
