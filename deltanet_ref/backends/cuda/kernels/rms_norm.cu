// RMS norm with a weight, plain and gated by SiLU(z) [norm.5..12]. Definition: ops/rms_norm.py.
//
// Design   LANES threads hold a row in registers (rows.cuh). Forward: one block for each GROUPS rows. Backward with dw:
//          a fixed number of blocks, each taking every so many rows and summing dw over them in registers; its groups
//          are added in shared memory, one row of parts per block; column_sums.cu adds the parts. Without dw as
//          forward.
// Floors   8192 tokens of the 0.8B shape in bfloat16, at 2.94 TB/s:
//          plain, D = 1024                 forward   34 MB  11 us    backward   50 MB  17 us
//          gated, 16 heads of d_v = 128    forward  101 MB  34 us    backward  168 MB  57 us
//          about 12 flops an element, 30 where a sigmoid is taken: memory is the limit. The most registers, 126 in the
//          plain backward at D = 1024, allow 16 warps with 8 accesses of 512 bytes each under way: 64 KB, where hiding
//          700 ns of latency takes 16 KB on each of 132 multiprocessors.
// Versions this one
#include "rows.cuh"

constexpr int WARPS = THREADS / WARP;

// Two kernels have __launch_bounds__(THREADS, 1): without the 1, ptxas spills a register or two at some widths, to fit
// one more block on a multiprocessor.

struct Gradient {
    float dn[PACKS][VECTOR];  // of the normalised row n = x r
    float along;              // this thread's part of n . dn
};

// r = (mean x^2 + eps)^-1/2 [norm.5]
__device__ __forceinline__ float inverse_rms(const Row<REAL>& x, int d, float eps, float* scratch) {
    float squares = 0.0f;
#pragma unroll
    for (int p = 0; p < PACKS; ++p)
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) squares = fmaf(x.pack[p][i], x.pack[p][i], squares);
    return 1.0f / sqrtf(row_sum(squares, scratch) / d + eps);
}

// dx = r (dn - n mean(n . dn)) [norm.7], n = x r
__device__ __forceinline__ void normalised_backward(const Gradient& gradient, const Row<REAL>& x, float r, int d,
                                                    float* scratch, Row<REAL>& dx) {
    const float mean = row_sum(gradient.along, scratch) / d;
#pragma unroll
    for (int p = 0; p < PACKS; ++p)
#pragma unroll
        for (int i = 0; i < VECTOR; ++i)
            dx.pack[p].set(i, r * fmaf(-mean * r, x.pack[p][i], gradient.dn[p][i]));
}

// Add dw over the groups of the block and write the block's row of parts (gridDim.x, d). sums: (GROUPS, d) floats of
// shared memory; not used where one group is the block.
__device__ __forceinline__ void write_dw(const float (&dw)[PACKS][VECTOR], int d, float* sums, float* dw_parts) {
    float* part = dw_parts + (long long)blockIdx.x * d;
    float* own = GROUPS == 1 ? part : sums + threadIdx.x / LANES * d;
#pragma unroll
    for (int p = 0; p < PACKS; ++p)
#pragma unroll
        for (int i = 0; i < VECTOR; ++i)
            if (column(p) < d) own[column(p) + i] = dw[p][i];
    if constexpr (GROUPS > 1) {
        __syncthreads();  // all groups' sums are in shared memory
        for (int j = threadIdx.x; j < d; j += THREADS) {
            float total = sums[j];
            for (int group = 1; group < GROUPS; ++group) total += sums[group * d + j];
            part[j] = total;
        }
    }
}

// ---- plain

// x (tokens, heads, d) with strides, rows = tokens heads; y (rows, d), r (rows,)
extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm_forward(const REAL* __restrict__ x, int heads, long long token_stride, long long head_stride,
                 const float* __restrict__ w, float eps, int rows, int d, REAL* __restrict__ y,
                 float* __restrict__ r) {
    __shared__ float scratch[WARPS];
    const auto [i, width] = row_from(blockIdx.x * GROUPS, rows, d);
    Row<REAL> x_i;
    x_i.read(x + row_offset(i, heads, token_stride, head_stride), width);
    const float r_i = inverse_rms(x_i, d, eps, scratch);  // 1  r = (mean x^2 + eps)^-1/2
#pragma unroll
    for (int p = 0; p < PACKS; ++p) {  // 2  y = x r w
        if (column(p) >= width) continue;
        const Pack<float, VECTOR> w_p = load<VECTOR>(w + column(p));
        Pack<REAL, VECTOR> y_p;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) y_p.set(j, x_i.pack[p][j] * r_i * w_p[j]);
        store(y + (long long)i * d + column(p), y_p);
    }
    if (width && lane_of_row() == 0) r[i] = r_i;
}

