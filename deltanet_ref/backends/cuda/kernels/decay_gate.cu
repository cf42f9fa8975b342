// The log decay g and the write strength beta, float32 whatever REAL is [gate.6..12]. Definition: ops/decay_gate.py.
//
// Design   a thread stays with one head and goes through the tokens of its block, so that it can sum dA_log and
//          ddt_bias in registers; the threads of a head are added in shared memory, column_sums.cu adds the blocks. a
//          and b are read again in backward, nothing is kept.
// Floors   8192 tokens, 16 heads (0.8B) in bfloat16: forward 1.6 MB, backward 2.1 MB, below 1 us at 2.94 TB/s: the
//          launch decides.
// Versions this one
// Macros   REAL
#include "common.cuh"

constexpr int THREADS = 256;

// log(1 + e^x) [gate.5]
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// What a thread works on: head h (the grid's second axis holds the heads beyond 256), every `step` tokens from `first`.
struct Part {
    int h, first, end, step, heads_here;
    bool works;
};
__device__ __forceinline__ Part part_of_thread(int T, int heads, int tokens) {
    const int low = blockIdx.y * THREADS, heads_here = heads - low < THREADS ? heads - low : THREADS;
    const int step = THREADS / heads_here, token = threadIdx.x / heads_here;
    const int begin = blockIdx.x * tokens, end = begin + tokens < T ? begin + tokens : T;
    return {low + (int)threadIdx.x % heads_here, begin + token, end, step, heads_here, token < step};
}

// a, b, g, beta (T, heads), A_log, dt_bias (heads,); a block does `tokens` tokens
extern "C" __global__ void __launch_bounds__(THREADS)
decay_gate_forward(const REAL* __restrict__ a, const REAL* __restrict__ b, const float* __restrict__ A_log,
                   const float* __restrict__ dt_bias, int T, int heads, int tokens, float* __restrict__ g,
                   float* __restrict__ beta) {
    const Part part = part_of_thread(T, heads, tokens);
    if (!part.works) return;
    const float A = expf(A_log[part.h]), bias = dt_bias[part.h];
    for (int t = part.first; t < part.end; t += part.step) {
        const long long at = (long long)t * heads + part.h;
        const float x = to_float(a[at]) + bias;      // 1  x = a + dt_bias
        g[at] = -A * softplus(x);                    // 2  g = -A softplus(x), A = exp(A_log)
        beta[at] = sigmoid(to_float(b[at])).value;   // 3  beta = sigmoid(b)
    }
}

// dg, dbeta (T, heads) float32, da, db (T, heads); parts (blocks, 2, heads) of dA_log and ddt_bias, null without them
extern "C" __global__ void __launch_bounds__(THREADS)
decay_gate_backward(const float* __restrict__ dg, const float* __restrict__ dbeta, const REAL* __restrict__ a,
                    const REAL* __restrict__ b, const float* __restrict__ A_log, const float* __restrict__ dt_bias,
                    int T, int heads, int tokens, REAL* __restrict__ da, REAL* __restrict__ db,
                    float* __restrict__ parts) {
    __shared__ float of_thread[2][THREADS];
    const Part part = part_of_thread(T, heads, tokens);
    const float A = expf(A_log[part.h]), bias = dt_bias[part.h];
    float dA_log = 0.0f, ddt_bias = 0.0f;
    for (int t = part.first; part.works && t < part.end; t += part.step) {
        const long long at = (long long)t * heads + part.h;
        // 3  beta = sigmoid(b)
        const Sigmoid s = sigmoid(to_float(b[at]));
        db[at] = from_float<REAL>(dbeta[at] * s.value * s.complement);   // [gate.9]
        // 2  g = -A softplus(x)
        const float x = to_float(a[at]) + bias;
        const float dx = -A * sigmoid(x).value * dg[at];                 // [gate.10]
        dA_log = fmaf(-A * softplus(x), dg[at], dA_log);                 // [gate.11]
        // 1  x = a + dt_bias
        da[at] = from_float<REAL>(dx);
        ddt_bias += dx;                                                  // [gate.12]
    }
    if (!parts) return;
    of_thread[0][threadIdx.x] = dA_log;
    of_thread[1][threadIdx.x] = ddt_bias;
    __syncthreads();  // the sums of all threads are there
    if (threadIdx.x >= part.heads_here) return;
    for (int other = 1; other < part.step; ++other) {
        dA_log += of_thread[0][threadIdx.x + other * part.heads_here];
        ddt_bias += of_thread[1][threadIdx.x + other * part.heads_here];
    }
    float* of_block = parts + (long long)blockIdx.x * 2 * heads + part.h;
    of_block[0] = dA_log;
    of_block[heads] = ddt_bias;
}
