// What the kernels of the gated delta rule share: where a chunk lies, and the numbers of its gates.
#pragma once

#include "tiles.cuh"

constexpr int BLOCKS = CHUNK / 16;  // blocks of 16 tokens in a chunk

// ---- where things are

// The tokens of a packed sequence, and the slot of its first chunk: where what is kept of chunks lies. Sequence n has the
// slots from start / CHUNK + n on, enough whatever the lengths of the others; a slot before the next one may be empty.
// So sizes and grids depend on the number of tokens and sequences alone.
struct Sequence {
    int start, stop, first_chunk;
    __device__ __forceinline__ Sequence(const int* cu_seqlens, int n)
        : start(cu_seqlens[n]), stop(cu_seqlens[n + 1]), first_chunk(start / CHUNK + n) {}
    __device__ __forceinline__ int chunks() const { return (stop - start + CHUNK - 1) / CHUNK; }
    __device__ __forceinline__ int token(int chunk) const { return start + chunk * CHUNK; }
    __device__ __forceinline__ int filled(int chunk) const { return min(CHUNK, stop - token(chunk)); }
};

// The sequence that a slot belongs to.
__device__ __forceinline__ int sequence_of(int slot, const int* cu_seqlens, int sequences) {
    int low = 0, high = sequences - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (cu_seqlens[middle] / CHUNK + middle <= slot) low = middle;
        else high = middle - 1;
    }
    return low;
}

__device__ __forceinline__ int key_head(int head, int H_k, int H_v, int tiled) {
    return tiled ? head % H_k : head / (H_v / H_k);
}

// The row of `width` numbers of a token and head, in an array (tokens, heads, width).
template <class T>
__device__ __forceinline__ T* row_of(T* x, int token, int heads, int head, int width) {
    return x + (static_cast<long long>(token) * heads + head) * width;
}

// The matrix of `size` numbers of a chunk or sequence and head, in an array (n, heads, size).
template <class T>
__device__ __forceinline__ T* matrix_of(T* x, int n, int heads, int head, int size) {
    return x + (static_cast<long long>(n) * heads + head) * size;
}

// ---- the gates of a chunk: five arrays of CHUNK floats

// gc [wy.1] is the unevaluated sum high + low, to 2^-48 of the largest sum: differences of large sums are as accurate
// as float32 can write them.
enum { GC_HIGH, GC_LOW, DECAY, TAIL, BETA, GATES };

// exp(gc_i - gc_j) for i >= j [wy.2]. The difference is formed before the exponential: exp(gc_i) exp(-gc_j) overflows.
__device__ __forceinline__ float decay_ratio(const float* gates, int i, int j) {
    const float high = gates[GC_HIGH * CHUNK + i] - gates[GC_HIGH * CHUNK + j];
    return expf(high + (gates[GC_LOW * CHUNK + i] - gates[GC_LOW * CHUNK + j]));
}

// ---- walks along a sequence: a warp owns 16 columns of d_v

constexpr int COLUMNS = 16 * COLUMN_WARPS, THREADS = WARP * COLUMN_WARPS;

// What is fetched a whole chunk ahead: K, a matrix of pairs of tokens, rows of values, gates. Two stages in turn.
struct Stage {
    Tile<REAL> K, square, values;
    float* gates;

    static constexpr int ROW_BYTES = (padded<REAL>(D_K) + padded<REAL>(CHUNK) + padded<REAL>(COLUMNS)) * sizeof(REAL);
    static constexpr int BYTES = CHUNK * (ROW_BYTES + GATES * sizeof(float));

    __device__ __forceinline__ explicit Stage(unsigned char* start) {
        Carver carver{start};
        K = carver.tile<REAL>(CHUNK, D_K);
        square = carver.tile<REAL>(CHUNK, CHUNK);
        values = carver.tile<REAL>(CHUNK, COLUMNS);
        gates = carver.array<float>(GATES * CHUNK);
    }
};

// For the transpose of 16 columns of a state S in registers: f(x, place of x in the matrix (D_K, d_v)).
template <class F>
__device__ __forceinline__ void each_of_state(Block (&S)[D_K / 16], int d_v, int first_column, F f) {
#pragma unroll
    for (int m = 0; m < D_K / 16; ++m)
        each(S[m], [&](float& x, int row, int column) { f(x, (16 * m + column) * d_v + first_column + row); });
}
