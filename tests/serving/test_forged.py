"""Maliciously changed files with correct checksums: loading gives an error that names the file, or a network.

The tests change the header and the bytes after it, and then correct the checksums. Whatever the change, no code in the
files is executed, nothing outside of the folder is read or written, and no more memory is used than the files hold.
"""

import copy
import hashlib
import json
import os
import resource
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
import jaxbn.serving

LAYER = jaxbn.LayerInfo("batch_norm", 1e-5, "pooled", 20.0)
INFO = jaxbn.Info((("norm", LAYER),), (("jaxbn", "0.1"), ("jax", "0.10")))
MANIFEST = "manifest.jaxbn"
QUICK, MANY = 40, 500


def network():
    """A network with several dtypes and containers."""
    params = {"norm": {"scale": np.ones(2, "f4"), "bias": np.zeros(2, "f4")}, "list": [np.ones((3, 2), "f4"), ()]}
    params |= {"items": {3: np.ones(2, np.uint8)}, "half": np.ones(5, jnp.bfloat16), "flags": np.array([True, False])}
    return jaxbn.Frozen(
        {"params": params, "batch_stats": {"norm": {"mean": np.zeros(2, "f4"), "var": np.ones(2, "f4") * 2}}}, INFO
    )


# --- Forging ----------------------------------------------------------------------------------------------------------

VALUES = [None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**40, 2**62, 10**30, 1e308, 0.5, "", "x", "float32", "int2"]
VALUES += ["object", "|O", "S9", "datetime64[D]", ">f4", "<f4", "void8", "list", "tuple", "items", "frozen", "bool"]
VALUES += ["..", "../outside", "../../outside/secret", "/etc/passwd", "arrays/../../../outside/secret", "\0", "a" * 999]
VALUES += [[], {}, [[]], [[[]]], [None], ["list", []], ["float32", [2]], ["float32", [2**40]], ["float32", [0, 2**60]]]
VALUES += [{"__class__": "os.system"}, "!!python/object:os.system", {"id": "zstd", "level": 1}, {"id": "blosc"}]


