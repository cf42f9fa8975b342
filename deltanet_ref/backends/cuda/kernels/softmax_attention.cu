// Causal grouped-query softmax attention, forward and backward; nothing of size L x M is stored.
//
// Mathematics: docs/derivations/attention.md, tags [attn.1..9]. The running maximum: Milakov and Gimelshein 2018,
// "Online normalizer calculation for softmax"; the tiles: Dao 2023, "FlashAttention-2".
//
// Design. A warp owns 16 rows of a result and keeps them in registers in float32; the tiles of the other side pass
// through shared memory. The two tiles that a step needs are copied alternately: one arrives while the other one is
// multiplied, so that a step has two barriers and each copy a product to hide behind.
//   forward    a block owns FORWARD_QUERIES queries of a head and visits the keys, FORWARD_KEYS at a time
//   mean       one warp per row: do_i . o_i
//   dq         a block owns DQ_QUERIES queries of a head and visits the keys, DQ_KEYS at a time
//   dk and dv  a block owns DKV_KEYS keys of a key head and visits the queries of all heads that read it, DKV_QUERIES
//              at a time, double-buffered. 16 rows of dk and dv would not fit the registers of a warp, so warps work in
//              pairs on the same keys: one computes P and dv, the other one dP and dk. P passes from the first to the
//              second through shared memory
// Each result has one owner, which adds in a fixed order: no atomics, the same bits in every run. The price is that the
// backward makes 7 products where 5 would do, because dq and dk each need S and dP.
// A row of the softmax is kept as its peak and total, not as their log-sum-exp (the reason is below [attn.4] in the
// derivation), each (H, tokens) so that neighbouring queries are neighbours in memory.
//
// Floor at B 1, L 8192, H 8, H_kv 2, d 256 in bfloat16, counting only what is visible: forward 275 GFLOP and 84 MB,
// 0.37 ms at 747 TFLOP/s; backward 5 products, 687 GFLOP and 0.92 ms (made here: 7 products, 962 GFLOP). Shared memory
// limits these kernels: each 16 x 16 block of a right factor (512 bytes, 4 cycles) serves two mma of 16 rows. At 128
// bytes a cycle, 132 SMs and 1.755 GHz that predicts, not counting tiles cut by the diagonal: forward 0.65 ms, dq
// 1.16 ms, dk and dv 1.74 ms. Not measured.
//
// Versions: bfloat16 (mma m16n8k16; P and dS are rounded to bfloat16 as factors) and float32 (three TF32 products).
//
// Macros: REAL; D, the head size padded to a multiple of 16, at most 256; the tile sizes named above.
// There is no split over keys: a single query per sequence (generation) runs on H blocks.
#include "tiles.cuh"

constexpr int BLOCKS = D / 16;                     // 16 x 16 blocks of a row of 16 x D
constexpr int FORWARD_THREADS = FORWARD_QUERIES / 16 * WARP;
constexpr int DQ_THREADS = DQ_QUERIES / 16 * WARP;
constexpr int DKV_THREADS = DKV_KEYS / 16 * 2 * WARP;
constexpr int MEAN_WARPS = 8;

// ---- which rows a block owns

struct Sequence {
    int query, queries;  // the first one among all queries, and their number
    int key, keys;       // likewise; the queries are the last ones of the keys
    __device__ __forceinline__ int past() const { return keys - queries; }
};

// Packed sequences start at cu_seqlens; without it each has L queries and M keys.
__device__ __forceinline__ Sequence sequence(int n, const int* cu_seqlens, int L, int M) {
    if (cu_seqlens == nullptr) return {n * L, L, n * M, M};
    const int start = cu_seqlens[n], length = cu_seqlens[n + 1] - start;
    return {start, length, start, length};
}

// A tile of a sequence: its number and that of all tiles of the sequence, which is empty if there is no such tile.
struct Place {
    Sequence of;
    int tile, tiles;
};

template <int ROWS, class F>
__device__ __forceinline__ Place find(int tile, int sequences, const int* cu_seqlens, int L, int M, F length) {
    for (int n = 0; n < sequences; ++n) {
        const Sequence of = sequence(n, cu_seqlens, L, M);
        const int tiles = (length(of) + ROWS - 1) / ROWS;
        if (tile < tiles) return {of, tile, tiles};
        tile -= tiles;
    }
    return {{0, 0, 0, 0}, 0, 0};
}

