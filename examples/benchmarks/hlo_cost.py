"""Estimates the memory traffic of a compiled program from its HLO text, for `compiled_cost.py`; no device is needed.

A kernel is a scheduled instruction that does work. The model assumes that it reads each operand from device memory
once and writes its result once. `Cost.moved` is the sum of these bytes over all kernels, with these rules:

- A fusion that only uses slices of an operand reads the slices.
- An in-place update reads and writes only the updated part.
- A loop counts once per iteration. A conditional counts as its most expensive branch.
- An asynchronous operation counts once, at its end.
- On-chip memory (`S(1)` in a layout: the vector memory of a TPU) is free.

The model ignores

- caches: data in a cache counts as read;
- repeated reads of an operand by one fusion, for example if two halves of an array are concatenated and reduced: the
  estimate is then too low;
- scratch memory and choice of algorithms in libraries: without a device, cuDNN does not choose an algorithm;
- the padding of arrays to the tiles of a TPU: sizes are computed from shapes;
- trip counts of loops that are missing in the text: such loops count once;
- time: kernels that move equal bytes may take different times.
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
        """The names of its operands."""
        return _OPERAND.findall(self.arguments)

    @property
    def called(self) -> str:
        """The name of the computation that it calls."""
        return _CALLED.search(self.attributes).group(1)


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """The computations of a compiled module."""

    entry: str
    computations: dict[str, Computation]


class Kernel(NamedTuple):
    """A kernel and the number of its launches."""

    name: str
    moved: int  # bytes, over all launches
    turns: int  # number of launches
    collectives: tuple[str, ...]


class Cost(NamedTuple):
    """The cost of a compiled program on one of its devices."""

    moved: int  # bytes
    temporary: int  # bytes
    kernels: int
    collectives: dict[str, int]
    accessed: int | None  # bytes according to XLA, including on-chip memory; None if XLA does not report them


def measure(compiled: Any) -> Cost:
    """Measures the cost of a `jax.stages.Compiled`."""
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
    """Parses the text of a module."""
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
        raise ValueError("The text has no ENTRY computation; pass the text of a compiled module.")
    return Program(entry, computations)


def _instruction(line: str, found: re.Match) -> Instruction:
    rest = line[found.end() :]
    space = _end(rest) if rest.startswith("(") else rest.index(" ")
    op, _, tail = rest[space:].strip().partition("(")
    end = _end(f"({tail}") - 2
    return Instruction(found.group(2), rest[:space], op, tail[:end], tail[end + 1 :], bool(found.group(1)))


def _end(text: str) -> int:
    """The position after the bracket that closes the bracket at the start of the text."""
    depth = 0
    for bracket in re.finditer(r"[()]", text):
        depth += 1 if bracket.group() == "(" else -1
        if not depth:
            return bracket.end()
    raise ValueError(f"A bracket is not closed: {text[:80]}")


def size(type_text: str) -> int:
    """Bytes of all arrays of a type in device memory."""
    total = 0
    for dtype, shape, layout in _ARRAY.findall(type_text):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype).group())
        # Memory spaces 1 to 4 are on the chip and cost no traffic.
        on_chip = re.search(r"S\([1-4]\)", layout)
        total += 0 if on_chip else math.prod(int(n.strip("<=")) for n in shape.split(",") if n) * bits // 8
    return total


def _off_chip(type_text: str) -> str:
    """The type without its memory space, so that `size` counts it even if it is on chip."""
    return re.sub(r"S\([1-4]\)", "", type_text)


def run(program: Program, name: str | None = None, turns: int = 1) -> Iterator[Kernel]:
    """Yields the kernels of a computation and of the computations that it calls, in order."""
    computation = program.computations[name or program.entry]
    for instruction in computation.values():
        op = instruction.op
        if op in FREE or op.endswith(("-start", "-update")):
            continue
        # An asynchronous operation appears two or more times; count it once, at its end.
        if op.endswith("-done"):
            instruction = _whole(instruction, computation)
            op = instruction.op
        if op in ("while", "call", "async"):
            # Without a known trip count, count a loop once.
            known = _TURNS.search(instruction.attributes)
            yield from run(program, instruction.called, turns * (int(known.group(1)) if known else 1))
        elif op == "conditional":
            # Only one branch runs; assume the most expensive one.
            branches = [list(run(program, branch, turns)) for branch in _branches(instruction)]
            yield from max(branches, key=lambda kernels: sum(kernel.moved for kernel in kernels))
        else:
            yield _kernel(program, computation, instruction, turns)


def _branches(instruction: Instruction) -> list[str]:
    names = ",".join(part for pair in _BRANCHES.findall(instruction.attributes) for part in pair if part)
    return [name.strip(" %") for name in names.split(",")]


def _whole(done: Instruction, computation: Computation) -> Instruction:
    """The synchronous form of an asynchronous operation: the operands of its start, and the type of its end."""
    start = computation[done.operands[0]]
    while not start.op.endswith("-start"):  # skip updates between start and end
        start = computation[start.operands[0]]
    return start._replace(op=start.op.removesuffix("-start"), type=done.type)


def _kernel(program: Program, computation: Computation, instruction: Instruction, turns: int) -> Kernel:
    if instruction.op == "fusion":
        body = program.computations[instruction.called]
        # Inside a fusion, operands are parameters; a parameter that is only sliced is not read as a whole.
        takes = {int(i.arguments): i for i in body.values() if i.op == "parameter"}
        arguments = [(operand, _read(body, takes[n])) for n, operand in enumerate(instruction.operands)]
        written = _written(body, next(i for i in body.values() if i.root), instruction.type)
    else:
        body = {instruction.name: instruction}
        arguments = [(operand, _read(body, computation[operand])) for operand in instruction.operands]
        written = _written(computation, instruction, instruction.type)
    reads: dict[str, int] = {}
    for operand, read in arguments:  # an operand that occurs twice is read once
        reads[operand] = max(reads.get(operand, 0), min(read, size(computation[operand].type)))
    collectives = tuple(i.op.removesuffix("-start") for i in body.values())
    collectives = tuple(op for op in collectives if op in COLLECTIVES)
    return Kernel(instruction.name, turns * (sum(reads.values()) + written), turns, collectives)


def _read(body: Computation, source: Instruction) -> int:
    """Bytes that a kernel reads of an array: the slices, if it only uses slices."""
    whole, parts = size(source.type), 0
    for user in body.values():
        if source.name not in user.operands:
            continue
        if user.op in SLICES and source.name not in user.operands[1:]:
            # The slice itself may be on chip, but its elements come from device memory.
            parts += size(_off_chip(user.type))
        elif user.op in _VIEWS:
            parts += _read(body, user)
        elif user.op != "dynamic-update-slice" or source.name in user.operands[1:]:
            return whole
    return min(whole, parts)


def _written(body: Computation, root: Instruction, type_text: str) -> int:
    """Bytes of the result `root` that a kernel writes, without the scratch memory of libraries."""
    if root.op == "tuple":
        return sum(_written(body, body[name], body[name].type) for name in root.operands)
    if root.op in _VIEWS and root.operands[0] in body:
        return _written(body, body[root.operands[0]], type_text)
    if root.op == "dynamic-update-slice":
        # An update in place writes only the updated slice.
        return min(size(type_text), size(_off_chip(body[root.operands[1]].type)))
    # Libraries request scratch memory as u8 outputs of a custom call.
    scratch = sum(map(size, re.findall(r"\bu8\[\d+\]", type_text))) if root.op == "custom-call" else 0
    return size(type_text) - scratch
