// The gated delta rule, forward: o and S_end in chunks of CHUNK tokens, without U and W [chunk.13, chunk.14].
// Mathematics: docs/derivations/chunked-wy.md. The definition: ops/gated_delta_rule/recurrent.py.
//
// delta_rule_triangles   a block per chunk and value head: gc, decays, P and T = (I + A)^-1     [wy.1..4, chunk.3]
// delta_rule_outputs     a block per sequence, value head and 16 COLUMN_WARPS columns of d_v, chunk after chunk:
//                        V_new, o, S                                                            [chunk.13, 14, 4, 2]
// delta_rule_states      the same without o, for backward: writes V_new and the state entering each chunk
//
// Design. A column of S does not depend on the other columns, so a warp owns 16 of them for the whole sequence: S^T, of
// 16 rows, stays in its registers in float32, and so do the transposes of R, V_new and o of a chunk, each the left factor
// of the next product (tiles.cuh). Warps share only the tiles that they read: two barriers per chunk. K, T^T, V and gates
// of the next chunk are copied while this one is computed, Q and P^T while V_new is. T is applied to R = beta (V - exp(gc)
// K S) rather than to beta V and beta exp(gc) K: U and W are never written, and R is rounded after its cancellation.
//
// Types: q, k, v, o, P, T, V_new and stored states in REAL, all else float32. CHUNK is 64 for bfloat16; 32 for float,
// whose tiles are twice as large. The result does not depend on CHUNK but for rounding.
//
// Floor per token and value head at d_k = d_v = 128, bfloat16, CHUNK 64: read q, k twice, v once, write o, P, T, read P, T
// with gates: 2.1 KB; 2 (64 + 4 * 128 * 128 + ...) = 0.19 MFLOP. At B 4, L 2048, 16 heads: 275 MB or 94 us at 2.94 TB/s, 25
// GFLOP. At B 1, L 2048: 23 us by bytes, but 32 chunks in series: 216 mma of one warp each, 1 us or more.
//
// Versions: 1, this one. Not measured on a card yet.

#include "delta_rule.cuh"

// ---- inside a chunk

// gc_i = g_1 + ... + g_i [wy.1] with the rounding errors of the additions summed up (Knuth's TwoSum); then the gates.
__device__ __forceinline__ void prepare_gates(const float* g, const float* beta, long long stride, int filled,
                                              float* gates) {
    const int i = threadIdx.x;
    if (i < CHUNK) {
        gates[DECAY * CHUNK + i] = i < filled ? g[i * stride] : 0.0f;  // for now                              [chunk.5]
        gates[BETA * CHUNK + i] = i < filled ? beta[i * stride] : 0.0f;
    }
    __syncthreads();  // all g are there
    float high = 0.0f, low = 0.0f;
    for (int j = 0; j <= min(i, CHUNK - 1); ++j) {
        const float x = gates[DECAY * CHUNK + j], sum = high + x, back = sum - high;
        low += (high - (sum - back)) + (x - back);
        high = sum;
    }
    if (i < CHUNK) {
        gates[GC_HIGH * CHUNK + i] = high + low;
        gates[GC_LOW * CHUNK + i] = low - ((high + low) - high);
    }
    __syncthreads();  // gc is complete, and g has been read
    if (i < CHUNK) {
        const float* gc_high = gates + GC_HIGH * CHUNK;
        const float* gc_low = gates + GC_LOW * CHUNK;
        gates[DECAY * CHUNK + i] = exp_of_sum(gc_high[i], gc_low[i]);
        gates[TAIL * CHUNK + i] = exp_of_sum(gc_high[CHUNK - 1] - gc_high[i], gc_low[CHUNK - 1] - gc_low[i]);
    }
}

// (I + A)^-1 of the 16 x 16 block of A at `first` on the diagonal: column by column, one per lane, from the top.
__device__ __forceinline__ void invert_diagonal(Tile<float> A, int first, Tile<float> inverse) {
    const int column = threadIdx.x % WARP;
    if (column >= 16) return;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
        for (int j = 0; j < i; ++j) x[i] = fmaf(-A(first + i, first + j), x[j], x[i]);
        *inverse.at(first + i, column) = x[i];
    }
}

