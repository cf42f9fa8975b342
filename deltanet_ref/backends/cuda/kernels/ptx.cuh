// Instructions that C++ has no name for: products of tiles on tensor cores, loads of tiles, asynchronous copies.
//
// Include it as <ptx.cuh>: the emulator has a file of this name with the same functions, first on its include path.
//
// Fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16" and ".m16n8k8"): with row = lane / 4, pair = 2 (lane % 4) and
// at = lane % 4, a lane holds
//
//   d[0..3]                 (row, pair), (row, pair + 1), (row + 8, pair), (row + 8, pair + 1)    float32
//   a[0..3], bfloat16       (row, pair..), (row + 8, pair..), (row, pair + 8..), (row + 8, pair + 8..)
//                           two columns each; the left one in the lower half
//   b[0..1], bfloat16       (pair.., row), (pair + 8.., row)    two rows each; the upper one in the lower half
//   a[0..3], tf32           (row, at), (row + 8, at), (row, at + 4), (row + 8, at + 4)
//   b[0..1], tf32           (at, row), (at + 4, row)
#pragma once

#ifdef __CUDACC_RTC__
using uint32_t = unsigned int;
#else
#include <cstdint>
#endif

// The 32-bit address of a pointer into shared memory.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// d += a b: (16, 16) times (16, 8), bfloat16 factors, float32 sums.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a b: (16, 8) times (8, 8), factors in TF32 (the low 13 bits are ignored), float32 sums.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The nearest TF32 number: 8 bits of exponent, 10 of mantissa.
__device__ __forceinline__ uint32_t to_tf32(float x) {
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

// Four (two) tiles of 8 rows of 16 bytes. Lane i gives the address of row i % 8 of tile i / 8 (x2: of lanes 0 .. 15), a
// multiple of 16; r[n] is then row lane / 4, 4 bytes from byte 4 (lane % 4), of tile n. _trans takes the rows as 8
// numbers of 16 bits and transposes the tile: r[n] holds (pair, row) and (pair + 1, row).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// Start copying 16 bytes to shared memory, zeros if not valid. They are there for this thread after cp_async_wait, for
// others after a barrier as well. Both addresses are multiples of 16; global is not read if not valid.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(shared_address(shared)), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}

// The copies started since the last commit become one group.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most PENDING of this thread's groups, the newest, are unfinished.
template <int PENDING>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
}
