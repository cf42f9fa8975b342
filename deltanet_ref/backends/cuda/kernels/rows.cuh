// Rows of d values in registers: LANES neighbouring threads hold one row, each PACKS packs of VECTOR values, so a row
// is read once, reduced and written once.
//
// Macros   REAL    type of activations
//          VECTOR  values of one access: 16 bytes of REAL, or 1 where d or an address does not allow it
//          LANES   threads of a row: 16 (d = 128), 32 (a warp; up to 1024 in bfloat16) or 256 (a block)
//          PACKS   packs of a thread, a power of two: PACKS LANES VECTOR >= d
#pragma once

#include "common.cuh"

constexpr int THREADS = 256;
constexpr int GROUPS = THREADS / LANES;  // rows that a block holds at once

// Where row i of (tokens, heads, d) lies: a slice of the features of a larger array is read in place.
__device__ __forceinline__ long long row_offset(int i, int heads, long long token_stride, long long head_stride) {
    return (i / heads) * token_stride + (i % heads) * head_stride;
}

// Row number i of this thread, one of GROUPS from `first` on. Where there are fewer rows, i is the last one and its
// width is 0, not d: it reads as zeros, nothing is stored.
struct Here {
    int i, width;
};
__device__ __forceinline__ Here row_from(int first, int rows, int d) {
    const int i = first + threadIdx.x / LANES;
    return i < rows ? Here{i, d} : Here{rows - 1, 0};
}

__device__ __forceinline__ int lane_of_row() { return threadIdx.x % LANES; }

// The first feature of this thread's pack p.
__device__ __forceinline__ int column(int p) { return (p * LANES + lane_of_row()) * VECTOR; }

// The part of a row that a thread holds.
template <class T>
struct Row {
    Pack<T, VECTOR> pack[PACKS];

    __device__ __forceinline__ void read(const T* row, int width) {
#pragma unroll
        for (int p = 0; p < PACKS; ++p)
            pack[p] = column(p) < width ? load<VECTOR>(row + column(p)) : zeros<T, VECTOR>();
    }
    __device__ __forceinline__ void write(T* row, int width) const {
#pragma unroll
        for (int p = 0; p < PACKS; ++p)
            if (column(p) < width) store(row + column(p), pack[p]);
    }
};

// The sum over a row; each of its threads gets it. scratch: of block_sum, for rows that a whole block holds.
__device__ __forceinline__ float row_sum(float x, float* scratch) {
    if constexpr (LANES <= WARP)
        return warp_sum<LANES>(x);
    else
        return block_sum<LANES / WARP>(x, scratch);
}