def paths_in(value, path=()):
    """Returns all positions in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, part in inner for found in paths_in(part, (*path, key)))]


def changed(rng, value):
    """Returns a JSON value in which one position is replaced, removed, renamed or repeated."""
    value = copy.deepcopy(value)
    places = [path for path in paths_in(value) if path]
    if not places:
        return VALUES[rng.integers(len(VALUES))]
    *path, last = places[rng.integers(len(places))]
    holder = value
    for key in path:
        holder = holder[key]
    kind, new = rng.integers(5), copy.deepcopy(VALUES[rng.integers(len(VALUES))])
    if kind == 0:
        del holder[last]
    elif kind == 1 and isinstance(holder, dict):
        holder[str(new)[:50]] = holder.pop(last)
    elif kind == 2 and isinstance(holder, list):
        holder.insert(last, holder[last])
    elif kind == 3 and type(holder[last]) is int:
        holder[last] = [holder[last] + 1, holder[last] * 2**40, -holder[last]][rng.integers(3)]
    else:
        holder[last] = new
    return value


def spoiled(rng, content):
    """Returns bytes that are truncated, extended or replaced."""
    kind, at = rng.integers(4), int(rng.integers(len(content) + 1))
    some = rng.bytes(int(rng.integers(1, 9)))
    return (
        content[:at],
        content[:at] + some + content[at:],
        content + some,
        content[:at] + some + content[at + len(some) :],
    )[kind]


def read(path):
    """Reads the header and the body."""
    line, body = path.read_bytes().split(b"\n", 1)
    return json.loads(line), body


def write(path, header, body=b""):
    """Writes a file with any header, with a correct checksum if the header is a dict."""
    line = lambda header: json.dumps(header, separators=(",", ":")).encode() + b"\n"
    if isinstance(header, dict):
        header = {key: value for key, value in header.items() if key != "sha256"}
        header["sha256"] = hashlib.sha256(line(header) + body).hexdigest()
    path.write_bytes(line(header) + body)


def forge_file(rng, path):
    header, body = read(path)
    for _ in range(rng.integers(1, 3)):
        header = changed(rng, header) if rng.random() < 0.8 or not isinstance(header, dict) else header
        body = spoiled(rng, body) if rng.random() < 0.25 else body
    write(path, header, body)


def forge_folder(rng, folder):
    """Changes files of the step and the manifest, and in most cases corrects their checksums."""
    header, _ = read(folder / MANIFEST)
    step = folder / header["step"]
    for _ in range(rng.integers(0, 3)):
        files = sorted(path for path in step.rglob("*") if path.is_file())
        forge_part(rng, step, files[rng.integers(len(files))], folder.parent / "outside")
    if rng.random() < 0.7:
        header["files"] = {
            path.relative_to(step).as_posix(): [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
            for path in sorted(step.rglob("*"))
            if path.is_file() and path.stat().st_size < 10**6
        }
    if rng.random() < 0.5:
        header = changed(rng, header)
    if rng.random() < 0.05:
        header |= {"files": {}}
    write(folder / MANIFEST, header)


def forge_part(rng, step, file, outside):
    """Changes a file of a step, moves it, replaces it with a link, or adds another."""
    kind = rng.integers(8)
    if kind < 4:
        try:
            content = json.dumps(changed(rng, json.loads(file.read_bytes()))).encode()
        except ValueError:
            content = spoiled(rng, file.read_bytes())
        file.write_bytes(content)
    elif kind == 4:
        file.write_bytes(spoiled(rng, file.read_bytes()))
    elif kind == 5:
        file.unlink()
        file.symlink_to(outside / "secret")
    elif kind == 6:
        file.rename(file.with_name(["manifest.ocdbt", "zarr.json", "0.0", "more", ".zgroup"][rng.integers(5)]))
    else:
        (file.parent / ["zarr.json", "manifest.ocdbt", "9.9", "more"][rng.integers(4)]).write_bytes(rng.bytes(20))


# --- Results ----------------------------------------------------------------------------------------------------------

WATCHED = threading.local()
EXECUTION = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class", "exec"}
WRITING = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.symlink", "os.link", "os.truncate"}


def watch(event, arguments):
    """An audit hook that records the actions of Python; it cannot be removed."""
    seen = getattr(WATCHED, "seen", None)
    if seen is not None and (event in EXECUTION or event in WRITING or event == "open"):
        seen.append((event, arguments))


@pytest.fixture(scope="module", autouse=True)
def hook():
    sys.addaudithook(watch)


@pytest.fixture
def bounded():
    """Limits further memory to 2 GB, which is less than the forged sizes of 2^40 bytes and more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**31, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def snapshot(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*") if not path.is_symlink()}


def outcome(load, path, outside):
    """Returns the network, or None for a ValueError that names the file; fails for forbidden actions."""
    before = snapshot(path.parent)
    WATCHED.seen = []
    try:
        found = load(path)
    except ValueError as error:
        assert type(error) is ValueError and str(path) in str(error), error
        found = None
    finally:
        seen, WATCHED.seen = WATCHED.seen, None
    for event, arguments in seen:
        assert event not in EXECUTION or (event == "exec" and "site-packages" in str(arguments)), (event, arguments)
        assert event not in WRITING, (event, arguments)
        assert str(outside) not in os.path.realpath(str(arguments[0])), (event, arguments)
    assert snapshot(path.parent) == before
    return found


def is_network(found, size):
    """Whether this is a valid network, with no more bytes than the files."""
    leaves = jax.tree.leaves(found.variables)
    return all(isinstance(leaf, jax.Array) for leaf in leaves) and sum(leaf.nbytes for leaf in leaves) <= size


KINDS = {
    "file": (jaxbn.serving.save, jaxbn.serving.load, forge_file),
    "folder": (jaxbn.serving.save_sharded, jaxbn.serving.load_sharded, forge_folder),
}
SEEDS = [
    pytest.param(range(QUICK), id="quick"),
    pytest.param(range(QUICK, MANY), id="many", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("save, load, forge", KINDS.values(), ids=KINDS.keys())
def test_forged_networks(save, load, forge, seeds, tmp_path, bounded):
    outside, refused = tmp_path / "outside", 0
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    save(tmp_path / "network", network())
    original = snapshot(tmp_path) if (tmp_path / "network").is_dir() else None
    for seed in seeds:
        path = tmp_path / f"of {seed}" / "network"
        path.parent.mkdir()
        if original is None:
            path.write_bytes((tmp_path / "network").read_bytes())
        else:
            for old, content in original.items():
                new = path.parent / old.relative_to(tmp_path)
                new.mkdir() if content is None else new.write_bytes(content)
        forge(np.random.default_rng(seed), path)
        found = outcome(load, path, outside)
        refused += found is None
        if found is not None:
            size = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
            assert is_network(found, size), seed
            jaxbn.serving.save(path.parent / "again", found)
            again = jaxbn.serving.load(path.parent / "again")
            assert jax.tree.structure(again) == jax.tree.structure(found)
    assert 0.5 * len(seeds) < refused  # the others are networks with other names or numbers
    assert (outside / "secret").read_bytes() == b"secret"


# --- Typical attacks --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    jaxbn.serving.save_sharded(tmp_path / "network", network())
    return tmp_path / "network"


def step_of(folder):
    return folder / read(folder / MANIFEST)[0]["step"]


def refusal(load, path):
    with pytest.raises(ValueError) as raised:
        load(path)
    assert type(raised.value) is ValueError and str(path) in str(raised.value)
    return str(raised.value)


def test_a_manifest_without_files_is_rejected(folder):
    """And so is a manifest that omits some files, whose checksums would not be checked."""
    header, _ = read(folder / MANIFEST)
    (chunk,) = [name for name, (size, _) in header["files"].items() if name.startswith("arrays/0/") and size == 8]
    (step_of(folder) / chunk).write_bytes(b"forged!!")
    write(folder / MANIFEST, header | {"files": {}})
    assert "is not in the manifest of the network" in refusal(jaxbn.serving.load_sharded, folder)
    write(
        folder / MANIFEST, header | {"files": {name: known for name, known in header["files"].items() if name != chunk}}
    )
    assert f"{chunk} is not in the manifest of the network" in refusal(jaxbn.serving.load_sharded, folder)


@pytest.mark.parametrize("name", ["../../outside/secret", "arrays/../../../outside/secret", "/outside/secret", ".", ""])
def test_names_do_not_lead_out_of_the_folder(name, folder):
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    header, _ = read(folder / MANIFEST)
    name = name.replace("/outside", str(outside)) if name.startswith("/") else name
    known = [6, hashlib.sha256(b"secret").hexdigest()]
    write(folder / MANIFEST, header | {"files": header["files"] | {name: known}})
    assert outcome(jaxbn.serving.load_sharded, folder, outside) is None


def test_symbolic_links_are_not_followed(folder):
    """Links in the place of a file, a folder in the step, the step, and the manifest, in loading and saving."""
    outside = folder.parent / "outside"
    outside.mkdir()
    step = step_of(folder)
    for path in (step / "arrays" / "0" / "0", step / "arrays" / "0", step / "arrays", step, folder / MANIFEST):
        moved = outside / "moved"
        path.rename(moved)
        path.symlink_to(moved)
        assert outcome(jaxbn.serving.load_sharded, folder, outside) is None
        if path.name == MANIFEST:
            content = moved.read_bytes()
            with pytest.raises(ValueError, match="is a symbolic link, and saving would write elsewhere"):
                jaxbn.serving.save_sharded(folder, network())
            assert moved.read_bytes() == content
        path.unlink()
        moved.rename(path)
    jaxbn.serving.load_sharded(folder)


SHAPES = {"more": [4], "fewer": [1], "another rank": [1, 2], "huge": [2**40], "beyond": [10**30], "none": [0]}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes_that_the_files_do_not_hold(shape, folder, bounded):
    """The wrong shape is in the manifest, in the metadata of the array, or in both."""
    header, _ = read(folder / MANIFEST)
    metadata = step_of(folder) / "arrays" / "0" / ".zarray"
    forged = copy.deepcopy(header)
    forged["arrays"]["batch_stats"]["norm"]["mean"] = ["float32", shape]
    write(folder / MANIFEST, forged)
    refusal(jaxbn.serving.load_sharded, folder)
    for chunks in (shape, [2], [1] * len(shape)):
        content = json.dumps(json.loads(metadata.read_bytes()) | {"shape": shape, "chunks": chunks}).encode()
        metadata.write_bytes(content)
        for manifest in (header, forged):
            manifest["files"]["arrays/0/.zarray"] = [len(content), hashlib.sha256(content).hexdigest()]
            write(folder / MANIFEST, manifest)
            refusal(jaxbn.serving.load_sharded, folder)


def test_dtypes_of_the_manifest_are_those_of_the_files(folder):
    header, _ = read(folder / MANIFEST)
    for dtype in ("int32", "uint32", "float16", "complex64"):
        header["arrays"]["batch_stats"]["norm"]["mean"] = [dtype, [2]]
        write(folder / MANIFEST, header)
        assert ".zarray is not the metadata of" in refusal(jaxbn.serving.load_sharded, folder)


def test_arrays_that_would_be_decompressed(folder):
    """A few bytes of a compressed chunk can decompress to any number of bytes."""
    header, _ = read(folder / MANIFEST)
    metadata = step_of(folder) / "arrays" / "0" / ".zarray"
    known = json.loads(metadata.read_bytes())
    for more in ({"compressor": {"id": "zstd", "level": 1}}, {"filters": [{"id": "zlib"}]}, {"fill_value": 1.0}):
        content = json.dumps(known | more).encode()
        metadata.write_bytes(content)
        header["files"]["arrays/0/.zarray"] = [len(content), hashlib.sha256(content).hexdigest()]
        write(folder / MANIFEST, header)
        assert ".zarray is not the metadata of" in refusal(jaxbn.serving.load_sharded, folder)


def test_a_file_whose_header_promises_more(tmp_path, bounded):
    jaxbn.serving.save(path := tmp_path / "network", network())
    header, body = read(path)
    for shape in ([2**38], [2**20, 2**20], [10**30], [0, 2**60], [3], [-2]):
        header["arrays"]["batch_stats"]["norm"]["mean"] = ["float32", shape]
        write(path, header, body)
        refusal(jaxbn.serving.load, path)


def test_booleans_are_one_or_zero(tmp_path, folder):
    jaxbn.serving.save(path := tmp_path / "file", jaxbn.Frozen({"flags": np.array([True, False])}, INFO))
    header, body = read(path)
    write(path, header, body[:-2] + b"\1\7")
    assert "a boolean value" in refusal(jaxbn.serving.load, path)


# --- Programs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("programs") / "program"
    call = lambda variables, x: x * variables["scale"][None] + variables["shift"][0][None]
    variables = {"scale": np.ones(3, "f4"), "shift": [np.zeros(3, "f4")]}
    jaxbn.serving.export(path, call, variables, np.ones((2, 3), np.float32))
    return path.read_bytes()


def test_forged_programs(exported, tmp_path, bounded):
    """Changes the header, the arrays and the module; a program that loads checks its inputs."""
    path, outside, refused = tmp_path / "program", tmp_path.parent / "outside", 0
    for seed in range(QUICK):
        path.write_bytes(exported)
        rng = np.random.default_rng(seed)
        header, body = read(path)
        if seed % 2:
            header = changed(rng, header)
        else:
            start = header["program"]
            parts = [body[:start], body[start:]]
            part = int(rng.integers(2))
            parts[part] = spoiled(rng, parts[part])
            body = b"".join(parts)
        write(path, header, body)
        program = outcome(jaxbn.serving.load_program, path, outside)
        refused += program is None
    assert 0.4 * QUICK < refused


def foreign(name):
    """A program that calls a function of the process, which `jax.export` writes if this is allowed."""

    def call(arrays, batch):
        return jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(batch.shape, batch.dtype))(batch) + arrays[0][None]

    specs = (
        [jax.ShapeDtypeStruct((3,), jnp.float32)],
        jax.ShapeDtypeStruct((jax.export.symbolic_shape("b")[0], 3), jnp.float32),
    )
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name)]
    return jax.export.export(jax.jit(call), platforms=["cpu"], disabled_checks=allowed)(*specs)