// Tokens are rows of `heads` vectors of D numbers: the vector of a head at a token.
template <class T>
__device__ __forceinline__ T* vector_at(T* x, int token, int head, int heads) {
    return x + (static_cast<long long>(token) * heads + head) * D;
}

// ---- parts of a step

__device__ __forceinline__ float exponential(float x) { return exp2f(1.44269504f * x); }

// f(x, e / 2, row, column) for each number of a row of blocks that this lane holds; the second argument is which of the
// lane's two rows it is in.
template <int N, class F>
__device__ __forceinline__ void each_score(Block (&blocks)[N], F f) {
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                f(blocks[n].x[half][e], e / 2, Block::row(e), 16 * n + Block::column(half, e));
}

// s = x y^T for 16 rows of a tile and all of another one.
template <int N>
__device__ __forceinline__ void scores(Block (&s)[N], Tile<REAL> x, int first_row, Tile<REAL> y) {
    clear(s);
    multiply_rows<REAL, Shape::FULL, BLOCKS>(s, [&](int b) { return left_rows(x, first_row, 16 * b); }, y);
}

// d += x y with the bits of d += y^T x^T: of the three TF32 products, that with the low half of y comes first.
__device__ __forceinline__ void multiply_mirrored(Block& d, const Left<float>& x, const Right<float>& y) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            mma_tf32(d.x[n], x.high[k], y.low[n][k]);
            mma_tf32(d.x[n], x.low[k], y.high[n][k]);
            mma_tf32(d.x[n], x.high[k], y.high[n][k]);
        }
}
__device__ __forceinline__ void multiply_mirrored(Block& d, const Left<__nv_bfloat16>& x,
                                                  const Right<__nv_bfloat16>& y) {
    multiply(d, x, y);
}

// The same as scores with the roles exchanged: x has the keys. A score must have the bits that it had in the forward,
// because P is formed from it with the forward's peak: where P is near 1 they are the same score, and its rounding
// cancels.
template <int N>
__device__ __forceinline__ void mirrored_scores(Block (&s)[N], Tile<REAL> x, int first_row, Tile<REAL> y) {
    clear(s);
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
        const Left<REAL> factor = left_rows(x, first_row, 16 * b);
#pragma unroll
        for (int n = 0; n < N; ++n) multiply_mirrored(s[n], factor, right_rows(y, 16 * n, 16 * b));
    }
}

// sum += s y
template <int N>
__device__ __forceinline__ void add_product(Block (&sum)[BLOCKS], const Block (&s)[N], Tile<REAL> y) {
    multiply_columns<REAL, Shape::FULL, N>(sum, [&](int b) { return left<REAL>(s[b]); }, y);
}

// 16 rows of D numbers, of which the first `filled` exist.
__device__ __forceinline__ void store_rows(const Block (&x)[BLOCKS], REAL* global, long long stride, int filled) {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) store_block(x[b], global + 16 * b, stride, filled);
}

// ---- forward

