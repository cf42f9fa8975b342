// L2 normalisation of rows [norm.1..4]. Definition: ops/l2_norm.py.
//
// Design   LANES threads hold a row in registers (rows.cuh), one block for each GROUPS rows.
// Floors   8192 tokens of the 0.8B shape in bfloat16 (16 heads of d_k = 128), at 2.94 TB/s, for q and for k each:
//          forward 67 MB  23 us,  backward 101 MB  34 us; 4 to 6 flops an element.
// Versions this one
#include "rows.cuh"

constexpr int WARPS = THREADS / WARP;

// The sum over the row of a_j b_j.
__device__ __forceinline__ float dot(const Row<REAL>& a, const Row<REAL>& b, float* scratch) {
    float sum = 0.0f;
#pragma unroll
    for (int p = 0; p < PACKS; ++p)
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) sum = fmaf(a.pack[p][j], b.pack[p][j], sum);
    return row_sum(sum, scratch);
}

// x (tokens, heads, d) with strides, rows = tokens heads; y (rows, d), r (rows,)
extern "C" __global__ void __launch_bounds__(THREADS)
l2_norm_forward(const REAL* __restrict__ x, int heads, long long token_stride, long long head_stride, float eps,
                int rows, int d, REAL* __restrict__ y, float* __restrict__ r) {
    __shared__ float scratch[WARPS];
    const auto [i, width] = row_from(blockIdx.x * GROUPS, rows, d);
    Row<REAL> x_i, y_i;
    x_i.read(x + row_offset(i, heads, token_stride, head_stride), width);
    const float r_i = 1.0f / sqrtf(dot(x_i, x_i, scratch) + eps);  // 1  r = (sum x^2 + eps)^-1/2
#pragma unroll
    for (int p = 0; p < PACKS; ++p)  // 2  y = x r
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) y_i.pack[p].set(j, x_i.pack[p][j] * r_i);
    y_i.write(y + (long long)i * d, width);
    if (width && lane_of_row() == 0) r[i] = r_i;
}

// dx = r (dy - y (y . dy)) [norm.4]. dy (tokens, heads, d) with strides; y, dx (rows, d), r (rows,)
extern "C" __global__ void __launch_bounds__(THREADS)
l2_norm_backward(const REAL* __restrict__ dy, int heads, long long token_stride, long long head_stride,
                 const REAL* __restrict__ y, const float* __restrict__ r, int rows, int d, REAL* __restrict__ dx) {
    __shared__ float scratch[WARPS];
    const auto [i, width] = row_from(blockIdx.x * GROUPS, rows, d);
    const long long start = (long long)i * d;
    Row<REAL> dy_i, y_i, dx_i;
    dy_i.read(dy + row_offset(i, heads, token_stride, head_stride), width);
    y_i.read(y + start, width);
    const float r_i = r[i];
    const float along = dot(y_i, dy_i, scratch);
#pragma unroll
    for (int p = 0; p < PACKS; ++p)
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) dx_i.pack[p].set(j, r_i * fmaf(-along, y_i.pack[p][j], dy_i.pack[p][j]));
    dx_i.write(dx + start, width);
}
