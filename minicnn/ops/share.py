# mypy: disallow-untyped-defs=False
# (intrinsics get their types from Numba)
"""Work shared out among threads: whoever is free takes the next item.

A fixed share for each thread would leave all waiting for the one whose core does something else
meanwhile. Who computes an item makes no difference to its result.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def take(typingctx, taken, k):
    """Return ``taken[k]`` and add 1 to it, as one step that no other thread can come between.

    `taken` is an array of int64, zero before the first item is taken.
    """

    def codegen(context, builder, signature, args):
        array = context.make_array(taken)(context, builder, args[0])
        one = ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw("add", builder.gep(array.data, [args[1]]), one, "monotonic")

    return types.intp(taken, types.intp), codegen
