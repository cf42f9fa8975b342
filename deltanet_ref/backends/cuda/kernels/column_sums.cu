// The sums over the first axis of a small float32 matrix: the second stage of gradients of weights, whose first stage
// left one row of partial sums per block.
//
// Design   32 columns a block, for coalesced reads; its 8 warps each add every 8th row, then the 8 sums are added. The
//          order is fixed, so the bits are the same in every run.
// Floors   count x columns floats read once: 512 x 1024 are 2.1 MB, below 1 us; the latency of count / 8 reads decides.
// Versions this one
#include "common.cuh"

constexpr int THREADS = 256, WARPS = THREADS / WARP;

// parts (count, columns) -> sums (columns,)
extern "C" __global__ void __launch_bounds__(THREADS)
column_sums(const float* __restrict__ parts, int count, int columns, float* __restrict__ sums) {
    __shared__ float of_warp[WARPS][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, column = blockIdx.x * WARP + lane;
    float sum = 0.0f;
    if (column < columns) {
#pragma unroll 8
        for (int row = warp; row < count; row += WARPS) sum += parts[(long long)row * columns + column];
    }
    of_warp[warp][lane] = sum;
    __syncthreads();  // the sums of all warps are there
    if (warp == 0 && column < columns) {
        for (int other = 1; other < WARPS; ++other) sum += of_warp[other][lane];
        sums[column] = sum;
    }
}
