// o times sigmoid(gate), the output gate of attention [attn.10..11]. Definition: ops/softmax_attention.py.
//
// Design   element by element, VECTOR values a thread and array. The gate is read in place out of the projection that
//          holds a query and its gate head by head.
// Floors   8192 tokens, 8 heads of 256 (0.8B) in bfloat16, at 2.94 TB/s: forward 101 MB  34 us, backward 168 MB  57 us.
// Versions this one
// Macros   REAL; VECTOR: 16 bytes of REAL, or 1
#include "common.cuh"

constexpr int THREADS = 256;

// Where this thread's values lie in arrays (rows, d), and in the gate (tokens, heads, d) with strides.
struct Place {
    long long flat, gate;
};
__device__ __forceinline__ Place place(int d, int heads, long long token_stride, long long head_stride) {
    const long long flat = ((long long)blockIdx.x * THREADS + threadIdx.x) * VECTOR;
    const unsigned row = (unsigned)(flat / d), column = (unsigned)(flat - (long long)row * d);
    return {flat, row / heads * token_stride + row % heads * head_stride + column};
}

// o, y (rows, d), gate (tokens, heads, d) with strides; n = rows d
extern "C" __global__ void __launch_bounds__(THREADS)
sigmoid_gate_forward(const REAL* __restrict__ o, const REAL* __restrict__ gate, int heads, long long token_stride,
                     long long head_stride, int d, long long n, REAL* __restrict__ y) {
    const Place at = place(d, heads, token_stride, head_stride);
    if (at.flat >= n) return;
    const Pack<REAL, VECTOR> o_p = load<VECTOR>(o + at.flat), gate_p = load<VECTOR>(gate + at.gate);
    Pack<REAL, VECTOR> y_p;
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) y_p.set(j, o_p[j] * sigmoid(gate_p[j]).value);
    store(y + at.flat, y_p);
}

extern "C" __global__ void __launch_bounds__(THREADS)
sigmoid_gate_backward(const REAL* __restrict__ dy, const REAL* __restrict__ o, const REAL* __restrict__ gate,
                      int heads, long long token_stride, long long head_stride, int d, long long n,
                      REAL* __restrict__ d_o, REAL* __restrict__ dgate) {
    const Place at = place(d, heads, token_stride, head_stride);
    if (at.flat >= n) return;
    const Pack<REAL, VECTOR> dy_p = load<VECTOR>(dy + at.flat), o_p = load<VECTOR>(o + at.flat),
                             gate_p = load<VECTOR>(gate + at.gate);
    Pack<REAL, VECTOR> d_o_p, dgate_p;
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
        const Sigmoid s = sigmoid(gate_p[j]);
        d_o_p.set(j, dy_p[j] * s.value);
        dgate_p.set(j, dy_p[j] * o_p[j] * s.value * s.complement);
    }
    store(d_o + at.flat, d_o_p);
    store(dgate + at.flat, dgate_p);
}
