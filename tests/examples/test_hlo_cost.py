"""Tests of benchmarks/hlo_cost.py on small handwritten HLO programs and on one that XLA compiles."""

import jax
import jax.numpy as jnp
import pytest
from programs import load_program

KB = 256 * 4  # bytes of an f32[256]


@pytest.fixture(scope="module")
def meter():
    """The program as a module."""
    return load_program("benchmarks/hlo_cost.py")


@pytest.fixture
def kernels(meter):
    """The kernels of a module, given the lines of its entry and complete other computations."""

    def kernels(entry, before=""):
        lines = "\n".join(f"  {line.strip()}" for line in entry.strip().splitlines())
        text = f"HloModule m, is_scheduled=true\n\n{before}\nENTRY %main (x: f32[256]) -> f32[256] {{\n{lines}\n}}\n"
        return list(meter.run(meter.parse(text)))

    return kernels


def computation(name, *lines):
    body = "\n".join(f"  {line}" for line in lines)
    return f"%{name} (p: f32[256]) -> f32[256] {{\n{body}\n}}\n\n"


@pytest.mark.parametrize(
    ("type_text", "size"),
    [
        ("f32[]", 4),
        ("bf16[2,3]{1,0}", 12),
        ("pred[5]", 5),
        ("s4[6]{0}", 3),
        ("f8e4m3fn[3]{0}", 3),
        ("(f32[2]{0}, /*index=1*/(u8[3]{0}, c64[]))", 19),
        ("token[]", 0),
        ("bf16[8,128]{1,0:T(8,128)(2,1)}", 2048),
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 0),  # in the memory of the chip
        ("(f32[2]{0:T(128)S(1)}, f32[2]{0:T(128)}, u32[]{:S(2)})", 8),
        ("f32[2]{0:S(5)}", 8),  # in that of the host
    ],
)
def test_sizes_of_types(meter, type_text, size):
    assert meter.size(type_text) == size


def test_a_kernel_reads_its_operands_and_writes_its_result(kernels):
    found = kernels(
        """%x = f32[256]{0} parameter(0), metadata={op_name="v['a(b']"}
        %b = f32[2,128]{1,0} bitcast(%x)
        %copy.1 = f32[2,128]{0,1} copy(%b)
        %pair = (f32[256]{0}, f32[]) custom-call(%x, %copy.1, %x), custom_call_target="f"
        ROOT %y = f32[256]{0} get-tuple-element(%pair), index=0"""
    )

    assert [(kernel.name, kernel.moved) for kernel in found] == [("copy.1", 2 * KB), ("pair", 3 * KB + 4)]


def test_scratch_memory_of_a_library_is_not_moved(kernels):
    entry = '%y = (f32[256]{0}, u8[4096]{0}) custom-call(%x), custom_call_target="__cudnn$convForward"'

    assert kernels(f"%x = f32[256]{{0}} parameter(0)\n{entry}")[0].moved == 2 * KB


X = "%x = f32[256]{0} parameter(0)\n"


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        ("%y = f32[64]{0} slice(%x), slice={[0:64]}", 2 * 64 * 4),
        ("%y = f32[64]{0} dynamic-slice(%x, %n), dynamic_slice_sizes={64}", 2 * 64 * 4 + 4),
        ("%y = f32[256]{0} dynamic-update-slice(%x, %part, %n)", 2 * 64 * 4 + 4),  # in place
    ],
)
def test_slices_count_as_slices(kernels, line, moved):
    parameters = X + "%n = s32[] parameter(1)\n%part = f32[64]{0} parameter(2)\n"

    assert [kernel.moved for kernel in kernels(parameters + line)] == [moved]


SLICING = computation(
    "fused",
    "%p = f32[256]{0} parameter(0)",
    "%q = f32[256]{0} parameter(1)",
    "%view = f32[2,128]{1,0} bitcast(%p)",
    "%a = f32[1,128]{1,0} slice(%view), slice={[0:1], [0:128]}",
    "%b = f32[1,64]{1,0} slice(%view), slice={[0:1], [0:64]}",
    "ROOT %sum = f32[256]{0} add(%a, %b, %q)",
)


@pytest.mark.parametrize(("operands", "moved"), [("%x, %z", 192 * 4 + 2 * KB), ("%x, %x", 2 * KB)])
def test_a_fusion_reads_the_slices_that_it_uses(kernels, operands, moved):
    fusion = f"ROOT %f = f32[256]{{0}} fusion({operands}), kind=kLoop, calls=%fused"

    found = kernels(f"{X}%z = f32[256]{{0}} parameter(1)\n{fusion}", SLICING)

    assert [kernel.moved for kernel in found] == [moved]


