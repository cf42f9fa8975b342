// Rows of a table by token, and the sum of gradients by token [embed.1..2]. Definition: ops/embedding.py.
//
// Design   forward: a thread copies VECTOR values. Backward: the host sorts the tokens, and a block owns one used token
//          and 32 VECTOR columns: its 8 warps each add every 8th use, then the 8 sums are added.
// Floors   8192 tokens, D = 1024 (0.8B) in bfloat16, at 2.94 TB/s: forward 34 MB  11 us. Backward 50 MB  17 us, after
//          zeros for the float32 gradient of the table (248,320 x 1024: 1.0 GB, 346 us).
// Versions this one
// Macros   REAL; VECTOR: 16 bytes of REAL, or 1
#include "common.cuh"

constexpr int THREADS = 256, WARPS = THREADS / WARP;

// tokens (count,), w (V, D) -> x (count, D)
extern "C" __global__ void __launch_bounds__(THREADS)
embedding_forward(const int* __restrict__ tokens, const REAL* __restrict__ w, int count, int D,
                  REAL* __restrict__ x) {
    const int packs = D / VECTOR;
    const long long task = (long long)blockIdx.x * THREADS + threadIdx.x;
    const int t = (int)(task / packs), column = (int)(task - (long long)t * packs) * VECTOR;
    if (t < count) store(x + (long long)t * D + column, load<VECTOR>(w + (long long)tokens[t] * D + column));
}

// dw_v = sum of dx_t over the t with token_t = v [embed.2], for the token v = used[blockIdx.x].
// dx (count, D), order (count,): its uses are order[starts[blockIdx.x]] .. order[starts[blockIdx.x + 1] - 1]; dw (V, D)
extern "C" __global__ void __launch_bounds__(THREADS)
embedding_backward(const REAL* __restrict__ dx, const int* __restrict__ order, const int* __restrict__ starts,
                   const int* __restrict__ used, int D, float* __restrict__ dw) {
    __shared__ float of_warp[WARPS][VECTOR][WARP];  // the lane is the last axis: no bank conflicts
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int column = (blockIdx.y * WARP + lane) * VECTOR;
    const int end = starts[blockIdx.x + 1];
    float sum[VECTOR] = {};
    for (int use = starts[blockIdx.x] + warp; use < end && column < D; use += WARPS) {
        const Pack<REAL, VECTOR> dx_t = load<VECTOR>(dx + (long long)order[use] * D + column);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) sum[j] += dx_t[j];
    }
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) of_warp[warp][j][lane] = sum[j];
    __syncthreads();  // the sums of all warps are there
    if (warp > 0 || column >= D) return;
    Pack<float, VECTOR> total;
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
        for (int other = 1; other < WARPS; ++other) sum[j] += of_warp[other][j][lane];
        total.set(j, sum[j]);
    }
    store(dw + (long long)used[blockIdx.x] * D + column, total);
}
