// One step of AdamW on one array, in float32. Definition: ops/adamw.py.
//
// Design   element by element, VECTOR values a thread and array. What depends on the step is read from memory, so that
//          a captured graph can be launched for the next step.
// Floors   p, m, v read and written, g read: 28 bytes a parameter, 9.5 us a million of them at 2.94 TB/s. LoRA factors
//          are small (rank 16, 1024 x 3584: 74 thousand): the launch decides.
// Versions this one
// Macros   VECTOR: 4, or 1
#include "common.cuh"

constexpr int THREADS = 256;

// coefficients: lr weight_decay, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1^t), 1 / (1 - beta2^t), eps;
// p, m, v, g (n,)
extern "C" __global__ void __launch_bounds__(THREADS)
adamw_update(const float* __restrict__ coefficients, float* __restrict__ p, float* __restrict__ m,
             float* __restrict__ v, const float* __restrict__ g, long long n) {
    const long long at = ((long long)blockIdx.x * THREADS + threadIdx.x) * VECTOR;
    if (at >= n) return;
    const float decay = coefficients[0], into_m = coefficients[1], beta2 = coefficients[2], into_v = coefficients[3],
                step = coefficients[4], unbias = coefficients[5], eps = coefficients[6];
    Pack<float, VECTOR> p_new = load<VECTOR>(p + at), m_new = load<VECTOR>(m + at), v_new = load<VECTOR>(v + at);
    const Pack<float, VECTOR> g_p = load<VECTOR>(g + at);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
        const float m_j = fmaf(into_m, g_p[j] - m_new[j], m_new[j]);       // m + (1 - beta1) (g - m)
        const float v_j = fmaf(into_v * g_p[j], g_p[j], beta2 * v_new[j]);
        const float decayed = fmaf(-decay, p_new[j], p_new[j]);            // p - lr weight_decay p
        p_new.set(j, decayed - step * m_j / (sqrtf(unbias * v_j) + eps));
        m_new.set(j, m_j);
        v_new.set(j, v_j);
    }
    store(p + at, p_new);
    store(m + at, m_new);
    store(v + at, v_new);
}