UPDATING = computation(
    "fused",
    "%p = f32[256]{0} parameter(0)",
    "%new = f32[8]{0} parameter(1)",
    "%at = s32[] constant(3)",
    "%half = f32[8]{0} multiply(%new, %new)",
    "%updated = f32[256]{0} dynamic-update-slice(%p, %half, %at)",
    "ROOT %both = (f32[256]{0}, f32[8]{0}) tuple(%updated, %half)",
)


def test_a_fusion_updates_in_place(kernels):
    entry = """%new = f32[8]{0} parameter(1)
        ROOT %f = (f32[256]{0}, f32[8]{0}) fusion(%x, %new), kind=kLoop, calls=%fused"""

    assert [kernel.moved for kernel in kernels(X + entry, UPDATING)] == [3 * 8 * 4]


BODY = computation("body", "%p = f32[256]{0} parameter(0)", "ROOT %n = f32[256]{0} negate(%p)")


@pytest.mark.parametrize(
    ("line", "turns"),
    [
        ('while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"7"},"x":{}}', 7),
        ("while(%x), condition=%c, body=%body", 1),
        ("call(%x), to_apply=%body", 1),
    ],
)
def test_loops_and_calls_count_what_they_run(kernels, line, turns):
    found = kernels(f"{X}ROOT %y = f32[256]{{0}} {line}", BODY)

    assert [(kernel.name, kernel.moved, kernel.turns) for kernel in found] == [("n", turns * 2 * KB, turns)]


@pytest.mark.parametrize(
    "branches", ["branch_computations={%body, %short}", "true_computation=%short, false_computation=%body"]
)
def test_of_branches_the_dearest_counts(kernels, branches):
    short = computation("short", "%q = f32[256]{0} parameter(0)", "ROOT %s = f32[1]{0} slice(%q), slice={[0:1]}")
    line = f"ROOT %y = f32[256]{{0}} conditional(%i, %x, %x), {branches}"

    found = kernels(f"{X}%i = s32[] parameter(1)\n{line}", BODY + short)

    assert [kernel.name for kernel in found] == ["n"]


def test_what_is_asynchronous_counts_once(kernels):
    found = kernels(
        X
        + """%s = (f32[256]{0:S(1)}, f32[256]{0}, u32[]{:S(2)}) copy-start(%x)
        %g = (f32[256]{0}, f32[1024]{0}) all-gather-start(%x), dimensions={0}
        %c = f32[256]{0:S(1)} copy-done(%s)
        %u = f32[256]{0:S(1)} negate(%c)
        %p = ((f32[256]{0}), f32[64]{0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:64]}
        %q = f32[64]{0:S(1)} slice-done(%p)
        %a = ((f32[256]{0}), f32[256]{0}, u32[]) async-start(%x), calls=%body
        %m = ((f32[256]{0}), f32[256]{0}, u32[]) async-update(%a)
        %d = f32[256]{0} async-done(%m)
        ROOT %y = f32[1024]{0} all-gather-done(%g)""",
        BODY,
    )

    moved = [("s", KB), ("u", 0), ("p", 64 * 4), ("n", 2 * KB), ("g", 5 * KB)]
    assert [(kernel.name, kernel.moved) for kernel in found] == moved
    assert [kernel.collectives for kernel in found if kernel.collectives] == [("all-gather",)]


def test_collectives_are_found_alone_in_fusions_and_in_loops(kernels):
    fused = computation("fused", "%p = f32[256]{0} parameter(0)", "ROOT %r = f32[256]{0} all-reduce(%p), to_apply=%add")
    body = computation("body", "%p = f32[256]{0} parameter(0)", "ROOT %t = f32[256]{0} all-to-all(%p), dimensions={0}")

    found = kernels(
        X
        + """%f = f32[256]{0} fusion(%x), kind=kCustom, calls=%fused
        %w = f32[256]{0} while(%f), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
        ROOT %y = f32[256]{0} collective-permute(%w), source_target_pairs={{0,1}}""",
        fused + body,
    )

    assert [(kernel.collectives, kernel.turns) for kernel in found] == [
        (("all-reduce",), 1),
        (("all-to-all",), 3),
        (("collective-permute",), 1),
    ]


def test_a_text_that_is_no_module_is_an_error(meter):
    with pytest.raises(ValueError, match="ENTRY"):
        meter.parse("func.func @main() { }")


def test_programs_that_xla_compiles(meter):
    x = jax.ShapeDtypeStruct((1024,), jnp.float32)

    def scanned(x):
        return jax.lax.scan(lambda x, _: (jnp.sort(x), None), x, None, length=5)[0]

    cost = meter.measure(jax.jit(lambda x: jnp.sin(x) * x + 1).lower(x).compile())
    looped = meter.measure(jax.jit(scanned).lower(x).compile())

    assert (cost.moved, cost.temporary, cost.kernels, cost.collectives) == (2 * 4096, 0, 1, {})
    assert cost.accessed == 2 * 4096
    assert looped.moved >= 5 * 2 * 4096 and looped.kernels >= 5
