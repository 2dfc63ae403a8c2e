"""SIMD vectors for Numba kernels: what the compiler's auto-vectoriser would have to guess, said.

Numba compiles scalar code and leaves vectors to LLVM's guess. The functions here are the missing
words: a kernel loads a vector, multiplies and adds it, and stores it, and LLVM keeps it in a
register. They work inside ``@njit`` functions on C-contiguous 1-d arrays of float32 or float64
and take element offsets, so that one flat array holds any layout:

    v = load(a, i)                  a[i : i + L] as one vector of L lanes
    store(a, i, v)
    broadcast(a, i), splat(s)       one number in every lane
    constant(s, v)                  the number s, of any type, in every lane of a vector like v
    lane(v)                         the number in the first lane
    zero(a)                         a vector of zeros of a's type
    lane_count(a)                   L, the lanes of a vector of a's type
    load_part(a, i, n, v)           a[i : i + n] in the first n lanes (all if n > L), else v's
    store_part(a, i, n, v)          the first n lanes alone; memory beyond is not touched
    to_boundary(a, i)               1 to L: how far from a[i] the memory of a whole vector begins
    add, sub, mul, div, sqrt(x), fma(x, y, z)    lane by lane; fma is x * y + z, rounded once
    exp(x), expm1(x), log(x)        within 2 units in the last place
    absolute(x), copysign(x, y)     as in NumPy
    polynomial(x, single, double)   sum of c[k] x^k, c being `single` for float32, else `double`
    where_greater(x, y, a, b)       a where x > y, else b (where x or y is NaN, too)
    maximum(x, y)                   NaN wins, as in numpy.maximum
    best, winner = take_larger(best, winner, v, k)   the running maximum and who won (first wins):
                                    winners are bytes, or integers as wide as a lane
    load_winner(winner, i, a), where_winner(winner, k, v)    v where k has won, else zero
    unless_winner(winner, k, v)     v where another than k has won, else zero
    place_winners(winner, off, base, columns, step, skip)    int32 offsets of the winners
    where_positive(x, v)            v where x > 0, else zero
    winner_bits(winner, i, k, a)    an integer whose bit r tells whether winner[i + r] is k, r < L
    first_bit(bits)                 the number of the lowest bit that is set, of bits != 0
    horizontal_sum(v)               the lanes added pairwise
    horizontal_max(v)               the largest lane, or NaN
    halves(x, y)                    the even and the odd numbers of x followed by y
    zip_halves(x, y)                its inverse: x[0], y[0], x[1], y[1], ...

A register block is a tuple of vectors. Tuples of offsets say where its rows are in memory:

    rows = offsets(table, i, last, n)    table[min(i + r, last)] for r < n
    rows = multiples(i, last, step, n)   min(i + r, last) * step for r < n
    rows = lane_offsets(table, i, a)     table[i + r] for r < L
    rows = scaled(rows, step)            each of them times step
    rows = lane_multiples(n, step, k, a) r * step for r < n, and k for the others up to L
    vs = load_rows(a, at, rows)          one vector at every at + rows[r]
    store_rows(a, at, rows, vs)          rows[r] < 0 stores nothing
    vs = transpose(vs)                   L vectors of L lanes
    vs = widen(vs, a)                    integers as wide as a's; other vectors as they are

and `outer_tile` is the inner loop of every matrix product: a block of R rows times V vectors
stays in registers while k runs.

    acc = zeros(a, R * V)
    acc = outer_tile(acc, a, at, rows, cols, k, n, b, bi, step)
        acc[r][v] += a[at + rows[r] + cols[k]] * b[bi + v*L :][: L], bi += step    (n values of k)
    acc = lane_tile(...)       the same with the vector a[at + rows[r] + cols[k] + v*L :][: L]
    acc = tile_load(acc, a, at, rows), tile_store(acc, a, at, rows), tile_add(x, y)
    acc = tile_repeat(acc, a, at)        every row is a[at : at + V*L]
    tile_pool(acc, area, more, relu, off, a, at, table, i, end, winner)
        each len(area) rows are a window w: its maximum goes to a[at + table[i + w]:], and who won
        (see `take_larger`) to the same place of winner; where i + w < end

Where most products would be with zero, lists say which are not (`n` entries of g and of offsets):

    acc = list_tile(g, i, n, at_of, a, at, rows, v)
        acc[r][v] = sum over k of g[i + k] * a[at + rows[r] + at_of[i + k] + v*L :][: L]
    acc = lists_tile(g, i, n, step, at_of, a, at, r, v)        R lists side by side
        acc[r][v] = sum over k of g[i + k*step + r] * a[at + at_of[i + k*step + r] + v*L :][: L]

Where each lane of a sum reads a table at a place of its own (`at_of` holds n vectors of lanes):

    acc = pick_tile(g, i, n, step, at_of, a, at, rows, taps, move)
        acc[r][s] = sum over k of g[i + k*step :][: L] * row[at_of[i + k*step :][: L] + s*move]
        with row = a[at + rows[r] + k*L :][: L]; what is read beyond the last lane is undefined

Rows times rows, for what lies in memory along the sum:

    acc = dot_tile(a, at, rows, b, bt, others, n)
        acc[r][s] = sum over k < n of a[at + rows[r] + k*L :][: L] * b[bt + others[s] + k*L :][: L]
    sums = horizontal_sums(acc)          a tuple of numbers

The numbers of rows and of vectors are literals, or the lengths of tuples given in their place: a
tuple that is an argument makes a kernel for each length.

A vector is as wide as the machine's registers: 64 bytes with AVX-512, 32 with AVX, else 16
(NEON, SSE). Nothing is read or written outside [offset, offset + lanes), and nobody checks that
this lies inside the array, except under NUMBA_BOUNDSCHECK=1: then every access is checked.

Numbers are IEEE: NaN and infinities propagate, and only `horizontal_sum(s)` reorder a sum.
"""

