// One token of the gated delta rule for each sequence, for decoding: o and S [delta.1..4].
//
// Design. A block per sequence, value head and COLUMNS columns of d_v; a warp sums over a part of d_k, a lane has one column.
// Two passes over S: k S and q S, then S' = exp(g) S + k u; the second finds S in the cache. o = scale (exp(g) q S +
// (q.k) u).
//
// Floor: S is read and written once, 8 bytes per element, and 6 flops: 2 MB or 0.7 us for 16 heads of 128 x 128. With
// one sequence that is 64 blocks, each a few microseconds of latency: what counts is the launch.
//
// Versions: 1, this one. Not measured on a card yet.

#include "common.cuh"

constexpr int WARPS_OF_ROWS = 8, COLUMNS = WARP;

// q, k (B, H_k, d_k); v, o (B, H_v, d_v); g, beta (B, H_v); S, S_new (B, H_v, d_k, d_v). d_k, d_v are any numbers.
extern "C" __global__ void __launch_bounds__(WARP * WARPS_OF_ROWS)
delta_rule_step(const REAL* q, const REAL* k, const REAL* v, const float* g, const float* beta, const float* S, int H_k,
                int H_v, int d_k, int d_v, int tiled, float scale, REAL* o, float* S_new) {
    __shared__ float k_S[WARPS_OF_ROWS][COLUMNS];
    __shared__ float q_S[WARPS_OF_ROWS][COLUMNS];
    __shared__ float q_k[WARPS_OF_ROWS];
    const int head = blockIdx.y, h_k = tiled ? head % H_k : head / (H_v / H_k);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, column = blockIdx.x * COLUMNS + lane;
    const long long value_head = static_cast<long long>(blockIdx.z) * H_v + head;
    const bool exists = column < d_v;
    q += (static_cast<long long>(blockIdx.z) * H_k + h_k) * d_k;
    k += (static_cast<long long>(blockIdx.z) * H_k + h_k) * d_k;
    S += value_head * d_k * d_v + column;
    S_new += value_head * d_k * d_v + column;

    float through_k = 0.0f, through_q = 0.0f, dot = 0.0f;
    for (int m = warp; m < d_k; m += WARPS_OF_ROWS) {
        const float k_m = to_float(k[m]), q_m = to_float(q[m]), S_m = exists ? S[m * d_v] : 0.0f;
        through_k = fmaf(k_m, S_m, through_k);
        through_q = fmaf(q_m, S_m, through_q);
        dot = fmaf(q_m, k_m, dot);
    }
    k_S[warp][lane] = through_k;
    q_S[warp][lane] = through_q;
    if (lane == 0) q_k[warp] = dot;
    __syncthreads();  // the sums of all warps are there
    through_k = through_q = dot = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS_OF_ROWS; ++w) {
        through_k += k_S[w][lane];
        through_q += q_S[w][lane];
        dot += q_k[w];
    }
    if (!exists) return;
    const float decay = expf(g[value_head]);
    const float u = beta[value_head] * (to_float(v[value_head * d_v + column]) - decay * through_k);  // [delta.1, 2]
    if (warp == 0) o[value_head * d_v + column] = from_float<REAL>(scale * (decay * through_q + dot * u));  // [delta.4]
    for (int m = warp; m < d_k; m += WARPS_OF_ROWS)
        S_new[m * d_v] = fmaf(to_float(k[m]), u, decay * S[m * d_v]);  // [delta.3]
}
