// The functions of kernels/ptx.cuh in C++: the instructions of tensor cores, ldmatrix and cp.async.
//
// Fragments (PTX ISA, "Matrix fragments for mma.m16n8k16" and ".m16n8k8"); g = lane / 4, t = lane % 4:
//
//   d (16, 8) float32                d[0], d[1]: (g, 2t), (g, 2t + 1)          d[2], d[3]: (g + 8, 2t), (g + 8, 2t + 1)
//   a (16, 16) bf16, two columns a   a[0]: (g, 2t ..)       a[1]: (g + 8, 2t ..)
//     register, the left one low     a[2]: (g, 2t + 8 ..)   a[3]: (g + 8, 2t + 8 ..)
//   b (16, 8) bf16, two rows each    b[0]: (2t .., g)       b[1]: (2t + 8 .., g)
//   a (16, 8) tf32                   a[0]: (g, t)   a[1]: (g + 8, t)   a[2]: (g, t + 4)   a[3]: (g + 8, t + 4)
//   b (8, 8) tf32                    b[0]: (t, g)   b[1]: (t + 4, g)
//
// Products are exact and added in float32 in the order of k; the device adds in an order, and with a rounding, that are
// not documented.
#pragma once

#include "cuda.h"

namespace ptx {

// ---- products

struct Mma {
    float* d;
    const uint32_t* a;
    const uint32_t* b;
};

using Row = float __attribute__((vector_size(32)));  // 8 columns of b, d

EMULATOR_QUIET static void need_warp(void** operands) {
    for (int lane = 0; lane < emulator::WARP; ++lane)
        if (operands[lane] == nullptr) emulator::fail("%s needs all 32 lanes of a warp", emulator::current->waits.kind);
}

// d += a b for K columns of a.
template <int K>
EMULATOR_QUIET static void multiply(void** operands, const float (&a)[16][K], const Row (&b)[K]) {
    for (int row = 0; row < 16; ++row) {
        union {
            Row all;
            float of[8];
        } d;
        for (int column = 0; column < 8; ++column)
            d.of[column] = static_cast<Mma*>(operands[row % 8 * 4 + column / 2])->d[row / 8 * 2 + column % 2];
        for (int k = 0; k < K; ++k) d.all += a[row][k] * b[k];
        for (int column = 0; column < 8; ++column)
            static_cast<Mma*>(operands[row % 8 * 4 + column / 2])->d[row / 8 * 2 + column % 2] = d.of[column];
    }
}

union Bits {
    uint32_t bits;
    float number;
};
EMULATOR_QUIET static float low(uint32_t pair) { return Bits{pair << 16}.number; }
EMULATOR_QUIET static float high(uint32_t pair) { return Bits{pair & 0xffff0000u}.number; }
EMULATOR_QUIET static float tf32(uint32_t bits) { return Bits{bits & 0xffffe000u}.number; }

EMULATOR_QUIET static void combine_mma_bf16(void** operands) {
    need_warp(operands);
    float a[16][16];
    Row b[16];
    for (int lane = 0; lane < 32; ++lane) {
        const Mma& m = *static_cast<Mma*>(operands[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int half = 0; half < 2; ++half) {
            const int k = 2 * t + 8 * half;
            a[g][k] = low(m.a[2 * half]), a[g][k + 1] = high(m.a[2 * half]);
            a[g + 8][k] = low(m.a[2 * half + 1]), a[g + 8][k + 1] = high(m.a[2 * half + 1]);
            b[k][g] = low(m.b[half]), b[k + 1][g] = high(m.b[half]);
        }
    }
    multiply(operands, a, b);
}

EMULATOR_QUIET static void combine_mma_tf32(void** operands) {
    need_warp(operands);
    float a[16][8];
    Row b[8];
    for (int lane = 0; lane < 32; ++lane) {
        const Mma& m = *static_cast<Mma*>(operands[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int half = 0; half < 2; ++half) {
            a[g][t + 4 * half] = tf32(m.a[2 * half]);
            a[g + 8][t + 4 * half] = tf32(m.a[2 * half + 1]);
            b[t + 4 * half][g] = tf32(m.b[half]);
        }
    }
    multiply(operands, a, b);
}

static inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATOR_HERE) {
    Mma operand{d, a, b};
    emulator::with_warp({"mma_bf16", file, line}, 0xffffffffu, &operand, combine_mma_bf16);
}
static inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATOR_HERE) {
    Mma operand{d, a, b};
    emulator::with_warp({"mma_tf32", file, line}, 0xffffffffu, &operand, combine_mma_tf32);
}

// cvt.rna: to nearest, ties away from zero; 10 bits of mantissa are left.
static inline uint32_t to_tf32(float x) {
    const uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
    return (bits + 0x1000u) & 0xffffe000u;
}

// ---- ldmatrix: N matrices of 8 rows of 16 bytes

struct Load {
    unsigned char row[16];  // what the lane has read
    uint32_t* r;
};

template <int N, bool TRANSPOSED>
EMULATOR_QUIET static void combine_ldmatrix(void** operands) {
    need_warp(operands);
    for (int lane = 0; lane < 32; ++lane)
        for (int matrix = 0; matrix < N; ++matrix) {
            void** rows = operands + 8 * matrix;
            uint16_t pair[2];
            for (int i = 0; i < 2; ++i) {
                const int row = TRANSPOSED ? lane % 4 * 2 + i : lane / 4, column = TRANSPOSED ? lane / 4 : lane % 4 * 2 + i;
                const unsigned char* from = static_cast<Load*>(rows[row])->row + 2 * column;
                pair[i] = static_cast<uint16_t>(from[0] | from[1] << 8);
            }
            static_cast<Load*>(operands[lane])->r[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
        }
}

template <int N, bool TRANSPOSED>
static inline void ldmatrix(uint32_t (&r)[N], const void* row, const char* kind, const char* file, int line) {
    const emulator::Place place{kind, file, line};
    Load operand{{}, r};
    if (emulator::current->lane < 8 * N) {  // each lane reads its row itself: a sanitizer sees who does
        emulator::check_row(row, true, place);
        const uint64_t* from = static_cast<const uint64_t*>(row);
        const uint64_t words[2] = {from[0], from[1]};
        memcpy(operand.row, words, 16);
    }
    emulator::with_warp(place, 0xffffffffu, &operand, combine_ldmatrix<N, TRANSPOSED>);
}

static inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, EMULATOR_HERE) {
    ldmatrix<4, false>(r, row, "ldmatrix_x4", file, line);
}
static inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, EMULATOR_HERE) {
    ldmatrix<2, false>(r, row, "ldmatrix_x2", file, line);
}
static inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, EMULATOR_HERE) {
    ldmatrix<4, true>(r, row, "ldmatrix_x4_trans", file, line);
}
static inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, EMULATOR_HERE) {
    ldmatrix<2, true>(r, row, "ldmatrix_x2_trans", file, line);
}

