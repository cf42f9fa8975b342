// The gated delta rule, backward: gradients of o and S_end, with everything of the forward recomputed.
// Mathematics: docs/derivations/chunked-wy.md, "Without U and W" and [chunk.6..12]. Mirrors delta_rule_forward.cu.
//
// Before these kernels run delta_rule_triangles (P, T, gates) and delta_rule_states (V_new, S entering each chunk).
//
// delta_rule_state_gradients  a block per sequence, value head and 16 COLUMN_WARPS columns of d_v, from the last chunk
//                             to the first: dV_new, X, dv, dS                                 [chunk.15, 16, 17, wy.7]
// delta_rule_gradients        a block per chunk and value head: dq, dk, dg, dbeta         [chunk.6..8, 11, 12, wy.7..9]
// delta_rule_sum_heads        dq and dk of a key head: the sum over its value heads, in order
//
// Design. The first is the forward's walk in reverse: a warp owns 16 columns of dS, whose transpose stays in its
// registers in float32, and two barriers per chunk. The second is all products of a chunk that do not wait for another
// chunk; a warp owns 16 tokens. Its factors are streamed in slices through shared memory; blocks on one multiprocessor
// hide each other's copies. dg is a sum of products that all contain exp(g_t), never a difference of sums [chunk.12].
//
// The forward keeps nothing but its arguments. P, T, V_new and the states are 1 KB per token and value head at d 128,
// 2.4 GB for 18 layers of 16 heads on 8192 tokens; computing them again takes less than a forward.
//
// Types: states, dS', X, V_new, and dq, dk of value heads in REAL; dg, dbeta, dS0 and all sums float32.
//
// Floor per token and value head at d_k = d_v = 128, bfloat16, CHUNK 64: triangles and states 2.2 KB, state_gradients
// 2.1 KB, gradients 3.1 KB; 0.4 MFLOP in all. B 4, L 2048, 16 heads: 0.97 GB, 330 us at 2.94 TB/s; 52 GFLOP, 86 us at
// 600 TFLOP/s. Predicted for B 1, L 2048, not measured: 32 chunks of 1.2 us for the states and of 1.6 us for their
// gradients, and the two kernels of single chunks, 60 us: 150 us.
//
// Versions: 1, this one. Not measured on a card yet.

#include "delta_rule.cuh"

// ---- across chunks, from the last to the first