// grid (H, tiles), tiles at least those of all sequences
extern "C" __global__ void __launch_bounds__(FORWARD_THREADS)
softmax_attention_forward(const REAL* q, const REAL* k, const REAL* v, const int* cu_seqlens, REAL* o, float* peak,
                          float* total, int sequences, int L, int M, int tokens, int H, int H_kv, float scale) {
    const int h = blockIdx.x, h_kv = h / (H / H_kv);
    const Place place = find<FORWARD_QUERIES>(blockIdx.y, sequences, cu_seqlens, L, M,
                                              [](Sequence of) { return of.queries; });
    if (place.tiles == 0) return;
    const Sequence of = place.of;
    const int first = (place.tiles - 1 - place.tile) * FORWARD_QUERIES;  // those that see most keys are first
    const int rows = min(FORWARD_QUERIES, of.queries - first), keys = of.past() + first + rows;
    const int warp_row = threadIdx.x / WARP * 16;
    const int own_key = of.past() + first + warp_row;                    // of the warp's first row
    const int q_stride = H * D, k_stride = H_kv * D;

    extern __shared__ __align__(16) unsigned char shared[];
    Carver carver{shared};
    const Tile<REAL> Q = carver.tile<REAL>(FORWARD_QUERIES, D);
    const Tile<REAL> K = carver.tile<REAL>(FORWARD_KEYS, D), V = carver.tile<REAL>(FORWARD_KEYS, D);
    const auto start_copy = [&](Tile<REAL> tile, const REAL* x, int start) {
        copy_tile<FORWARD_THREADS>(tile, vector_at(x, of.key + start, h_kv, H_kv), k_stride, FORWARD_KEYS,
                                   min(FORWARD_KEYS, keys - start), D);
        cp_async_commit();
    };
    copy_tile<FORWARD_THREADS>(Q, vector_at(q, of.query + first, h, H), q_stride, FORWARD_QUERIES, rows, D);
    start_copy(K, k, 0);

    Block O[BLOCKS];
    clear(O);
    const float never = -__uint_as_float(0x7f800000u);                   // minus infinity
    float top[2] = {never, never}, sum[2] = {0.0f, 0.0f};                // of the lane's two rows
    for (int start = 0; start < keys; start += FORWARD_KEYS) {
        cp_async_wait<0>();  // this thread's part of K has arrived (of Q too, at first)
        __syncthreads();     // everybody's has; and the last V has been read
        start_copy(V, v, start);
        Block S[FORWARD_KEYS / 16];
        scores(S, Q, warp_row, K);                                       // 1  s_ij = scale q_i . k_j, masked
        float highest[2] = {top[0], top[1]};
        each_score(S, [&](float& s, int r, int row, int column) {
            s = start + column <= own_key + row ? scale * s : never;
            highest[r] = fmaxf(highest[r], s);
        });
        float shrink[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {                                    // 2  top_i = max_j s_ij over the keys so far
            highest[r] = warp_max<4>(highest[r]);
            shrink[r] = exponential(top[r] - highest[r]);
            top[r] = highest[r];
            sum[r] *= shrink[r];
        }
        each_score(S, [&](float& s, int r, int, int) {                   // 3  e_ij = exp(s_ij - top_i)
            s = exponential(s - top[r]);
            sum[r] += s;
        });
        each_score(O, [&](float& x, int r, int, int) { x *= shrink[r]; });
        cp_async_wait<0>();  // this thread's part of V has arrived
        __syncthreads();     // everybody's has; and K has been read
        if (start + FORWARD_KEYS < keys) start_copy(K, k, start + FORWARD_KEYS);
        add_product(O, S, V);                                            // 4  o_i = sum_j e_ij v_j / total_i
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        sum[r] = warp_sum<4>(sum[r]);
        const int row = warp_row + Block::row(2 * r);
        if (threadIdx.x % 4 == 0 && row < rows) {
            const long long at = static_cast<long long>(h) * tokens + of.query + first + row;
            peak[at] = top[r];
            total[at] = sum[r];
        }
    }
    each_score(O, [&](float& x, int r, int, int) { x /= sum[r]; });
    if (warp_row < rows)
        store_rows(O, vector_at(o, of.query + first + warp_row, h, H), q_stride, rows - warp_row);
}

// ---- backward

// mean_i = sum_j P_ij dP_ij = do_i . o_i [attn.7]. grid: ceil(tokens H / MEAN_WARPS)
extern "C" __global__ void __launch_bounds__(MEAN_WARPS* WARP)
softmax_attention_mean(const REAL* dO, const REAL* o, float* mean, int tokens, int H) {
    const long long row = static_cast<long long>(blockIdx.x) * MEAN_WARPS + threadIdx.x / WARP;
    if (row >= static_cast<long long>(tokens) * H) return;
    float sum = 0.0f;
    for (int c = threadIdx.x % WARP * 8; c < D; c += WARP * 8) {
        const auto x = load<8>(dO + row * D + c), y = load<8>(o + row * D + c);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum = fmaf(x[i], y[i], sum);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) mean[row % H * tokens + row / H] = sum;
}

// grid (H, tiles) as forward
extern "C" __global__ void __launch_bounds__(DQ_THREADS)
softmax_attention_dq(const REAL* dO, const REAL* q, const REAL* k, const REAL* v, const float* peak, const float* total,
                     const float* mean, const int* cu_seqlens, REAL* dq, int sequences, int L, int M, int tokens, int H,
                     int H_kv, float scale) {
    const int h = blockIdx.x, h_kv = h / (H / H_kv);
    const Place place = find<DQ_QUERIES>(blockIdx.y, sequences, cu_seqlens, L, M,
                                         [](Sequence of) { return of.queries; });
    if (place.tiles == 0) return;
    const Sequence of = place.of;
    const int first = (place.tiles - 1 - place.tile) * DQ_QUERIES;
    const int rows = min(DQ_QUERIES, of.queries - first), keys = of.past() + first + rows;
    const int warp_row = threadIdx.x / WARP * 16;
    const int own_key = of.past() + first + warp_row;
    const int q_stride = H * D, k_stride = H_kv * D;

    extern __shared__ __align__(16) unsigned char shared[];
    Carver carver{shared};
    const Tile<REAL> Q = carver.tile<REAL>(DQ_QUERIES, D), DO = carver.tile<REAL>(DQ_QUERIES, D);
    const Tile<REAL> K = carver.tile<REAL>(DQ_KEYS, D), V = carver.tile<REAL>(DQ_KEYS, D);
    const auto start_copy = [&](Tile<REAL> tile, const REAL* x, int start) {
        copy_tile<DQ_THREADS>(tile, vector_at(x, of.key + start, h_kv, H_kv), k_stride, DQ_KEYS,
                              min(DQ_KEYS, keys - start), D);
        cp_async_commit();
    };
    copy_tile<DQ_THREADS>(Q, vector_at(q, of.query + first, h, H), q_stride, DQ_QUERIES, rows, D);
    copy_tile<DQ_THREADS>(DO, vector_at(dO, of.query + first, h, H), q_stride, DQ_QUERIES, rows, D);
    start_copy(V, v, 0);

    float top[2], weight[2], along[2];                                   // peak, 1 / total, mean of the lane's two rows
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = min(warp_row + Block::row(2 * r), rows - 1);     // rows that do not exist repeat the last one
        const long long at = static_cast<long long>(h) * tokens + of.query + first + row;
        top[r] = peak[at];
        weight[r] = 1.0f / total[at];
        along[r] = mean[at];
    }
    Block dQ[BLOCKS];
    clear(dQ);
    for (int start = 0; start < keys; start += DQ_KEYS) {
        cp_async_wait<0>();  // this thread's part of V has arrived (of Q and dO too, at first)
        __syncthreads();     // everybody's has; and the last K has been read
        start_copy(K, k, start);
        Block dP[DQ_KEYS / 16], S[DQ_KEYS / 16];
        scores(dP, DO, warp_row, V);                                     // dP_ij = do_i . v_j
        cp_async_wait<0>();  // this thread's part of K has arrived
        __syncthreads();     // everybody's has; and V has been read
        if (start + DQ_KEYS < keys) start_copy(V, v, start + DQ_KEYS);
        scores(S, Q, warp_row, K);
        each_score(S, [&](float& s, int r, int row, int column) {        // P_ij; 0 where key j is later than query i
            s = start + column <= own_key + row ? exponential(scale * s - top[r]) * weight[r] : 0.0f;
        });
#pragma unroll
        for (int b = 0; b < DQ_KEYS / 16; ++b)                           // 3..2  ds_ij = P_ij (dP_ij - mean_i)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int e = 0; e < 4; ++e) S[b].x[half][e] *= dP[b].x[half][e] - along[e / 2];
        add_product(dQ, S, K);                                           // 1  dq_i = scale sum_j ds_ij k_j
    }
    each_score(dQ, [&](float& x, int, int, int) { x *= scale; });
    if (warp_row < rows)
        store_rows(dQ, vector_at(dq, of.query + first + warp_row, h, H), q_stride, rows - warp_row);
}

