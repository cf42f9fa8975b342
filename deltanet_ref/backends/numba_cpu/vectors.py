"""SIMD vectors inside kernels, for loops over packed bits that the compiler does not vectorise.

A vector is a value of LLVM's vector type: + - * & | << >> act on all its lanes, with another vector or with a number,
and round as written whatever fast-math the kernel has. LLVM spreads it over as many registers as the processor needs.
Measured against plain loops over the same bytes: 5 to 7 times as fast.
"""
import operator
from platform import machine

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import config, types
from numba.core import cgutils
from numba.core.datamodel.models import PrimitiveModel
from numba.extending import intrinsic, lower_builtin, register_model, type_callable


class Vector(types.Type):
    """`lanes` numbers of a dtype."""

    def __init__(self, dtype, lanes):
        super().__init__(f"Vector({dtype}, {lanes})")
        self.dtype, self.lanes = dtype, lanes


@register_model(Vector)
class VectorModel(PrimitiveModel):
    """A Vector is LLVM's vector type, passed by value."""
    def __init__(self, models, vector):
        super().__init__(models, vector, ir.VectorType(models.lookup(vector.dtype).get_data_type(), vector.lanes))


@intrinsic(prefer_literal=True)
def load(typing_context, x, start, lanes):
    """x[start:start + lanes] of an array with one contiguous axis; lanes is a number known when compiling."""
    vector = Vector(x.dtype, lanes.literal_value)

    def codegen(context, builder, signature, args):
        address = _address(context, builder, signature.args[0], args[0], args[1], context.get_value_type(vector))
        return builder.load(address, align=_alignment(context, vector))
    return vector(x, types.int64, lanes), codegen


@intrinsic
def store(typing_context, v, y, start):
    """y[start:start + lanes of v] = v."""
    def codegen(context, builder, signature, args):
        address = _address(context, builder, signature.args[1], args[1], args[2], args[0].type)
        builder.store(args[0], address, align=_alignment(context, v))
        return context.get_dummy_value()
    return types.void(v, y, types.int64), codegen


def _address(context, builder, array_type, array, start, vector_type):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [start]), vector_type.as_pointer())


def _alignment(context, vector):
    return context.get_abi_sizeof(context.get_value_type(vector.dtype))


@intrinsic(prefer_literal=True)
def filled(typing_context, number, lanes, dtype):
    """`lanes` times a number, both known when compiling, of a NumPy dtype."""
    vector, value = Vector(dtype.dtype, lanes.literal_value), number.literal_value

    def codegen(context, builder, signature, args):
        return ir.Constant(context.get_value_type(vector), [value] * vector.lanes)
    return vector(number, lanes, dtype), codegen


@intrinsic(prefer_literal=True)
def repeated(typing_context, number, lanes):
    """A number in each of `lanes` lanes."""
    vector = Vector(types.unliteral(number), lanes.literal_value)

    def codegen(context, builder, signature, args):
        return _in_all_lanes(builder, args[0], context.get_value_type(vector))
    return vector(vector.dtype, lanes), codegen


@intrinsic(prefer_literal=True)
def fields(typing_context, word, width, lanes):
    """A whole number cut into `lanes` numbers of `width` bits, the lowest first, as uint8."""
    vector, width_, n = Vector(types.uint8, lanes.literal_value), width.literal_value, lanes.literal_value

    def codegen(context, builder, signature, args):
        parts = builder.bitcast(args[0], ir.VectorType(ir.IntType(width_), n))
        return builder.zext(parts, context.get_value_type(vector))
    return vector(types.unliteral(word), width, lanes), codegen


@intrinsic
def join(typing_context, a, b):
    """The lanes of a, then those of b, which has as many."""
    vector = Vector(a.dtype, 2 * a.lanes)
    return vector(a, a), lambda context, builder, signature, args: _shuffled(builder, *args, range(2 * a.lanes))


