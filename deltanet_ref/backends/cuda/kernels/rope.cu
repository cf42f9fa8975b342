// Partial rotary embedding [rope.1..3, rope.5]. Definition: ops/rope.py.
//
// Design   a thread rotates VECTOR pairs (j, j + R/2) of a row, or copies VECTOR of the features that are not rotated.
//          The tables cos, sin are float32 and shared by all heads of a token: they come from a cache. Their angles are
//          counted in turns, in float64: the whole turns of a position of a million are dropped without a loss.
// Floors   8192 tokens, 8 query and 2 key heads of 256, R = 64 (0.8B) in bfloat16, at 2.94 TB/s: 84 MB  29 us either
//          way, three quarters of it the copy of what is not rotated.
// Versions this one
// Macros   REAL; VECTOR: 16 bytes of REAL, or 1
#include "common.cuh"

constexpr int THREADS = 256;

// cos, sin (L, half) of position * frequency_j; turns_j = frequency_j / 2 pi; frequency j follows row axis_j
extern "C" __global__ void __launch_bounds__(THREADS)
rope_tables(const double* __restrict__ positions, int L, const double* __restrict__ turns,
            const int* __restrict__ axis, int half, float* __restrict__ cos, float* __restrict__ sin) {
    const int at = blockIdx.x * THREADS + threadIdx.x, token = at / half, j = at % half;
    if (token >= L) return;
    const double turn = positions[(long long)axis[j] * L + token] * turns[j];       // [rope.1]
    const double part = turn - rint(turn);
    cos[at] = (float)cospi(2.0 * part);                                             // [rope.2]
    sin[at] = (float)sinpi(2.0 * part);
}

// x (B, L, heads, d) with strides of the token and the head, y (B L heads, d); cos, sin (L, half), R = 2 half;
// direction 1, or -1 for the opposite angle; rows = B L heads
extern "C" __global__ void __launch_bounds__(THREADS)
rope(const REAL* __restrict__ x, int heads, long long token_stride, long long head_stride,
     const float* __restrict__ cos, const float* __restrict__ sin, float direction, int L, int half, int rows, int d,
     REAL* __restrict__ y) {
    const int tasks = (d - half) / VECTOR;  // of a row: half / VECTOR rotate, the others copy
    const long long task = (long long)blockIdx.x * THREADS + threadIdx.x;
    const int row = (int)(task / tasks), j = (int)(task - (long long)row * tasks) * VECTOR;
    if (row >= rows) return;
    const int token = row / heads;
    const REAL* x_row = x + token * token_stride + row % heads * head_stride;
    REAL* y_row = y + (long long)row * d;
    if (j >= half) {
        store(y_row + half + j, load<VECTOR>(x_row + half + j));
        return;
    }
    const long long angle = (long long)(token % L) * half + j;
    const Pack<REAL, VECTOR> first = load<VECTOR>(x_row + j), second = load<VECTOR>(x_row + half + j);
    const Pack<float, VECTOR> cos_j = load<VECTOR>(cos + angle), sin_j = load<VECTOR>(sin + angle);
    Pack<REAL, VECTOR> new_first, new_second;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        const float sine = direction * sin_j[i];
        new_first.set(i, fmaf(first[i], cos_j[i], -second[i] * sine));
        new_second.set(i, fmaf(second[i], cos_j[i], first[i] * sine));
    }
    store(y_row + j, new_first);
    store(y_row + half + j, new_second);
}