// grid (H_kv, tiles of keys). Rows of scores are keys, columns are queries.
extern "C" __global__ void __launch_bounds__(DKV_THREADS, 1)
softmax_attention_dkv(const REAL* dO, const REAL* q, const REAL* k, const REAL* v, const float* peak,
                      const float* total, const float* mean, const int* cu_seqlens, REAL* dk, REAL* dv, int sequences,
                      int L, int M, int tokens, int H, int H_kv, float scale) {
    const int h_kv = blockIdx.x, group = H / H_kv;
    const Place place = find<DKV_KEYS>(blockIdx.y, sequences, cu_seqlens, L, M, [](Sequence of) { return of.keys; });
    if (place.tiles == 0) return;
    const Sequence of = place.of;
    const int first = place.tile * DKV_KEYS, rows = min(DKV_KEYS, of.keys - first);
    const int pair = threadIdx.x / WARP / 2, warp_row = 16 * pair, lane = threadIdx.x % WARP;
    const bool of_dv = threadIdx.x / WARP % 2 == 0;                      // this warp computes P and dv, or dP and dk
    const int q_stride = H * D, k_stride = H_kv * D;
    // The queries of one head that see a key of the tile, in tiles of DKV_QUERIES; then those of the next head
    const int first_query = max(0, first - of.past()) / DKV_QUERIES * DKV_QUERIES;
    const int tiles = (of.queries - first_query + DKV_QUERIES - 1) / DKV_QUERIES, steps = group * tiles;

    extern __shared__ __align__(16) unsigned char shared[];
    Carver carver{shared};
    const Tile<REAL> K = carver.tile<REAL>(DKV_KEYS, D), V = carver.tile<REAL>(DKV_KEYS, D);
    const Tile<REAL> Q[2] = {carver.tile<REAL>(DKV_QUERIES, D), carver.tile<REAL>(DKV_QUERIES, D)};
    const Tile<REAL> DO[2] = {carver.tile<REAL>(DKV_QUERIES, D), carver.tile<REAL>(DKV_QUERIES, D)};
    float* passed = carver.array<float>(DKV_KEYS * DKV_QUERIES) + pair * 16 * DKV_QUERIES;   // P of the pair
    const auto start_copy = [&](int step) {
        const int h = h_kv * group + step / tiles, start = first_query + step % tiles * DKV_QUERIES;
        const int filled = min(DKV_QUERIES, of.queries - start);
        copy_tile<DKV_THREADS>(step % 2 ? Q[1] : Q[0], vector_at(q, of.query + start, h, H), q_stride, DKV_QUERIES,
                               filled, D);
        copy_tile<DKV_THREADS>(step % 2 ? DO[1] : DO[0], vector_at(dO, of.query + start, h, H), q_stride, DKV_QUERIES,
                               filled, D);
        cp_async_commit();
    };
    copy_tile<DKV_THREADS>(K, vector_at(k, of.key + first, h_kv, H_kv), k_stride, DKV_KEYS, rows, D);
    copy_tile<DKV_THREADS>(V, vector_at(v, of.key + first, h_kv, H_kv), k_stride, DKV_KEYS, rows, D);
    start_copy(0);

    Block sum[BLOCKS];                                                   // dv or dk
    clear(sum);
    for (int step = 0; step < steps; ++step) {
        const Tile<REAL> Q_now = step % 2 ? Q[1] : Q[0], DO_now = step % 2 ? DO[1] : DO[0];
        const int h = h_kv * group + step / tiles, start = first_query + step % tiles * DKV_QUERIES;
        cp_async_wait<0>();  // this thread's part of Q and dO has arrived (of K and V too, at first)
        __syncthreads();     // everybody's has; and the other buffers, and `passed`, have been read
        if (step + 1 < steps) start_copy(step + 1);
        Block S[DKV_QUERIES / 16];
        mirrored_scores(S, of_dv ? K : V, warp_row, of_dv ? Q_now : DO_now); // k_j . q_i or dP_ji = v_j . do_i
        int place_of_score = lane;                                       // the next number's in `passed`
        const long long row_of_head = static_cast<long long>(h) * tokens + of.query;
        if (of_dv)
            each_score(S, [&](float& s, int, int row, int column) {      // P_ji; 0 where key j is later than query i
                const int i = start + column;
                const bool visible = i < of.queries && first + warp_row + row <= of.past() + i;
                s = visible ? exponential(scale * s - peak[row_of_head + i]) / total[row_of_head + i] : 0.0f;
                passed[place_of_score] = s;
                place_of_score += WARP;
            });
        __syncthreads();     // P is in `passed`
        if (!of_dv)
            each_score(S, [&](float& s, int, int, int column) {          // 3..2  ds_ji = P_ji (dP_ji - mean_i)
                const int i = start + column;
                s = passed[place_of_score] * (s - (i < of.queries ? mean[row_of_head + i] : 0.0f));
                place_of_score += WARP;
            });
        // 4  dv_j = sum_i P_ji do_i
        // 1  dk_j = scale sum_i ds_ji q_i
        add_product(sum, S, of_dv ? DO_now : Q_now);
    }
    if (!of_dv) each_score(sum, [&](float& x, int, int, int) { x *= scale; });
    if (warp_row < rows)
        store_rows(sum, vector_at(of_dv ? dv : dk, of.key + first + warp_row, h_kv, H_kv), k_stride, rows - warp_row);
}