// P (chunks, H_v, CHUNK, CHUNK); T_out in the same shape holds T^T.
extern "C" __global__ void __launch_bounds__(2 * CHUNK)
delta_rule_triangles(const REAL* q, const REAL* k, const float* g, const float* beta, const int* cu_seqlens,
                     const int* first_chunks, int H_k, int H_v, int tiled, float scale, REAL* P_out, REAL* T_out,
                     float* gates_out) {
    extern __shared__ __align__(16) unsigned char shared[];
    const Sequence sequence(cu_seqlens, first_chunks, blockIdx.z);
    const int chunk = blockIdx.x, head = blockIdx.y, warp = threadIdx.x / WARP;
    if (chunk >= sequence.chunks()) return;
    Carver carver{shared};
    const Tile<float> A = carver.tile<float>(CHUNK, CHUNK), diagonal = carver.tile<float>(CHUNK, 16);
    float* gates = carver.array<float>(GATES * CHUNK);
    const Tile<REAL> Q = carver.tile<REAL>(CHUNK, D_K), K = carver.tile<REAL>(CHUNK, D_K);

    const int token = sequence.token(chunk), filled = sequence.filled(chunk);
    const int h_k = key_head(head, H_k, H_v, tiled), stride = H_k * D_K;
    copy_tile<2 * CHUNK>(Q, row_of(q, token, H_k, h_k, D_K), stride, CHUNK, filled, D_K);
    copy_tile<2 * CHUNK>(K, row_of(k, token, H_k, h_k, D_K), stride, CHUNK, filled, D_K);
    cp_async_commit();

    // 1, 2  gc and the decays
    prepare_gates(row_of(g, token, H_v, head, 1), row_of(beta, token, H_v, head, 1), H_v, filled, gates);
    cp_async_wait<0>();
    __syncthreads();  // Q, K and gates are there

    const int index = sequence.first_chunk + chunk;
    float* gates_row = matrix_of(gates_out, index, H_v, head, GATES * CHUNK);
    for (int i = threadIdx.x; i < GATES * CHUNK; i += 2 * CHUNK) gates_row[i] = gates[i];

    // Q K^T and K K^T on and below the diagonal; this warp has rows 16 warp .. 16 warp + 15
    Block QK[BLOCKS], KK[BLOCKS];
    clear(QK);
    clear(KK);
    for (int m = 0; m < D_K; m += 16) {
        const Left<REAL> q_m = left_rows(Q, 16 * warp, m), k_m = left_rows(K, 16 * warp, m);
#pragma unroll
        for (int n = 0; n < BLOCKS; ++n)
            if (n <= warp) {
                const Right<REAL> right = right_rows(K, 16 * n, m);
                multiply(QK[n], q_m, right);
                multiply(KK[n], k_m, right);
            }
    }
    // 3  A_ij = beta_i k_i.k_j Gamma_ij for i > j                                                            [wy.3]
    // P = scale Q K^T * Gamma                                                                             [chunk.3]
    REAL* P = matrix_of(P_out, index, H_v, head, CHUNK * CHUNK);
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n) {
        each(QK[n], [&](float& x, int row, int column) {
            const int i = 16 * warp + row, j = 16 * n + column;
            x = i >= j ? scale * x * decay_ratio(gates, i, j) : 0.0f;
        });
        each(KK[n], [&](float& x, int row, int column) {
            const int i = 16 * warp + row, j = 16 * n + column;
            *A.at(i, j) = i > j ? gates[BETA * CHUNK + i] * x * decay_ratio(gates, i, j) : 0.0f;
        });
        store_block(QK[n], P + 16 * warp * CHUNK + 16 * n, CHUNK, 16);
    }

    // 4  T = (I + A)^-1, block column j = `warp`, from the diagonal down:                                    [wy.4]
    //    T_ij = -T_ii sum_m A_im T_mj for j <= m < i; as transposes, since T_mj^T is the left factor at hand
    __syncwarp();  // the warp's diagonal block of A is written
    invert_diagonal(A, 16 * warp, diagonal);
    __syncthreads();  // A and the inverses of its diagonal blocks are complete
    REAL* T_row = matrix_of(T_out, index, H_v, head, CHUNK * CHUNK) + 16 * warp * CHUNK;
    for (int i = 0; i < warp; ++i) store_block(Block{}, T_row + 16 * i, CHUNK, 16);
    Block T[BLOCKS];  // T[n] is T_ij^T for i = j + n
    T[0] = transposed(diagonal, 16 * warp, 0);
    store_block(T[0], T_row + 16 * warp, CHUNK, 16);
#pragma unroll
    for (int n = 1; n < BLOCKS; ++n) {
        const int i = warp + n;
        if (i < BLOCKS) {
            Block sum{};
#pragma unroll
            for (int m = 0; m < n; ++m) multiply(sum, left<float>(T[m]), right_rows(A, 16 * i, 16 * (warp + m)));
            each(sum, [](float& x, int, int) { x = -x; });
            T[n] = Block{};
            multiply(T[n], left<float>(sum), right_rows(diagonal, 16 * i, 0));
            store_block(T[n], T_row + 16 * i, CHUNK, 16);
        }
    }
}

// ---- across chunks

constexpr int COLUMNS = 16 * COLUMN_WARPS, THREADS = WARP * COLUMN_WARPS;

