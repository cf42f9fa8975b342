// One step of AdamW on one array, in float32, and the norm of a gradient that clips it. Definitions: ops/adamw.py,
// train/adamw.py.
//
// Design   element by element, VECTOR values a thread and array. What depends on the step is read from memory: neither
//          the norm nor the factor that follows from it visits the host. Squares are summed in a fixed order: NORM_BLOCKS
//          blocks each write one part, one block adds the parts in float64.
// Floors   p, m, v read and written, g read: 28 bytes a parameter, 4 more for the norm; 10.6 million LoRA parameters
//          (0.8B, rank 16): 297 MB, 101 us at 2.94 TB/s, and 42 MB, 15 us.
// Versions this one
// Macros   VECTOR: 4, or 1
#include "common.cuh"

constexpr int THREADS = 256, NORM_BLOCKS = 256;

// ---- the norm of a gradient

// parts (NORM_BLOCKS,): sums of the squares of g (n,)
extern "C" __global__ void __launch_bounds__(THREADS)
adamw_squares(const float* __restrict__ g, long long n, float* __restrict__ parts) {
    __shared__ float scratch[THREADS / WARP];
    float sum = 0.0f;
    for (long long at = ((long long)blockIdx.x * THREADS + threadIdx.x) * VECTOR; at < n;
         at += (long long)NORM_BLOCKS * THREADS * VECTOR) {
        const Pack<float, VECTOR> g_p = load<VECTOR>(g + at);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) sum = fmaf(g_p[j], g_p[j], sum);
    }
    sum = block_sum<THREADS / WARP>(sum, scratch);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// norm (2,): |g|, and min(1, limit / (|g| + 1e-6)), which is 1 for an infinite limit
extern "C" __global__ void __launch_bounds__(1)
adamw_norm(const float* __restrict__ parts, float limit, float* __restrict__ norm) {
    double sum = 0.0;
    for (int i = 0; i < NORM_BLOCKS; ++i) sum += parts[i];
    const float length = static_cast<float>(sqrt(sum));
    norm[0] = length;
    norm[1] = fminf(1.0f, limit / (length + 1e-6f));
}

// ---- the step

// coefficients: lr weight_decay, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1^t), 1 / (1 - beta2^t), eps;
// p, m, v, g (n,)
// norm: of adamw_norm, its factor applied to g, and nothing is changed if it is not finite; or null
extern "C" __global__ void __launch_bounds__(THREADS)
adamw_update(const float* __restrict__ coefficients, float* __restrict__ p, float* __restrict__ m,
             float* __restrict__ v, const float* __restrict__ g, const float* __restrict__ norm, long long n) {
    const long long at = ((long long)blockIdx.x * THREADS + threadIdx.x) * VECTOR;
    if (at >= n || (norm != nullptr && !isfinite(norm[0]))) return;
    const float factor = norm == nullptr ? 1.0f : norm[1];
    const float decay = coefficients[0], into_m = coefficients[1], beta2 = coefficients[2], into_v = coefficients[3],
                step = coefficients[4], unbias = coefficients[5], eps = coefficients[6];
    Pack<float, VECTOR> p_new = load<VECTOR>(p + at), m_new = load<VECTOR>(m + at), v_new = load<VECTOR>(v + at);
    const Pack<float, VECTOR> g_p = load<VECTOR>(g + at);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
        const float g_j = factor * g_p[j];
        const float m_j = fmaf(into_m, g_j - m_new[j], m_new[j]);          // m + (1 - beta1) (g - m)
        const float v_j = fmaf(into_v * g_j, g_j, beta2 * v_new[j]);
        const float decayed = fmaf(-decay, p_new[j], p_new[j]);            // p - lr weight_decay p
        p_new.set(j, decayed - step * m_j / (sqrtf(unbias * v_j) + eps));
        m_new.set(j, m_j);
        v_new.set(j, v_j);
    }
    store(p + at, p_new);
    store(m + at, m_new);
    store(v + at, v_new);
}
