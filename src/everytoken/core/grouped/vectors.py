"""Vector instructions for kernels that numba compiles: eight rows of packed weights times a few rows of numbers.

A *tile* is eight rows of a weight matrix, a *group* 32 neighbouring weights of a row. Of each group the tile holds

- 4 bits: 4 x 16 words of 16 bits. Word ``2 i + parity`` of line ``c`` has the weights ``8 c + 2 s + parity`` of row
  ``i`` in its bits ``4 s`` to ``4 s + 3``: one shift gives a vector of eight pairs.
- 8 bits: 16 x 16 bytes. Byte ``2 i + parity`` of line ``p`` is the weight ``2 p + parity`` of row ``i``.

The numbers that weights are multiplied with are integers of 16 bits with a scale for each group. The processor
multiplies two pairs of 16 bits and adds them in one instruction (``vpmaddwd``), and their rounding is far below that of
bfloat16. A row's result does not depend on how many rows share a call: each goes through the same operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

BYTE, WORD, INT, LONG = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
BYTES, WORDS, INTS = ir.VectorType(BYTE, 16), ir.VectorType(WORD, 16), ir.VectorType(INT, 8)
HALVES, FLOATS = ir.VectorType(ir.HalfType(), 8), ir.VectorType(ir.FloatType(), 8)
TILE, GROUP = 8, 32
_FEATURES = binding.get_host_cpu_features()
AVX2, FMA = bool(_FEATURES.get("avx2")), bool(_FEATURES.get("fma"))


def _load(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, kind: ir.Type, align: int) -> ir.Value:
    return b.load(b.inttoptr(b.add(base, offset), kind.as_pointer()), align=align)


def _splat(b: ir.IRBuilder, scalar: ir.Value, vector: ir.Type) -> ir.Value:
    none = ir.Constant(vector, ir.Undefined)
    lanes = ir.Constant(ir.VectorType(INT, vector.count), [0] * vector.count)
    return b.shuffle_vector(b.insert_element(none, scalar, INT(0)), none, lanes)


def _call(b: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
    kind = ir.FunctionType(result, [item.type for item in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), arguments)


def _pair_sums(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """``x[2 i] y[2 i] + x[2 i + 1] y[2 i + 1]`` for eight ``i``."""
    if AVX2:
        return _call(b, "llvm.x86.avx2.pmadd.wd", INTS, x, y)
    wide = ir.VectorType(INT, 16)
    product, none = b.mul(b.sext(x, wide), b.sext(y, wide)), ir.Constant(wide, ir.Undefined)
    even, odd = (b.shuffle_vector(product, none, ir.Constant(INTS, list(range(first, 16, 2)))) for first in (0, 1))
    return b.add(even, odd)


def _multiply_add(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    return _call(b, "llvm.fma.v8f32", FLOATS, x, y, z) if FMA else b.fadd(b.fmul(x, y), z)


def _settled(b: ir.IRBuilder, totals: ir.Value) -> ir.Value:
    """The same vector, in the order of the program: left to itself LLVM takes one row after the other, and keeps all
    unpacked weights in memory meanwhile."""
    if not AVX2:
        return totals
    return b.asm(ir.FunctionType(INTS, [INTS]), "", "=x,0", [totals], True)


def _pairs(b: ir.IRBuilder, bits: int, weights: ir.Value) -> Any:
    """The 16 pairs of a group as vectors of words ``(pair, eight rows)``."""
    if bits == 8:
        for pair in range(16):
            yield pair, b.sext(_load(b, weights, LONG(16 * pair), BYTES, 1), WORDS)
        return
    for line in range(4):
        packed = _load(b, weights, LONG(32 * line), WORDS, 2)
        for place in range(4):
            moved = packed if place == 0 else b.lshr(packed, ir.Constant(WORDS, [4 * place] * 16))
            yield 4 * line + place, moved if place == 3 else b.and_(moved, ir.Constant(WORDS, [15] * 16))


def _tile(rows: int, bits: int) -> Callable[..., None]:
    """An instruction ``(weights, scales, numbers, steps, sums, out, groups, stride)`` for one tile and some rows.

    All but the last two are addresses: of the tile's weights and scales; of the numbers ``[rows, 32 groups]`` of 16
    bits, their steps ``[rows, groups]`` and the sums of their groups ``[rows, groups]`` in float32; of where the tile's
    eight results of the first row go. ``stride`` is the length of a row of results.
    """

    def instruction(_context: Any, *_arguments: Any) -> Any:
        signature = types.void(*[types.uintp] * 6, types.intp, types.intp)

        def generate(context: Any, b: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
            weights, scales, numbers, steps, sums, out, groups, stride = arguments
            totals = [cgutils.alloca_once_value(b, ir.Constant(FLOATS, None)) for _ in range(rows)]
            with cgutils.for_range(b, groups) as loop:
                group = loop.index
                here = b.add(weights, b.mul(group, LONG(128 if bits == 4 else 256)))
                scale = b.add(scales, b.mul(group, LONG(32 if bits == 4 else 16)))
                products: list[Any] = [ir.Constant(INTS, None)] * rows
                for pair, words in _pairs(b, bits, here):
                    for row in range(rows):
                        place = b.add(b.mul(groups, LONG(64 * row)), b.add(b.mul(group, LONG(64)), LONG(4 * pair)))
                        both = b.bitcast(_splat(b, _load(b, numbers, place, INT, 2), INTS), WORDS)
                        products[row] = b.add(products[row], _pair_sums(b, words, both))
                        if rows > 1 and pair % 4 == 3:
                            products[row] = _settled(b, products[row])
                step = b.fpext(_load(b, scale, LONG(0), HALVES, 2), FLOATS)
                least = b.fpext(_load(b, scale, LONG(16), HALVES, 2), FLOATS) if bits == 4 else None
                for row in range(rows):
                    place = b.mul(b.add(b.mul(groups, LONG(row)), group), LONG(4))
                    factor = b.fmul(step, _splat(b, _load(b, steps, place, ir.FloatType(), 4), FLOATS))
                    total = _multiply_add(b, b.sitofp(products[row], FLOATS), factor, b.load(totals[row]))
                    if least is not None:
                        whole = _splat(b, _load(b, sums, place, ir.FloatType(), 4), FLOATS)
                        total = _multiply_add(b, least, whole, total)
                    b.store(total, totals[row])
            for row in range(rows):
                place = b.inttoptr(b.add(out, b.mul(stride, LONG(4 * row))), FLOATS.as_pointer())
                b.store(b.load(totals[row]), place, align=4)
            return context.get_dummy_value()

        return signature, generate

    def tile(typingctx, weights, scales, numbers, steps, sums, out, groups, stride):  # type: ignore[no-untyped-def]
        return instruction(typingctx)

    tile.__name__ = tile.__qualname__ = f"tile_{bits}_{rows}"
    return intrinsic(tile)  # type: ignore[no-any-return]


tile_4_1, tile_4_2, tile_4_3, tile_4_4 = (_tile(rows, 4) for rows in (1, 2, 3, 4))
tile_8_1, tile_8_2, tile_8_3, tile_8_4 = (_tile(rows, 8) for rows in (1, 2, 3, 4))


def _bits_to_float(typingctx, bits):  # type: ignore[no-untyped-def]
    """The float32 whose bits are those of an int32."""

    def generate(_context: Any, b: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        return b.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


def _atomic_add(typingctx, address, value):  # type: ignore[no-untyped-def]
    """Adds to the int64 at an address; returns what was there. Adding 0 reads it."""

    def generate(_context: Any, b: ir.IRBuilder, _signature: Any, arguments: Any) -> Any:
        return b.atomic_rmw("add", b.inttoptr(arguments[0], LONG.as_pointer()), arguments[1], "seq_cst")

    return types.int64(types.uintp, types.int64), generate


bits_to_float: Callable[..., Any] = cast("Callable[..., Any]", intrinsic(_bits_to_float))
atomic_add: Callable[..., Any] = cast("Callable[..., Any]", intrinsic(_atomic_add))