// ---- cp.async: delivered as late as possible, by the wait that requires it. Until then the destination is poison:
// nobody may read it between the two.

EMULATOR_QUIET static void remember(void* to, const void* from) {
    emulator::Thread* me = emulator::current;
    if (me->copies_size == me->copies_capacity) {
        me->copies_capacity = me->copies_capacity == 0 ? 64 : 2 * me->copies_capacity;
        emulator::ignore_thread(true);
        me->copies = static_cast<emulator::Copy*>(realloc(me->copies, me->copies_capacity * sizeof(emulator::Copy)));
        emulator::ignore_thread(false);
    }
    me->copies[me->copies_size++] = {to, from, me->group};
}

// The oldest copy of a group before `group`; false if there is none.
EMULATOR_QUIET static bool recall(int group, int at, emulator::Copy* copy) {
    emulator::Thread* me = emulator::current;
    if (at < me->copies_size && me->copies[at].group < group) {
        *copy = me->copies[at];
        return true;
    }
    for (int i = at; i < me->copies_size; ++i) me->copies[i - at] = me->copies[i];
    me->copies_size -= at;
    return false;
}

static inline void cp_async_16(void* shared, const void* global, bool valid, EMULATOR_HERE) {
    const emulator::Place place{"cp_async_16", file, line};
    emulator::check_row(shared, true, place);
    emulator::check_row(global, false, place);
    if (valid) (void)*static_cast<const volatile uint64_t*>(global), (void)static_cast<const volatile uint64_t*>(global)[1];
    static_cast<volatile uint64_t*>(shared)[0] = static_cast<volatile uint64_t*>(shared)[1] = ~0ull;
    remember(shared, valid ? global : nullptr);
}

EMULATOR_QUIET static void cp_async_commit() { ++emulator::current->group; }

EMULATOR_QUIET static bool skip_wait(const emulator::Place& place) {
    emulator::mark(place);
    return emulator::switched_off(place);
}

template <int PENDING>
static inline void cp_async_wait(EMULATOR_HERE) {
    if (skip_wait({"cp_async_wait", file, line})) return;
    emulator::Copy copy;
    for (int at = 0; recall(emulator::current->group - PENDING, at, &copy); ++at)
        for (int i = 0; i < 2; ++i)
            static_cast<uint64_t*>(copy.to)[i] = copy.from == nullptr ? 0 : static_cast<const uint64_t*>(copy.from)[i];
}

}  // namespace ptx

using namespace ptx;