// X and dv (tokens, H_v, d_v); dstates (chunks, H_v, d_v, D_K): dS'^T, the gradient of the state that leaves each
// chunk. dS_end may be null: zeros.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
delta_rule_state_gradients(const REAL* q, const REAL* k, const REAL* P_in, const REAL* T_in, const float* gates_in,
                           const REAL* dout, const float* dS_end, const int* cu_seqlens,
                           int H_k, int H_v, int d_v, int tiled, float scale, REAL* X_out, REAL* dv, REAL* dstates,
                           float* dS0) {
    extern __shared__ __align__(16) unsigned char shared[];
    const Sequence sequence(cu_seqlens, blockIdx.z);
    const int head = blockIdx.y, h_k = key_head(head, H_k, H_v, tiled), first = blockIdx.x * COLUMNS;
    const int own = threadIdx.x / WARP * 16, chunks = sequence.chunks();
    Carver carver{shared};
    unsigned char* stages = carver.array<unsigned char>(2 * Stage::BYTES);
    const Tile<REAL> Q = carver.tile<REAL>(CHUNK, D_K), T = carver.tile<REAL>(CHUNK, CHUNK);  // T^T

    const auto fetch_stage = [&](int chunk) {
        const Stage stage(stages + chunk % 2 * Stage::BYTES);
        const int token = sequence.token(chunk), filled = sequence.filled(chunk), index = sequence.first_chunk + chunk;
        copy_tile<THREADS>(stage.K, row_of(k, token, H_k, h_k, D_K), H_k * D_K, CHUNK, filled, D_K);
        copy_tile<THREADS>(stage.square, matrix_of(P_in, index, H_v, head, CHUNK * CHUNK), CHUNK, CHUNK, CHUNK, CHUNK);
        const REAL* dO = row_of(dout, token, H_v, head, d_v) + first;
        copy_tile<THREADS>(stage.values, dO, H_v * d_v, CHUNK, filled, COLUMNS);
        const float* gates = matrix_of(gates_in, index, H_v, head, GATES * CHUNK);
        copy_tile<THREADS>(Tile<float>{stage.gates, CHUNK}, gates, CHUNK, GATES, GATES, CHUNK);
    };
    const auto fetch_Q_T = [&](int chunk) {
        const REAL* T_rows = matrix_of(T_in, sequence.first_chunk + chunk, H_v, head, CHUNK * CHUNK);
        const REAL* Q_rows = row_of(q, sequence.token(chunk), H_k, h_k, D_K);
        copy_tile<THREADS>(T, T_rows, CHUNK, CHUNK, CHUNK, CHUNK);
        copy_tile<THREADS>(Q, Q_rows, H_k * D_K, CHUNK, sequence.filled(chunk), D_K);
    };

    Block dS[D_K / 16];  // dS'^T: its rows are columns first + own .. of dS'
    const float* dS_begin = dS_end ? matrix_of(dS_end, blockIdx.z, H_v, head, D_K * d_v) : nullptr;
    each_of_state(dS, d_v, first + own, [&](float& x, int place) { x = dS_begin ? dS_begin[place] : 0.0f; });

    if (chunks > 0) {
        fetch_stage(chunks - 1);
        cp_async_commit();
    }
    for (int chunk = chunks - 1; chunk >= 0; --chunk) {
        const Stage stage(stages + chunk % 2 * Stage::BYTES);
        const float *decay = stage.gates + DECAY * CHUNK, *tail = stage.gates + TAIL * CHUNK;
        const float* beta = stage.gates + BETA * CHUNK;
        const int filled = sequence.filled(chunk);
        cp_async_wait<0>();
        __syncthreads();  // the stage has arrived; all warps are done with the other stage, Q and T, replaced now
        fetch_Q_T(chunk);
        cp_async_commit();
        if (chunk > 0) fetch_stage(chunk - 1);
        cp_async_commit();

        REAL* dstate = matrix_of(dstates, sequence.first_chunk + chunk, H_v, head, d_v * D_K) + (first + own) * D_K;
#pragma unroll
        for (int m = 0; m < D_K / 16; ++m) store_block(dS[m], dstate + 16 * m, D_K, 16);
        // dV_new = exp(gc_C - gc) K dS' + P^T dO                                                          [chunk.15]
        Block dV_new[BLOCKS];
        clear(dV_new);
        multiply_rows<REAL, Shape::FULL, D_K / 16>(dV_new, [&](int m) { return left<REAL>(dS[m]); }, stage.K);
#pragma unroll
        for (int n = 0; n < BLOCKS; ++n)
            each(dV_new[n], [&](float& x, int, int column) { x *= tail[16 * n + column]; });
        multiply_columns<REAL, Shape::LOWER, BLOCKS>(
            dV_new, [&](int i) { return left_columns(stage.values, 16 * i, own); }, stage.square);

        cp_async_wait<1>();
        __syncthreads();  // Q and T have arrived
        // X = T^T dV_new                                                                                  [chunk.16]
        Block X[BLOCKS];
        clear(X);
        multiply_rows<REAL, Shape::LOWER, BLOCKS>(X, [&](int i) { return left<REAL>(dV_new[i]); }, T);
        // dS = exp(gc_C) dS' + (scale exp(gc) Q)^T dO - (beta exp(gc) K)^T X                              [chunk.17]
        each_of_state(dS, d_v, 0, [&](float& x, int) { x *= decay[CHUNK - 1]; });
        const auto dO_decayed = [&](int i) {
            Block x = transposed(stage.values, 16 * i, own);
            each(x, [&](float& y, int, int column) { y *= scale * decay[16 * i + column]; });
            return left<REAL>(x);
        };
        multiply_columns<REAL, Shape::FULL, BLOCKS>(dS, dO_decayed, Q);
        const auto minus_X_decayed = [&](int i) {
            Block x = X[i];
            each(x, [&](float& y, int, int column) { y *= -beta[16 * i + column] * decay[16 * i + column]; });
            return left<REAL>(x);
        };
        multiply_columns<REAL, Shape::FULL, BLOCKS>(dS, minus_X_decayed, stage.K);

        const long long place = row_of(X_out, sequence.token(chunk), H_v, head, d_v) - X_out + first;
        // The columns of dO serve to write X. All lanes have read them: they went into products of the whole warp.
        store_rows(X, stage.values, own, X_out + place, H_v * d_v, filled);
        // dv = beta X                                                                                         [wy.7]
#pragma unroll
        for (int n = 0; n < BLOCKS; ++n)
            each(X[n], [&](float& x, int, int column) { x *= beta[16 * n + column]; });
        __syncwarp();  // X is written, its columns serve to write dv
        store_rows(X, stage.values, own, dv + place, H_v * d_v, filled);
    }
    float* dS_out = matrix_of(dS0, blockIdx.z, H_v, head, D_K * d_v);
    each_of_state(dS, d_v, first + own, [&](float& x, int place) { dS_out[place] = x; });
}