// What is fetched a whole chunk ahead: two stages in turn.
struct Stage {
    Tile<REAL> K, T, V;
    float* gates;

    static constexpr int BYTES =
        CHUNK * ((padded<REAL>(D_K) + padded<REAL>(CHUNK) + padded<REAL>(COLUMNS)) * sizeof(REAL) + GATES * sizeof(float));

    __device__ __forceinline__ explicit Stage(unsigned char* start) {
        Carver carver{start};
        K = carver.tile<REAL>(CHUNK, D_K);
        T = carver.tile<REAL>(CHUNK, CHUNK);
        V = carver.tile<REAL>(CHUNK, COLUMNS);
        gates = carver.array<float>(GATES * CHUNK);
    }
};

// S^T in registers, as Block n holds it: f(x, place of S[row, column] in a matrix (D_K, d_v)).
template <class F>
__device__ __forceinline__ void each_of_state(Block (&S)[D_K / 16], int d_v, int first_column, F f) {
#pragma unroll
    for (int m = 0; m < D_K / 16; ++m)
        each(S[m], [&](float& x, int row, int column) { f(x, (16 * m + column) * d_v + first_column + row); });
}

// o and S_end if OUTPUTS, otherwise V_new (in out) and states.
template <bool OUTPUTS>
__device__ __forceinline__ void carry(const REAL* q, const REAL* k, const REAL* v, const REAL* P_in, const REAL* T_in,
                                      const float* gates_in, const float* S0, const int* cu_seqlens,
                                      const int* first_chunks, int H_k, int H_v, int d_v, int tiled, float scale, REAL* out,
                                      REAL* states, float* S_end, unsigned char* shared) {
    const Sequence sequence(cu_seqlens, first_chunks, blockIdx.z);
    const int head = blockIdx.y, h_k = key_head(head, H_k, H_v, tiled), first = blockIdx.x * COLUMNS;
    const int own = threadIdx.x / WARP * 16, chunks = sequence.chunks();
    Carver carver{shared};
    unsigned char* stages = carver.array<unsigned char>(2 * Stage::BYTES);
    const Tile<REAL> Q = carver.tile<REAL>(CHUNK, D_K), P = carver.tile<REAL>(CHUNK, CHUNK);  // only if OUTPUTS

    const auto fetch_stage = [&](int chunk) {
        const Stage stage(stages + chunk % 2 * Stage::BYTES);
        const int token = sequence.token(chunk), filled = sequence.filled(chunk), index = sequence.first_chunk + chunk;
        copy_tile<THREADS>(stage.K, row_of(k, token, H_k, h_k, D_K), H_k * D_K, CHUNK, filled, D_K);
        copy_tile<THREADS>(stage.T, matrix_of(T_in, index, H_v, head, CHUNK * CHUNK), CHUNK, CHUNK, CHUNK, CHUNK);
        copy_tile<THREADS>(stage.V, row_of(v, token, H_v, head, d_v) + first, H_v * d_v, CHUNK, filled, COLUMNS);
        const float* gates = matrix_of(gates_in, index, H_v, head, GATES * CHUNK);
        copy_tile<THREADS>(Tile<float>{stage.gates, CHUNK}, gates, CHUNK, GATES, GATES, CHUNK);
    };
    const auto fetch_Q = [&](int chunk) {
        const REAL* rows = row_of(q, sequence.token(chunk), H_k, h_k, D_K);
        copy_tile<THREADS>(Q, rows, H_k * D_K, CHUNK, sequence.filled(chunk), D_K);
    };
    const auto fetch_P = [&](int chunk) {
        const REAL* rows = matrix_of(P_in, sequence.first_chunk + chunk, H_v, head, CHUNK * CHUNK);
        copy_tile<THREADS>(P, rows, CHUNK, CHUNK, CHUNK, CHUNK);
    };

    Block S[D_K / 16];  // S^T: its rows are columns first + own .. of S
    const float* S_begin = S0 ? matrix_of(S0, blockIdx.z, H_v, head, D_K * d_v) : nullptr;
    each_of_state(S, d_v, first + own, [&](float& x, int place) { x = S_begin ? S_begin[place] : 0.0f; });

    if (chunks > 0) {
        fetch_stage(0);
        if constexpr (OUTPUTS) fetch_Q(0);
        cp_async_commit();
    }
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const Stage stage(stages + chunk % 2 * Stage::BYTES);
        const float *decay = stage.gates + DECAY * CHUNK, *tail = stage.gates + TAIL * CHUNK;
        const float* beta = stage.gates + BETA * CHUNK;
        cp_async_wait<0>();
        __syncthreads();  // stage and Q have arrived; all warps are done with the other stage and P, replaced now
        if constexpr (OUTPUTS) {
            fetch_P(chunk);
            cp_async_commit();
        }
        if (chunk + 1 < chunks) fetch_stage(chunk + 1);
        cp_async_commit();

        if constexpr (!OUTPUTS) {
            REAL* state = matrix_of(states, sequence.first_chunk + chunk, H_v, head, d_v * D_K) + (first + own) * D_K;
#pragma unroll
            for (int m = 0; m < D_K / 16; ++m) store_block(S[m], state + 16 * m, D_K, 16);
        }
        // K S and Q S share their left factor
        Block R[BLOCKS], o[BLOCKS];
        clear(R);
        clear(o);
#pragma unroll
        for (int m = 0; m < D_K / 16; ++m) {
            const Left<REAL> S_m = left<REAL>(S[m]);
#pragma unroll
            for (int n = 0; n < BLOCKS; ++n) {
                multiply(R[n], S_m, right_rows(stage.K, 16 * n, 16 * m));
                if constexpr (OUTPUTS) multiply(o[n], S_m, right_rows(Q, 16 * n, 16 * m));
            }
        }
        // R = beta (V - exp(gc) K S)                                                                      [chunk.13]
#pragma unroll
        for (int n = 0; n < BLOCKS; ++n)
            each(R[n], [&](float& x, int row, int column) {
                const int i = 16 * n + column;
                x = beta[i] * (stage.V(i, own + row) - decay[i] * x);
            });
        // V_new = T R                                                                                     [chunk.14]
        Block V_new[BLOCKS];
        clear(V_new);
        multiply_columns<REAL, Shape::UPPER, BLOCKS>(V_new, [&](int j) { return left<REAL>(R[j]); }, stage.T);

        // The columns of V serve to write o or V_new. All lanes have read them: they went into products of the whole warp.
        REAL* rows = row_of(out, sequence.token(chunk), H_v, head, d_v) + first;
        if constexpr (OUTPUTS) {
            cp_async_wait<1>();
            __syncthreads();  // P has arrived; all warps are done with Q, which is replaced now
            if (chunk + 1 < chunks) fetch_Q(chunk + 1);
            cp_async_commit();
            // o = scale exp(gc) Q S + P V_new                                                             [chunk.4]
#pragma unroll
            for (int n = 0; n < BLOCKS; ++n)
                each(o[n], [&](float& x, int, int column) { x *= scale * decay[16 * n + column]; });
            multiply_rows<REAL, Shape::UPPER, BLOCKS>(o, [&](int j) { return left<REAL>(V_new[j]); }, P);
            store_rows(o, stage.V, own, rows, H_v * d_v, sequence.filled(chunk));
        } else {
            store_rows(V_new, stage.V, own, rows, H_v * d_v, sequence.filled(chunk));
        }
        // S' = exp(gc_C) S + (exp(gc_C - gc) K)^T V_new                                                   [chunk.2]
        each_of_state(S, d_v, 0, [&](float& x, int) { x *= decay[CHUNK - 1]; });
        const auto V_tail = [&](int j) {
            Block x = V_new[j];
            each(x, [&](float& y, int, int column) { y *= tail[16 * j + column]; });
            return left<REAL>(x);
        };
        multiply_columns<REAL, Shape::FULL, BLOCKS>(S, V_tail, stage.K);
    }
    if constexpr (OUTPUTS) {
        float* S_out = matrix_of(S_end, blockIdx.z, H_v, head, D_K * d_v);
        each_of_state(S, d_v, first + own, [&](float& x, int place) { S_out[place] = x; });
    }
}

// S0 may be null: zeros.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
delta_rule_outputs(const REAL* q, const REAL* k, const REAL* v, const REAL* P, const REAL* T, const float* gates,
                   const float* S0, const int* cu_seqlens, const int* first_chunks, int H_k, int H_v, int d_v, int tiled,
                   float scale, REAL* o, float* S_end) {
    extern __shared__ __align__(16) unsigned char shared[];
    carry<true>(q, k, v, P, T, gates, S0, cu_seqlens, first_chunks, H_k, H_v, d_v, tiled, scale, o, nullptr, S_end, shared);
}

// states (chunks, H_v, d_v, D_K): the transposed state entering each chunk.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
delta_rule_states(const REAL* k, const REAL* v, const REAL* T, const float* gates, const float* S0, const int* cu_seqlens,
                  const int* first_chunks, int H_k, int H_v, int d_v, int tiled, REAL* V_new, REAL* states) {
    extern __shared__ __align__(16) unsigned char shared[];
    carry<false>(nullptr, k, v, nullptr, T, gates, S0, cu_seqlens, first_chunks, H_k, H_v, d_v, tiled, 0.0f, V_new, states,
                 nullptr, shared);
}
