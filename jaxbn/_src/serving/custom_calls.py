"""What a program may call: nothing but what XLA computes itself.

A custom call names a function of the process, which runs on memory that the caller describes; the wrong one, or wrong
sizes for a right one, end the process or worse. So those of LAPACK and of kernels are refused like unknown ones.
"""

import re

# Annotations, and operations of StableHLO with open shapes, for which XLA has no function outside of it.
ALLOWED = frozenset(
    "Sharding shape_assertion stablehlo.dynamic_approx_top_k stablehlo.dynamic_reduce_window "
    "stablehlo.dynamic_rng_bit_generator stablehlo.dynamic_top_k".split()
)
_CALL = re.compile(r'\.custom_call\b"?(?:\s+@([\w.$]+)\()?')
_OUTSIDE = re.compile(r"\.(?:infeed|outfeed|send|recv)\b")


def check_module(module: str) -> None:
    """Raises a ValueError if a StableHLO module, as text, reaches out of what XLA computes itself."""
    for found in _CALL.finditer(module):
        if found[1] not in ALLOWED:
            raise ValueError(
                f"The program calls {found[1] or 'something'!r}. Functions outside of XLA, such as those of LAPACK, "
                f"kernels and callbacks, are no part of a program; it may call {', '.join(sorted(ALLOWED))}."
            )
    found_outside = _OUTSIDE.search(module)
    if found_outside:
        raise ValueError(f"The program exchanges data with what is outside of it, by {found_outside[0][1:]!r}.")
