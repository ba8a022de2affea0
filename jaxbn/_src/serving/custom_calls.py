"""Checks that a program calls no function outside of XLA.

A custom call names a function of the process and the memory that it works on. A wrong function, or wrong sizes, can
crash the process or corrupt its memory. So all calls, including those of LAPACK and of kernels, are rejected, except
the ones that XLA implements itself.
"""

import re

# Annotations, and StableHLO operations with dynamic shapes, which XLA implements itself.
ALLOWED = frozenset(
    "Sharding shape_assertion stablehlo.dynamic_approx_top_k stablehlo.dynamic_reduce_window "
    "stablehlo.dynamic_rng_bit_generator stablehlo.dynamic_top_k".split()
)
# In MLIR's generic form the name does not follow the operation. The group is then None, and the call is rejected.
_CALL = re.compile(r'\.custom_call\b"?(?:\s+@([\w.$]+)\()?')
_OUTSIDE = re.compile(r"\.(?:infeed|outfeed|send|recv)\b")


def check_module(module: str) -> None:
    """Raises a ValueError if a StableHLO module, given as text, calls a function outside of XLA."""
    for found in _CALL.finditer(module):
        if found[1] not in ALLOWED:
            raise ValueError(
                f"The program calls {found[1] or 'an unknown function'!r}. A program cannot call functions outside of "
                f"XLA, such as those of LAPACK, kernels and callbacks; it may call {', '.join(sorted(ALLOWED))}."
            )
    found_outside = _OUTSIDE.search(module)
    if found_outside:
        raise ValueError(f"The program exchanges data with its environment through {found_outside[0][1:]!r}.")