@intrinsic
def low(typing_context, v):
    """The first half of the lanes."""
    half = Vector(v.dtype, v.lanes // 2)
    return half(v), lambda context, builder, signature, args: _shuffled(builder, args[0], args[0], range(v.lanes // 2))


@intrinsic
def high(typing_context, v):
    """The second half of the lanes."""
    half, lanes = Vector(v.dtype, v.lanes // 2), range(v.lanes // 2, v.lanes)
    return half(v), lambda context, builder, signature, args: _shuffled(builder, args[0], args[0], lanes)


@intrinsic
def lane(typing_context, v, i):
    """Lane i as a number."""
    return v.dtype(v, types.int64), lambda context, builder, signature, args: builder.extract_element(*args)


def _shuffled(builder, a, b, lanes):
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), list(lanes))
    return builder.shuffle_vector(a, b, mask)


@intrinsic
def to_float(typing_context, v):
    """The lanes of a vector as float32."""
    vector = Vector(types.float32, v.lanes)

    def codegen(context, builder, signature, args):
        if v.dtype == types.float32:
            return args[0]
        convert = builder.sitofp if v.dtype.signed else builder.uitofp
        return convert(args[0], context.get_value_type(vector))
    return vector(v), codegen


@intrinsic
def widened(typing_context, v):
    """int8 or uint8 lanes as int16."""
    vector = Vector(types.int16, v.lanes)

    def codegen(context, builder, signature, args):
        extend = builder.sext if v.dtype.signed else builder.zext
        return extend(args[0], context.get_value_type(vector))
    return vector(v), codegen


@intrinsic
def add_pairs(typing_context, a, b, c):
    """c, int32, plus a * b, int16 with twice the lanes, summed over pairs of lanes: one instruction on most
    processors."""
    def codegen(context, builder, signature, args):
        wide = ir.VectorType(ir.IntType(32), a.lanes)
        products = builder.mul(builder.sext(args[0], wide), builder.sext(args[1], wide))
        even, odd = (_shuffled(builder, products, products, range(first, a.lanes, 2)) for first in (0, 1))
        return builder.add(builder.add(even, odd), args[2])
    return c(a, a, c), codegen


@intrinsic
def signed(typing_context, v):
    """uint8 lanes read as int8."""
    return Vector(types.int8, v.lanes)(v), lambda context, builder, signature, args: args[0]


@intrinsic
def half_to_float(typing_context, x):
    """A number, or a vector, of uint16 that is the bits of a float16, as float32."""
    result = Vector(types.float32, x.lanes) if isinstance(x, Vector) else types.float32

    def codegen(context, builder, signature, args):
        number = context.get_value_type(result)
        if converts_halves():
            half = ir.VectorType(ir.HalfType(), x.lanes) if isinstance(x, Vector) else ir.HalfType()
            return builder.fpext(builder.bitcast(args[0], half), number)
        return _half_by_its_bits(builder, args[0], number)
    return result(x if isinstance(x, Vector) else types.uint16), codegen


def target_features():
    """What LLVM is told of the processor that is compiled for, as numba chooses it."""
    return get_host_cpu_features().flatten() if config.CPU_FEATURES is None else config.CPU_FEATURES


def converts_halves():
    """Otherwise LLVM would call a function that is not there, and end the process."""
    return "+f16c" in target_features() or machine() in ("arm64", "aarch64")


def _half_by_its_bits(builder, x, number):
    """The exponent is biased by 15 in float16, by 127 in float32. Below 2^-14 the value is the fraction times 2^-24."""
    vector = isinstance(number, ir.VectorType)
    word = ir.VectorType(ir.IntType(32), number.count) if vector else ir.IntType(32)

    def constant(type_, value):
        return ir.Constant(type_, [value] * number.count if vector else value)

    half = builder.zext(x, word)
    magnitude = builder.and_(half, constant(word, 0x7fff))
    moved = builder.add(builder.shl(magnitude, constant(word, 13)), constant(word, 0xe0 << 23))
    normal = builder.fmul(builder.bitcast(moved, number), constant(number, 2.0 ** -112))
    raised = builder.bitcast(builder.or_(magnitude, constant(word, 0x3f000000)), number)       # 0.5 + fraction 2^-24
    tiny = builder.fsub(raised, constant(number, 0.5))
    value = builder.select(builder.icmp_unsigned("<", magnitude, constant(word, 0x400)), tiny, normal)
    sign = builder.shl(builder.and_(half, constant(word, 0x8000)), constant(word, 16))
    return builder.bitcast(builder.or_(builder.bitcast(value, word), sign), number)


@intrinsic
def upper_half_to_float(typing_context, v):
    """A vector of uint16 that is the upper halves of float32 (bfloat16), as float32."""
    vector = Vector(types.float32, v.lanes)

    def codegen(context, builder, signature, args):
        words = ir.VectorType(ir.IntType(32), v.lanes)
        shifted = builder.shl(builder.zext(args[0], words), ir.Constant(words, [16] * v.lanes))
        return builder.bitcast(shifted, context.get_value_type(vector))
    return vector(v), codegen


def lookup(table):
    """A function for kernels: 16 lanes of uint8 below 16 -> the int8 vector of table[lane], for 16 fixed numbers."""
    byte, lane = ir.IntType(8), ir.IntType(32)
    entries = ir.Constant(ir.VectorType(byte, 16), list(table))

    @intrinsic
    def entry(typing_context, v):
        def codegen(context, builder, signature, args):
            if "+ssse3" in target_features():
                bytes_to_bytes = ir.FunctionType(entries.type, [entries.type] * 2)
                shuffle = cgutils.get_or_insert_function(builder.module, bytes_to_bytes,
                                                         "llvm.x86.ssse3.pshuf.b.128")
                return builder.call(shuffle, [entries, args[0]])
            found = ir.Constant(entries.type, ir.Undefined)
            for i in range(16):
                index = builder.extract_element(args[0], lane(i))
                found = builder.insert_element(found, builder.extract_element(entries, index), lane(i))
            return found
        return Vector(types.int8, 16)(v), codegen
    return entry


@intrinsic
def multiply_add(typing_context, a, b, c):
    """a * b + c, rounded once where the processor can; b may be a number. No term is computed where a is a constant
    0."""
    def codegen(context, builder, signature, args):
        factor = args[1] if isinstance(b, Vector) else _in_all_lanes(builder, args[1], args[0].type)
        product = builder.fmul(args[0], factor, flags=("contract", "nnan", "nsz"))
        return builder.fadd(product, args[2], flags=("contract", "nsz"))
    return a(a, b, a), codegen


@intrinsic
def total(typing_context, v):
    """The sum over the lanes of a float32 vector, in an order that LLVM chooses."""
    def codegen(context, builder, signature, args):
        number = ir.FloatType()
        add = cgutils.get_or_insert_function(builder.module, ir.FunctionType(number, [number, args[0].type]),
                                             f"llvm.vector.reduce.fadd.v{v.lanes}f32")
        return builder.call(add, [number(0.0), args[0]], fastmath=("reassoc",))
    return types.float32(v), codegen


@intrinsic(prefer_literal=True)
def unrolled(typing_context, count, body, state, args):
    """The last state of: for k in range(count): state = body(k, state, *args), written out with every k a constant.

    body is a compiled function. LLVM itself would leave a loop of this length, and then shifts by k are slow.
    """
    signature = body.get_call_type(typing_context, (types.int64, state, *args), {})

    def codegen(context, builder, _, values):
        function, last = context.get_function(body, signature), values[2]
        context.add_linking_libs(function.libs)
        for k in range(count.literal_value):
            last = function(builder, [ir.IntType(64)(k), last, *cgutils.unpack_tuple(builder, values[3])])
        return last
    return state(count, body, state, args), codegen


def _define(operation, of_floats, of_integers):
    """Lane by lane, for vectors of one kind or a vector and a number."""
    @type_callable(operation)
    def typed(context):
        def result(a, b):
            return a if isinstance(a, Vector) and (a == b or isinstance(b, types.Number)) else None
        return result

    def lower(context, builder, signature, args):
        (vector, other), (a, b) = signature.args, args
        if other != vector:
            b = _in_all_lanes(builder, context.cast(builder, b, other, vector.dtype), a.type)
        return getattr(builder, of_floats if vector.dtype == types.float32 else of_integers)(a, b)

    lower_builtin(operation, Vector, Vector)(lower)
    lower_builtin(operation, Vector, types.Number)(lower)


def _in_all_lanes(builder, number, vector_type):
    lane, undefined = ir.IntType(32), ir.Constant(vector_type, ir.Undefined)
    first = ir.Constant(ir.VectorType(lane, vector_type.count), None)
    return builder.shuffle_vector(builder.insert_element(undefined, number, lane(0)), undefined, first)


for operation, of_floats, of_integers in (
        (operator.add, "fadd", "add"), (operator.sub, "fsub", "sub"), (operator.mul, "fmul", "mul"),
        (operator.and_, None, "and_"), (operator.or_, None, "or_"),
        (operator.lshift, None, "shl"), (operator.rshift, None, "lshr")):
    _define(operation, of_floats, of_integers)