from minicnn.ops.vector_emit import (
    BLOCK,
    CHECKED,
    ROWS,
    VECTOR_BYTES,
    Vector,
    lanes,
)
from minicnn.ops.vector_lanes import (
    add,
    broadcast,
    constant,
    div,
    first_bit,
    fma,
    halves,
    horizontal_max,
    horizontal_sum,
    lane,
    lane_count,
    load,
    load_part,
    load_winner,
    maximum,
    mul,
    place_winners,
    relu_winner,
    splat,
    store,
    store_part,
    sub,
    take_larger,
    to_boundary,
    unless_winner,
    where_positive,
    where_winner,
    winner_bits,
    winner_of,
    zero,
    zip_halves,
)
from minicnn.ops.vector_math import (
    absolute,
    copysign,
    exp,
    expm1,
    log,
    polynomial,
    sqrt,
    where_greater,
)
from minicnn.ops.vector_tiles import (
    dot_tile,
    horizontal_sums,
    lane_multiples,
    lane_offsets,
    lane_tile,
    list_tile,
    lists_tile,
    load_rows,
    multiples,
    offsets,
    outer_tile,
    pick_tile,
    scaled,
    store_rows,
    tile_add,
    tile_load,
    tile_pool,
    tile_repeat,
    tile_store,
    transpose,
    widen,
    zeros,
)

__all__ = [
    "BLOCK",
    "CHECKED",
    "ROWS",
    "VECTOR_BYTES",
    "Vector",
    "absolute",
    "add",
    "broadcast",
    "constant",
    "copysign",
    "div",
    "dot_tile",
    "exp",
    "expm1",
    "first_bit",
    "fma",
    "halves",
    "horizontal_max",
    "horizontal_sum",
    "horizontal_sums",
    "lane",
    "lane_count",
    "lane_multiples",
    "lane_offsets",
    "lane_tile",
    "lanes",
    "list_tile",
    "lists_tile",
    "load",
    "load_part",
    "load_rows",
    "load_winner",
    "log",
    "maximum",
    "mul",
    "multiples",
    "offsets",
    "outer_tile",
    "pick_tile",
    "place_winners",
    "polynomial",
    "relu_winner",
    "scaled",
    "splat",
    "sqrt",
    "store",
    "store_part",
    "store_rows",
    "sub",
    "take_larger",
    "tile_add",
    "tile_load",
    "tile_pool",
    "tile_repeat",
    "tile_store",
    "to_boundary",
    "transpose",
    "unless_winner",
    "where_greater",
    "where_positive",
    "where_winner",
    "widen",
    "winner_bits",
    "winner_of",
    "zero",
    "zeros",
    "zip_halves",
]