CALLS = ["xla_ffi_python_cpu_callback", "lapack_sgetrf_ffi", "Sharding2", "a.b", "stablehlo.custom_call @Sharding("]


@pytest.mark.parametrize("name", CALLS)
def test_foreign_calls_are_refused_before_anything_runs(name, exported, tmp_path):
    path = tmp_path / "program"
    path.write_bytes(exported)
    header, _ = read(path)
    program = bytes(foreign(name).serialize())
    header |= {"program": len(program), "arrays": ["list", [["float32", [3]]]]}
    write(path, header, program + np.ones(3, "f4").tobytes())
    assert "The program calls " in refusal(jaxbn.serving.load_program, path)


def test_models_with_foreign_calls_are_not_exported(tmp_path):
    call = lambda _, x: jnp.linalg.cholesky(x)
    with pytest.raises(ValueError, match="The program calls 'lapack_spotrf_ffi'. A program cannot call functions"):
        jaxbn.serving.export(tmp_path / "program", call, {}, np.ones((2, 3, 3), np.float32))
    assert not list(tmp_path.iterdir())


def test_programs_of_other_arrays_are_refused(exported, tmp_path):
    path = tmp_path / "program"
    path.write_bytes(exported)
    header, body = read(path)
    for arrays in ([["float32", [6]]], [["int32", [3]], ["float32", [3]]], [["float32", [3]], ["float32", [1, 3]]], []):
        write(path, header | {"arrays": ["list", arrays]}, body[: header["program"]] + bytes(4 * 6 if arrays else 0))
        assert "its arrays do not fit the program" in refusal(jaxbn.serving.load_program, path)
