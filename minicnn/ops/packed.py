"""A kernel's plan in one array of numbers.

A plan is a NamedTuple of sizes and tables of offsets. Handing some forty of them to a kernel costs
more than a small kernel itself, and seconds of compilation, once for each loop that runs in
parallel. So `pack` writes a plan into one array, and a kernel reads it with what `unpacker` made:

    class Plan(NamedTuple):
        rows: int
        pixels: np.ndarray

    unpack = unpacker(Plan, {"int32 2": "pixels"})     # dtype and axes: names of tables

    @kernel(parallel=True)
    def run(packed, ...):
        for t in prange(threads):
            plan = unpack(packed)                 # plan.rows, plan.pixels[i, j]

The tables are read where they lie in the packed array, which has to outlive them.
"""

from __future__ import annotations

from typing import Any, get_type_hints

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array
from numba.np.numpy_support import from_dtype

_I8, _I64 = ir.IntType(8), ir.IntType(64)


def pack(plan: Any) -> np.ndarray:
    """Return a plan as int64: each number, or for a table where its bytes begin and its shape."""
    head: list[int] = []
    tables: list[tuple[int, np.ndarray]] = []  # where the place of each stands in the head
    for value in plan:
        if isinstance(value, np.ndarray):
            tables.append((len(head), np.ascontiguousarray(value)))
            head += [0, *value.shape]
        else:
            head.append(int(value))
    out = np.zeros(len(head) + sum(-(-table.nbytes // 8) for _, table in tables), np.int64)
    end = 8 * len(head)
    for at, table in tables:
        head[at] = end
        out.view(np.uint8)[end : end + table.nbytes] = table.reshape(-1).view(np.uint8)
        end += -(-table.nbytes // 8) * 8
    out[: len(head)] = head
    return out


def unpacker(plan: Any, kinds: dict[str, str]) -> Any:
    """Return a function for kernels that reads what `pack` made of a NamedTuple of this class."""
    tables = {name: kind for kind, names in kinds.items() for name in names.split()}
    fields: list[tuple[Any, int]] = []
    for name in plan._fields:
        dtype, axes = tables[name].split() if name in tables else ("", 0)
        scalar = types.boolean if get_type_hints(plan)[name] is bool else types.intp
        array = types.Array(from_dtype(np.dtype(dtype)), int(axes), "C") if dtype else scalar
        fields.append((array, int(axes)))
    result = types.NamedTuple([ty for ty, _ in fields], plan)

    @intrinsic
    def unpack(typingctx: Any, packed: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            base = context.make_array(signature.args[0])(context, builder, args[0]).data
            bytes_ = builder.bitcast(base, _I8.as_pointer())
            at, values = 0, []

            def number() -> Any:
                nonlocal at
                at += 1
                return builder.load(builder.gep(base, [ir.Constant(_I64, at - 1)]))

            for ty, axes in fields:
                first = number()
                if ty is types.boolean:
                    first = builder.icmp_signed("!=", first, ir.Constant(_I64, 0))
                if isinstance(ty, types.Array):
                    first = _table(context, builder, ty, builder.gep(bytes_, [first]), number, axes)
                values.append(first)
            return context.make_tuple(builder, result, values)

        return result(packed), codegen

    return unpack


def _table(context: Any, builder: Any, ty: Any, start: Any, number: Any, axes: int) -> Any:
    """Make an array of what lies in memory at `start`; nobody counts references to it."""
    shape = [number() for _ in range(axes)]
    size = context.get_abi_sizeof(context.get_data_type(ty.dtype))
    strides: list[Any] = []
    step = ir.Constant(_I64, size)
    for length in reversed(shape):
        strides.insert(0, step)
        step = builder.mul(step, length)
    array = context.make_array(ty)(context, builder)
    data = builder.bitcast(start, context.get_data_type(ty.dtype).as_pointer())
    populate_array(array, data, shape, strides, ir.Constant(_I64, size), None)
    return array._getvalue()
