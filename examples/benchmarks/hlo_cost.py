"""The meter of `compiled_cost.py`: what a compiled program moves, read from its text; no device is needed.

A kernel is a scheduled instruction that does work. It reads each of its operands from the memory of the device once,
and writes its result once; `Cost.moved` is the sum of these bytes over all kernels. Beyond that,

- a fusion that uses an operand only in slices reads the slices;
- what is updated in place is neither read nor written but for the update;
- a loop counts as often as it runs, of a conditional the dearest branch counts;
- an asynchronous operation counts once, where it is done;
- what lies in the memory of the chip itself (`S(1)` in a layout: the vector memory of a TPU) is free.

It is blind to

- caches: what a kernel finds in them is counted as read;
- a fusion that reads an operand more than once, as where two halves of one array are concatenated and reduced: that
  looks cheaper than it is;
- scratch memory of libraries, and which algorithm a library takes: compiled without a device, cuDNN has none chosen;
- the padding of arrays in the tiles of a TPU: sizes are those of the shapes;
- loops whose number of turns is not in the text: they count once;
- time. Kernels of equal bytes may take different time.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
FREE = set("parameter constant tuple get-tuple-element bitcast after-all opt-barrier partition-id replica-id".split())
SLICES = {"slice", "dynamic-slice", "gather"}
_VIEWS = {"bitcast", "reshape"}

_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_NAMED = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|body|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^{}]*)\}|(?:true|false)_computation=(%?[\w.\-]+))")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Instruction(NamedTuple):
    """A line of a computation: `name = type op(arguments), attributes`."""

    name: str
    type: str
    op: str
    arguments: str  # as written: names of operands, the number of a parameter
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """The names of the instructions that it takes."""
        return _OPERAND.findall(self.arguments)

    @property
    def called(self) -> str:
        """The name of the computation that it runs."""
        return _CALLED.search(self.attributes).group(1)


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """The computations of a compiled module."""

    entry: str
    computations: dict[str, Computation]


class Kernel(NamedTuple):
    """Work of the device."""

    name: str
    moved: int  # bytes, in all of its turns
    turns: int
    collectives: tuple[str, ...]


class Cost(NamedTuple):
    """What a compiled program costs, on one of its devices."""

    moved: int  # bytes
    temporary: int  # bytes
    kernels: int
    collectives: dict[str, int]
    accessed: int | None  # bytes, as XLA counts them, on chip too; None where it does not say


def measure(compiled: Any) -> Cost:
    """Reads the cost of a `jax.stages.Compiled`."""
    kernels = list(run(parse(compiled.as_text())))
    collectives = Counter()
    for kernel in kernels:
        collectives.update({op: kernel.turns * n for op, n in Counter(kernel.collectives).items()})
    accessed = (compiled.cost_analysis() or {}).get("bytes accessed")
    return Cost(
        moved=sum(kernel.moved for kernel in kernels),
        temporary=compiled.memory_analysis().temp_size_in_bytes,
        kernels=sum(kernel.turns for kernel in kernels),
        collectives=dict(collectives),
        accessed=None if accessed is None else round(accessed),
    )


def parse(text: str) -> Program:
    """Takes the text of a module apart."""
    entry, computations, current = "", {}, None
    for line in text.splitlines():
        if current is not None and (found := _NAMED.match(line)):
            current[found.group(2)] = _instruction(line, found)
        elif found := _HEAD.match(line):
            current = computations.setdefault(found.group(2), {})
            entry = found.group(2) if found.group(1) else entry
        elif line.startswith("}"):
            current = None
    if not entry:
        raise ValueError("The text has no ENTRY computation; it must be that of a compiled module.")
    return Program(entry, computations)


def _instruction(line: str, found: re.Match) -> Instruction:
    rest = line[found.end() :]
    space = _end(rest) if rest.startswith("(") else rest.index(" ")
    op, _, tail = rest[space:].strip().partition("(")
    end = _end(f"({tail}") - 2
    return Instruction(found.group(2), rest[:space], op, tail[:end], tail[end + 1 :], bool(found.group(1)))


def _end(text: str) -> int:
    """Behind the bracket that closes the one that the text begins with."""
    depth = 0
    for bracket in re.finditer(r"[()]", text):
        depth += 1 if bracket.group() == "(" else -1
        if not depth:
            return bracket.end()
    raise ValueError(f"A bracket is not closed: {text[:80]}")


def size(type_text: str) -> int:
    """Bytes of all arrays of a type that lie in the memory of the device."""
    total = 0
    for dtype, shape, layout in _ARRAY.findall(type_text):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype).group())
        on_chip = re.search(r"S\([1-4]\)", layout)
        total += 0 if on_chip else math.prod(int(n.strip("<=")) for n in shape.split(",") if n) * bits // 8
    return total


def _off_chip(type_text: str) -> str:
    """The type of a part in the memory of the device, wherever the part itself lies."""
    return re.sub(r"S\([1-4]\)", "", type_text)


def run(program: Program, name: str | None = None, turns: int = 1) -> Iterator[Kernel]:
    """The kernels of a computation, and of those that it calls, in their order."""
    computation = program.computations[name or program.entry]
    for instruction in computation.values():
        op = instruction.op
        if op in FREE or op.endswith(("-start", "-update")):
            continue
        if op.endswith("-done"):
            instruction = _whole(instruction, computation)
            op = instruction.op
        if op in ("while", "call", "async"):
            known = _TURNS.search(instruction.attributes)
            yield from run(program, instruction.called, turns * (int(known.group(1)) if known else 1))
        elif op == "conditional":
            branches = [list(run(program, branch, turns)) for branch in _branches(instruction)]
            yield from max(branches, key=lambda kernels: sum(kernel.moved for kernel in kernels))
        else:
            yield _kernel(program, computation, instruction, turns)


def _branches(instruction: Instruction) -> list[str]:
    names = ",".join(part for pair in _BRANCHES.findall(instruction.attributes) for part in pair if part)
    return [name.strip(" %") for name in names.split(",")]


def _whole(done: Instruction, computation: Computation) -> Instruction:
    """An asynchronous operation as if it were not: what it takes is at its start, what it gives at its end."""
    start = computation[done.operands[0]]
    while not start.op.endswith("-start"):  # an update is between
        start = computation[start.operands[0]]
    return start._replace(op=start.op.removesuffix("-start"), type=done.type)


def _kernel(program: Program, computation: Computation, instruction: Instruction, turns: int) -> Kernel:
    if instruction.op == "fusion":
        body = program.computations[instruction.called]
        takes = {int(i.arguments): i for i in body.values() if i.op == "parameter"}
        arguments = [(operand, _read(body, takes[n])) for n, operand in enumerate(instruction.operands)]
        written = _written(body, next(i for i in body.values() if i.root), instruction.type)
    else:
        body = {instruction.name: instruction}
        arguments = [(operand, _read(body, computation[operand])) for operand in instruction.operands]
        written = _written(computation, instruction, instruction.type)
    reads: dict[str, int] = {}
    for operand, read in arguments:  # one that is given twice is read once
        reads[operand] = max(reads.get(operand, 0), min(read, size(computation[operand].type)))
    collectives = tuple(i.op.removesuffix("-start") for i in body.values())
    collectives = tuple(op for op in collectives if op in COLLECTIVES)
    return Kernel(instruction.name, turns * (sum(reads.values()) + written), turns, collectives)


def _read(body: Computation, source: Instruction) -> int:
    """Bytes of an array that a kernel reads."""
    whole, parts = size(source.type), 0
    for user in body.values():
        if source.name not in user.operands:
            continue
        if user.op in SLICES and source.name not in user.operands[1:]:
            parts += size(_off_chip(user.type))
        elif user.op in _VIEWS:
            parts += _read(body, user)
        elif user.op != "dynamic-update-slice" or source.name in user.operands[1:]:
            return whole
    return min(whole, parts)


def _written(body: Computation, root: Instruction, type_text: str) -> int:
    """Bytes of a result that a kernel writes, if `root` makes it; a library's scratch memory is none."""
    if root.op == "tuple":
        return sum(_written(body, body[name], body[name].type) for name in root.operands)
    if root.op in _VIEWS and root.operands[0] in body:
        return _written(body, body[root.operands[0]], type_text)
    if root.op == "dynamic-update-slice":
        return min(size(type_text), size(_off_chip(body[root.operands[1]].type)))
    scratch = sum(map(size, re.findall(r"\bu8\[\d+\]", type_text))) if root.op == "custom-call" else 0
    return size(type_text) - scratch