// ---- inside a chunk

constexpr int CHUNK_THREADS = WARP * BLOCKS;  // a warp for 16 tokens
constexpr int STEP = 32;                      // columns of a slice of anything

// Start copying STEP columns from `column` on of a matrix with `width`, zeros beyond it and in rows that do not exist.
__device__ __forceinline__ void copy_slice(Tile<REAL> tile, const REAL* global, int row_stride, int rows, int filled,
                                           int column, int width) {
    constexpr int PIECES = STEP / PIECE<REAL>;
#pragma unroll 4
    for (int i = threadIdx.x; i < rows * PIECES; i += CHUNK_THREADS) {
        const int row = i / PIECES, c = i % PIECES * PIECE<REAL>;
        const bool valid = row < filled && column + c < width;
        cp_async_16(tile.at(row, c), global + (valid ? row * row_stride + column + c : 0), valid);
    }
}

// For the two rows of a Block that this lane shares with three others: sums[row], complete, to terms[row].
__device__ __forceinline__ void store_row_sums(const float (&sums)[2], float* terms) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float sum = warp_sum<4>(sums[r]);
        if (threadIdx.x % 4 == 0) terms[Block::row(2 * r)] = sum;
    }
}

// dg, dbeta (tokens, H_v); dq, dk (tokens, H_v, D_K) of each value head.
extern "C" __global__ void __launch_bounds__(CHUNK_THREADS, 256 / CHUNK_THREADS)
delta_rule_gradients(const REAL* q, const REAL* k, const REAL* v, const REAL* dout, const REAL* V_new, const REAL* X,
                     const REAL* states, const REAL* dstates, const float* gates_in, const int* cu_seqlens,
                     int sequences, int H_k, int H_v, int d_v, int tiled, float scale, REAL* dq, REAL* dk,
                     float* dg, float* dbeta) {
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ float scratch[BLOCKS];
    const int index = blockIdx.x, head = blockIdx.y, thread = threadIdx.x, warp = thread / WARP, own = 16 * warp;
    const Sequence sequence(cu_seqlens, sequence_of(index, cu_seqlens, sequences));
    const int chunk = index - sequence.first_chunk;
    if (chunk >= sequence.chunks()) return;
    const int token = sequence.token(chunk), filled = sequence.filled(chunk);

    Carver carver{shared};
    float* gates = carver.array<float>(GATES * CHUNK);
    const float *decay = gates + DECAY * CHUNK, *tail = gates + TAIL * CHUNK, *beta = gates + BETA * CHUNK;
    float *row_terms = carver.array<float>(CHUNK), *tail_terms = carver.array<float>(CHUNK);  // [chunk.11]
    float *X_v = carver.array<float>(CHUNK), *dbeta_pairs = carver.array<float>(CHUNK);  // the three parts of dbeta
    float* dbeta_rows = carver.array<float>(CHUNK);
    const Tile<REAL> dQK = carver.tile<REAL>(CHUNK, CHUNK), dKK = carver.tile<REAL>(CHUNK, CHUNK);
    const Tile<float> pair{reinterpret_cast<float*>(carver.next), CHUNK + 1};  // in the memory of the slices
    const Tile<REAL> Q_m = carver.tile<REAL>(CHUNK, STEP), K_m = carver.tile<REAL>(CHUNK, STEP), V_m = Q_m;
    const Tile<REAL> dO_m = carver.tile<REAL>(CHUNK, STEP), X_m = carver.tile<REAL>(CHUNK, STEP);
    const Tile<REAL> V_new_m = carver.tile<REAL>(CHUNK, STEP);
    const Tile<REAL> S_m = carver.tile<REAL>(STEP, STEP), dS_m = carver.tile<REAL>(STEP, STEP);  // S^T and dS'^T

    const int h_k = key_head(head, H_k, H_v, tiled), key_stride = H_k * D_K, value_stride = H_v * d_v;
    const REAL *Q = row_of(q, token, H_k, h_k, D_K), *K = row_of(k, token, H_k, h_k, D_K);
    const long long values = row_of(v, token, H_v, head, d_v) - v;
    const long long state = matrix_of(states, index, H_v, head, d_v * D_K) - states;
    const auto copy_keys = [&](Tile<REAL> tile, const REAL* x, int m) {
        copy_slice(tile, x, key_stride, CHUNK, filled, m, D_K);
    };
    const auto copy_values = [&](Tile<REAL> tile, const REAL* x, int m) {
        copy_slice(tile, x + values, value_stride, CHUNK, filled, m, d_v);
    };
    const auto arrive = [] {
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();  // all threads' copies have arrived
    };

    // Q K^T and K K^T, dO V_new^T and X V_new^T, on and below the diagonal; this warp has rows own .. own + 15
    const float* gates_row = matrix_of(gates_in, index, H_v, head, GATES * CHUNK);
    copy_tile<CHUNK_THREADS>(Tile<float>{gates, CHUNK}, gates_row, CHUNK, GATES, GATES, CHUNK);
    Block QK[BLOCKS], KK[BLOCKS], dO_V[BLOCKS], X_V[BLOCKS];
    clear(QK);
    clear(KK);
    clear(dO_V);
    clear(X_V);
    for (int m = 0; m < D_K; m += STEP) {
        __syncthreads();  // the slices before have been read
        copy_keys(Q_m, Q, m);
        copy_keys(K_m, K, m);
        arrive();
#pragma unroll 1
        for (int c = 0; c < STEP; c += 16) {
            const Left<REAL> q_c = left_rows(Q_m, own, c), k_c = left_rows(K_m, own, c);
#pragma unroll
            for (int n = 0; n < BLOCKS; ++n)
                if (n <= warp) {
                    const Right<REAL> right = right_rows(K_m, 16 * n, c);
                    multiply(QK[n], q_c, right);
                    multiply(KK[n], k_c, right);
                }
        }
    }
    float direct = 0.0f;  // half a row of X v
    for (int m = 0; m < d_v; m += STEP) {
        __syncthreads();  // the slices before have been read
        copy_values(dO_m, dout, m);
        copy_values(X_m, X, m);
        copy_values(V_new_m, V_new, m);
        copy_values(V_m, v, m);
        arrive();
#pragma unroll 1
        for (int c = 0; c < STEP; c += 16) {
            const Left<REAL> dO_c = left_rows(dO_m, own, c), X_c = left_rows(X_m, own, c);
#pragma unroll
            for (int n = 0; n < BLOCKS; ++n)
                if (n <= warp) {
                    const Right<REAL> right = right_rows(V_new_m, 16 * n, c);
                    multiply(dO_V[n], dO_c, right);
                    multiply(X_V[n], X_c, right);
                }
        }
        const int row = thread / 2, first = thread % 2 * STEP / 2;
#pragma unroll
        for (int c = first; c < first + STEP / 2; ++c) direct = fmaf(X_m(row, c), V_m(row, c), direct);
    }
    // dbeta_i = X_i v_i, for now                                                                               [wy.7]
    direct = warp_sum<2>(direct);
    if (thread % 2 == 0) X_v[thread / 2] = direct;
    __syncthreads();  // the slices have been read; pairs take their memory
    // dP = dO V_new^T, dA = -X V_new^T, and the gradients of Q K^T and K K^T             [chunk.6, chunk.7, wy.8, wy.9]
    float through_A[2] = {};
#pragma unroll
    for (int n = 0; n < BLOCKS; ++n)
        if (n <= warp)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int i = own + Block::row(e), j = 16 * n + Block::column(half, e);
                    const float Gamma = i >= j ? decay_ratio(gates, i, j) : 0.0f;
                    const float dQK_ij = scale * dO_V[n].x[half][e] * Gamma;
                    const float dA_Gamma = i > j ? -X_V[n].x[half][e] * Gamma : 0.0f;
                    const float dKK_ij = beta[i] * dA_Gamma;
                    through_A[e / 2] = fmaf(dA_Gamma, KK[n].x[half][e], through_A[e / 2]);
                    *dQK.at(i, j) = from_float<REAL>(dQK_ij);
                    *dKK.at(i, j) = from_float<REAL>(dKK_ij);
                    *pair.at(i, j) = dQK_ij * QK[n].x[half][e] + dKK_ij * KK[n].x[half][e];  // [chunk.11]
                }
    store_row_sums(through_A, dbeta_pairs + own);
    __syncthreads();  // pairs are complete, and dQK and dKK
    // the sum of pair_ij over i >= t > j: each column summed from below, then row t                          [chunk.12]
    if (thread < CHUNK) {
        float below = 0.0f;
        for (int i = CHUNK - 1; i > thread; --i) *pair.at(i, thread) = below += pair(i, thread);
    }
    __syncthreads();  // the sums of all columns are complete
    float crossing = 0.0f;
    if (thread < CHUNK)
        for (int j = 0; j < thread; ++j) crossing += pair(thread, j);

    // dq and dk, STEP columns at a time
    float row_sums[2] = {}, tail_sums[2] = {}, dbeta_sums[2] = {}, whole = 0.0f;
    for (int s = 0; s < D_K; s += STEP) {
        Block dQ[STEP / 16], X_S[STEP / 16], dK[STEP / 16];
        clear(dQ);
        clear(X_S);
        clear(dK);
        for (int m = 0; m < d_v; m += STEP) {
            __syncthreads();  // the slices before have been read (the first time: pairs)
            if (m == 0) {
                copy_keys(Q_m, Q, s);
                copy_keys(K_m, K, s);
            }
            copy_values(dO_m, dout, m);
            copy_values(X_m, X, m);
            copy_values(V_new_m, V_new, m);
            copy_slice(S_m, states + state + m * D_K, D_K, STEP, d_v - m, s, D_K);
            copy_slice(dS_m, dstates + state + m * D_K, D_K, STEP, d_v - m, s, D_K);
            arrive();
            // dO S^T, X S^T, V_new dS'^T                                                       [chunk.6, wy.7, chunk.8]
#pragma unroll 1
            for (int c = 0; c < STEP; c += 16) {
                const Left<REAL> dO_c = left_rows(dO_m, own, c), X_c = left_rows(X_m, own, c);
                const Left<REAL> V_new_c = left_rows(V_new_m, own, c);
#pragma unroll
                for (int n = 0; n < STEP / 16; ++n) {
                    const Right<REAL> S_c = right_columns(S_m, c, 16 * n);
                    multiply(dQ[n], dO_c, S_c);
                    multiply(X_S[n], X_c, S_c);
                    multiply(dK[n], V_new_c, right_columns(dS_m, c, 16 * n));
                }
            }
            for (int i = thread; i < STEP * STEP; i += CHUNK_THREADS)
                whole = fmaf(S_m(i / STEP, i % STEP), dS_m(i / STEP, i % STEP), whole);
        }
        // dq = exp(gc) dO S^T, dk = exp(gc_C - gc) V_new dS'^T - beta exp(gc) X S^T; and row, tail          [chunk.11]
#pragma unroll
        for (int n = 0; n < STEP / 16; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int r = Block::row(e), i = own + r, column = 16 * n + Block::column(half, e);
                    const float q_i = Q_m(i, column), k_i = K_m(i, column);
                    const float dq_i = scale * decay[i] * dQ[n].x[half][e];
                    const float X_S_i = decay[i] * X_S[n].x[half][e], dk_tail = tail[i] * dK[n].x[half][e];
                    dbeta_sums[e / 2] = fmaf(-X_S_i, k_i, dbeta_sums[e / 2]);
                    row_sums[e / 2] = fmaf(dq_i, q_i, fmaf(-beta[i] * X_S_i, k_i, row_sums[e / 2]));
                    tail_sums[e / 2] = fmaf(dk_tail, k_i, tail_sums[e / 2]);
                    dQ[n].x[half][e] = dq_i;
                    dK[n].x[half][e] = fmaf(-beta[i], X_S_i, dk_tail);
                }
        // dQ += dQK K, dK += dQK^T Q + (dKK + dKK^T) K                                                  [chunk.7, wy.9]
#pragma unroll 1
        for (int j = 0; j < BLOCKS; ++j) {
            if (j <= warp) {
                const Left<REAL> dQK_j = left_rows(dQK, own, 16 * j), dKK_j = left_rows(dKK, own, 16 * j);
#pragma unroll
                for (int n = 0; n < STEP / 16; ++n) {
                    const Right<REAL> K_j = right_columns(K_m, 16 * j, 16 * n);
                    multiply(dQ[n], dQK_j, K_j);
                    multiply(dK[n], dKK_j, K_j);
                }
            }
            if (j >= warp) {
                const Left<REAL> dQK_j = left_columns(dQK, 16 * j, own), dKK_j = left_columns(dKK, 16 * j, own);
#pragma unroll
                for (int n = 0; n < STEP / 16; ++n) {
                    multiply(dK[n], dQK_j, right_columns(Q_m, 16 * j, 16 * n));
                    multiply(dK[n], dKK_j, right_columns(K_m, 16 * j, 16 * n));
                }
            }
        }
        REAL* dq_rows = row_of(dq, token + own, H_v, head, D_K) + s;
        REAL* dk_rows = row_of(dk, token + own, H_v, head, D_K) + s;
#pragma unroll
        for (int n = 0; n < STEP / 16; ++n)
            if (s + 16 * n < D_K) {
                store_block(dQ[n], dq_rows + 16 * n, H_v * D_K, filled - own);
                store_block(dK[n], dk_rows + 16 * n, H_v * D_K, filled - own);
            }
    }
    store_row_sums(row_sums, row_terms + own);
    store_row_sums(tail_sums, tail_terms + own);
    store_row_sums(dbeta_sums, dbeta_rows + own);
    // whole = exp(gc_C) <S, dS'>                                                                             [chunk.11]
    whole = decay[CHUNK - 1] * block_sum<BLOCKS>(whole, scratch);  // its barrier: all terms are complete
    // dg_t = the sum of pair_ij over i >= t > j, of row_i over i >= t, of tail_j over j < t, and whole       [chunk.12]
    if (thread < filled) {
        float sum = crossing;
        for (int i = 0; i < CHUNK; ++i) sum += i < thread ? tail_terms[i] : row_terms[i];
        *row_of(dg, token + thread, H_v, head, 1) = sum + whole;
        *row_of(dbeta, token + thread, H_v, head, 1) = X_v[thread] + dbeta_pairs[thread] + dbeta_rows[thread];
    }
}

// ---- over the value heads of a key head

// y (tokens, H_k, D_K): the sums of x (tokens, H_v, D_K), in the order of the value heads. n = tokens H_k D_K.
extern "C" __global__ void __launch_bounds__(256)
delta_rule_sum_heads(const REAL* x, int H_k, int H_v, int tiled, long long n, REAL* y) {
    constexpr int N = PIECE<REAL>;
    const long long place = (static_cast<long long>(blockIdx.x) * 256 + threadIdx.x) * N;
    if (place >= n) return;
    const int row = static_cast<int>(place / D_K), column = static_cast<int>(place - static_cast<long long>(row) * D_K);
    const int h_k = row % H_k, group = H_v / H_k;
    const long long token = row / H_k;
    float sums[N] = {};
    for (int i = 0; i < group; ++i) {
        const int head = tiled ? i * H_k + h_k : h_k * group + i;
        const auto values = load<N>(x + (token * H_v + head) * D_K + column);
#pragma unroll
        for (int c = 0; c < N; ++c) sums[c] += values[c];
    }
    Pack<REAL, N> out;
#pragma unroll
    for (int c = 0; c < N; ++c) out.set(c, sums[c]);
    store<N>(y + place, out);
}
