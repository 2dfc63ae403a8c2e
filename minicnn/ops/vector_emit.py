# mypy: disallow-untyped-defs=False
# (intrinsics get their types from Numba)
"""How the functions of `minicnn.ops.vector` are made: types and an emitter of LLVM instructions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core import config as _numba_config
from numba.core.registry import cpu_target
from numba.extending import models, register_model

# As Numba sees the machine (NUMBA_CPU_NAME and NUMBA_CPU_FEATURES included).
_FEATURES = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
VECTOR_BYTES = 64 if "+avx512f" in _FEATURES else 32 if "+avx" in _FEATURES else 16
# Rows of a tile of two vectors. AVX-512 and NEON have 32 registers: 16 accumulators, two vectors
# of b and one of a leave room, and eight row pointers still fit the integer registers. AVX has 16.
ROWS = 6 if VECTOR_BYTES == 32 else 8

BLOCK = 64  # terms that a kernel adds in one go: longer sums are sums of blocks, to round less
CHECKED = bool(getattr(_numba_config, "BOUNDSCHECK", None))  # NUMBA_BOUNDSCHECK=1

I32, I64 = ir.IntType(32), ir.IntType(64)


def lanes(dtype: Any) -> int:
    """Return how many numbers of a NumPy float type one vector holds."""
    return VECTOR_BYTES // np.dtype(dtype).itemsize


class Vector(types.Type):
    """The Numba type of one vector."""

    def __init__(self, dtype: Any, count: int) -> None:
        self.dtype, self.count = dtype, count
        super().__init__(name=f"vector({count} x {dtype})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Vector) -> None:
        scalar = manager.lookup(fe_type.dtype).get_value_type()
        super().__init__(manager, fe_type, ir.VectorType(scalar, fe_type.count))


def vector_of(array: Any) -> Vector:
    """Return the type of a vector loaded from `array`; winners of `take_larger` are uint8."""
    if array.ndim != 1 or array.layout != "C":
        raise TypeError(f"vector: expected a C-contiguous 1-d array, got {array}")
    width = 8 * VECTOR_BYTES // array.dtype.bitwidth
    return Vector(array.dtype, width)


# ---------------------------------------------------------------- emitting LLVM instructions


class Emit:
    """An IR builder that knows Numba's arrays, tuples and vectors."""

    def __init__(self, context: Any, builder: ir.IRBuilder) -> None:
        self.context, self.b = context, builder

    def number(self, value: int) -> ir.Constant:
        return ir.Constant(I64, value)

    def array(self, ty: types.Array, value: Any) -> Any:
        return self.context.make_array(ty)(self.context, self.b, value)

    def at(self, ty: types.Array, value: Any, *indices: Any, count: int = 1) -> Any:
        """Return a pointer to the element whose index is the sum of `indices`.

        One step an index, so that LLVM keeps the pointer after the steps that a loop repeats.
        """
        array = self.array(ty, value)
        self.check(array, indices, count)
        pointer = array.data
        for index in indices:
            pointer = self.b.gep(pointer, [index])
        return pointer

    def sum(self, terms: Sequence[Any]) -> Any:
        total = terms[0]
        for term in terms[1:]:
            total = self.b.add(total, term)
        return total

    def check(self, array: Any, indices: Sequence[Any], count: Any) -> None:
        """Under NUMBA_BOUNDSCHECK, raise unless `count` elements from there lie in the array."""
        if not CHECKED:
            return
        index = self.sum(indices)
        below = self.b.icmp_signed("<", index, self.number(0))
        last = self.b.add(index, self.number(count) if isinstance(count, int) else count)
        above = self.b.icmp_signed(">", last, array.nitems)
        with cgutils.if_unlikely(self.b, self.b.or_(below, above)):
            message = "vector: offset outside the array"
            self.context.call_conv.return_user_exc(self.b, IndexError, (message,))

    def load(self, ty: Vector, pointer: Any) -> Any:
        vt = self.context.get_value_type(ty)
        value = self.b.load(self.b.bitcast(pointer, vt.as_pointer()))
        value.align = ty.dtype.bitwidth // 8  # arrays are aligned to their elements only
        return value

    def store(self, ty: Vector, value: Any, pointer: Any) -> None:
        instruction = self.b.store(value, self.b.bitcast(pointer, value.type.as_pointer()))
        instruction.align = ty.dtype.bitwidth // 8

    def splat(self, scalar: Any, count: int) -> Any:
        vt = ir.VectorType(scalar.type, count)
        first = self.b.insert_element(ir.Constant(vt, ir.Undefined), scalar, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, count), [0] * count)
        return self.b.shuffle_vector(first, ir.Constant(vt, ir.Undefined), zeros)

    def zero(self, ty: Vector) -> Any:
        return ir.Constant(self.context.get_value_type(ty), [0.0] * ty.count)

    def fma(self, ty: Vector, x: Any, y: Any, z: Any) -> Any:
        name = f"llvm.fma.v{ty.count}f{ty.dtype.bitwidth}"
        vt = self.context.get_value_type(ty)
        function = ir.FunctionType(vt, [vt] * 3)
        return self.b.call(cgutils.get_or_insert_function(self.b.module, function, name), [x, y, z])

    def items(self, value: Any) -> list[Any]:
        return [self.b.extract_value(value, i) for i in range(len(value.type.elements))]

    def tuple(self, ty: types.UniTuple, values: Sequence[Any]) -> Any:
        return self.context.make_tuple(self.b, ty, values)


def emits(signature: Any, body: Callable[[Emit, Any, Any], Any]) -> Any:
    """Pair a signature with code that gets the emitter, the argument types and the arguments."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        result = body(Emit(context, builder), sig.args, args)
        return context.get_dummy_value() if result is None else result

    return signature, codegen


def lane_mask(indices: Sequence[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(I32, len(indices)), list(indices))