// dy, dx (rows, d), x with strides, r (rows,); dw_parts (blocks, d), null without dw; shared: (GROUPS, d) floats if dw
extern "C" __global__ void __launch_bounds__(THREADS, 1)
rms_norm_backward(const REAL* __restrict__ dy, const REAL* __restrict__ x, int heads, long long token_stride,
                  long long head_stride, const float* __restrict__ r, const float* __restrict__ w, int rows, int d,
                  REAL* __restrict__ dx, float* __restrict__ dw_parts) {
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ float scratch[2][WARPS];  // used in turn: the next row's sums do not wait for readers of this row's
    float dw[PACKS][VECTOR] = {};
    int turn = 0;
    for (int first = blockIdx.x * GROUPS; first < rows; first += gridDim.x * GROUPS, turn ^= 1) {
        const auto [i, width] = row_from(first, rows, d);
        const long long start = (long long)i * d;
        Row<REAL> x_i, dy_i;
        dy_i.read(dy + start, width);
        x_i.read(x + row_offset(i, heads, token_stride, head_stride), width);
        const float r_i = r[i];
        // 2  y = x r w
        Gradient gradient = {};
#pragma unroll
        for (int p = 0; p < PACKS; ++p) {
            if (column(p) >= width) continue;
            const Pack<float, VECTOR> w_p = load<VECTOR>(w + column(p));
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const float n = x_i.pack[p][j] * r_i;
                gradient.dn[p][j] = dy_i.pack[p][j] * w_p[j];
                gradient.along = fmaf(n, gradient.dn[p][j], gradient.along);
                dw[p][j] = fmaf(dy_i.pack[p][j], n, dw[p][j]);
            }
        }
        // 1  r = (mean x^2 + eps)^-1/2
        Row<REAL> dx_i;
        normalised_backward(gradient, x_i, r_i, d, scratch[turn], dx_i);
        dx_i.write(dx + start, width);
    }
    if (dw_parts) write_dw(dw, d, reinterpret_cast<float*>(shared), dw_parts);
}

// ---- gated

// x, z (tokens, heads, d) with strides, rows = tokens heads; y (rows, d), r (rows,)
extern "C" __global__ void __launch_bounds__(THREADS, 1)
gated_rms_norm_forward(const REAL* __restrict__ x, int heads, long long token_stride, long long head_stride,
                       const REAL* __restrict__ z, int z_heads, long long z_token_stride, long long z_head_stride,
                       const float* __restrict__ w, float eps, int rows, int d, REAL* __restrict__ y,
                       float* __restrict__ r) {
    __shared__ float scratch[WARPS];
    const auto [i, width] = row_from(blockIdx.x * GROUPS, rows, d);
    Row<REAL> x_i, z_i;
    x_i.read(x + row_offset(i, heads, token_stride, head_stride), width);
    z_i.read(z + row_offset(i, z_heads, z_token_stride, z_head_stride), width);
    const float r_i = inverse_rms(x_i, d, eps, scratch);  // 1  r = (mean x^2 + eps)^-1/2
#pragma unroll
    for (int p = 0; p < PACKS; ++p) {  // 2  y = x r w SiLU(z)
        if (column(p) >= width) continue;
        const Pack<float, VECTOR> w_p = load<VECTOR>(w + column(p));
        Pack<REAL, VECTOR> y_p;
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) {
            const float z_j = z_i.pack[p][j];
            y_p.set(j, x_i.pack[p][j] * r_i * w_p[j] * silu(z_j, sigmoid(z_j)));
        }
        store(y + (long long)i * d + column(p), y_p);
    }
    if (width && lane_of_row() == 0) r[i] = r_i;
}

// dy, dx, dz (rows, d), x, z with strides, r (rows,); dw_parts (blocks, d), null without dw; shared: (GROUPS, d) floats
// if dw
extern "C" __global__ void __launch_bounds__(THREADS)
gated_rms_norm_backward(const REAL* __restrict__ dy, const REAL* __restrict__ x, int heads, long long token_stride,
                        long long head_stride, const REAL* __restrict__ z, int z_heads, long long z_token_stride,
                        long long z_head_stride, const float* __restrict__ r, const float* __restrict__ w, int rows,
                        int d, REAL* __restrict__ dx, REAL* __restrict__ dz, float* __restrict__ dw_parts) {
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ float scratch[2][WARPS];  // used in turn, as above
    float dw[PACKS][VECTOR] = {};
    int turn = 0;
    for (int first = blockIdx.x * GROUPS; first < rows; first += gridDim.x * GROUPS, turn ^= 1) {
        const auto [i, width] = row_from(first, rows, d);
        const long long start = (long long)i * d;
        Row<REAL> x_i, z_i, dy_i;
        dy_i.read(dy + start, width);
        x_i.read(x + row_offset(i, heads, token_stride, head_stride), width);
        z_i.read(z + row_offset(i, z_heads, z_token_stride, z_head_stride), width);
        const float r_i = r[i];
        // 2  y = n w SiLU(z), n = x r
        Gradient gradient = {};
        Row<REAL> dz_i;
#pragma unroll
        for (int p = 0; p < PACKS; ++p) {
            if (column(p) >= width) continue;
            const Pack<float, VECTOR> w_p = load<VECTOR>(w + column(p));
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const float n = x_i.pack[p][j] * r_i, z_j = z_i.pack[p][j], dy_j = dy_i.pack[p][j];
                const Sigmoid s = sigmoid(z_j);
                const float dgated = dy_j * silu(z_j, s);                                // dy SiLU(z)
                dz_i.pack[p].set(j, dy_j * n * w_p[j] * silu_derivative(z_j, s));        // [norm.10]
                dw[p][j] = fmaf(dgated, n, dw[p][j]);                                    // [norm.11]
                gradient.dn[p][j] = dgated * w_p[j];                                     // [norm.12]
                gradient.along = fmaf(n, gradient.dn[p][j], gradient.along);
            }
        }
        dz_i.write(dz + start, width);
        // 1  r = (mean x^2 + eps)^-1/2
        Row<REAL> dx_i;
        normalised_backward(gradient, x_i, r_i, d, scratch[turn], dx_i);
        dx_i.write(dx + start, width);
    }
    if (dw_parts) write_dw(dw, d, reinterpret_cast<float*>(shared), dw_parts);
}
