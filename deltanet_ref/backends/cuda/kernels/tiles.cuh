// Products of matrices in blocks of 16 x 16, one warp at a time: the left factor and the result in registers, the right
// factor in shared memory.
//
// A Block is held as tensor cores return it, and as they take a left factor: the result of a product is the left factor
// of the next one without leaving its lane. So a warp that owns 16 rows computes a chain of products alone.
//
// T is the type that factors have. bfloat16: one mma m16n8k16 for each 16 x 8. float: three mma m16n8k8 in TF32 on the
// high and low halves of both factors (the product of the low ones is dropped), which is as accurate as float32 to about
// two bits. Sums are float32.
#pragma once

#include <ptx.cuh>

#include "common.cuh"

// ---- a matrix in shared memory

template <class T>
constexpr int PIECE = 16 / sizeof(T);  // elements of a 16-byte access

// Rows are 16 bytes longer than their data: the rows of one ldmatrix lie in different banks.
template <class T>
__host__ __device__ constexpr int padded(int columns) { return columns + PIECE<T>; }

template <class T>
struct Tile {
    T* data;
    int stride;  // elements from row to row
    __device__ __forceinline__ T* at(int row, int column) const { return data + row * stride + column; }
    __device__ __forceinline__ float operator()(int row, int column) const { return to_float(*at(row, column)); }
};

// Cuts the dynamic shared memory of a block into tiles and arrays, in the order of the calls.
struct Carver {
    unsigned char* next;

    template <class T>
    __device__ __forceinline__ T* array(int n) {
        T* p = reinterpret_cast<T*>(next);
        next += n * sizeof(T);
        return p;
    }
    template <class T>
    __device__ __forceinline__ Tile<T> tile(int rows, int columns) {
        return {array<T>(rows * padded<T>(columns)), padded<T>(columns)};
    }
};

// Start copying `rows` rows of a global matrix, of which the first `filled` (at least one) exist; the others become
// zeros. columns is a multiple of 8 and global is aligned to 16 bytes, as is each row.
template <int THREADS, class T>
__device__ __forceinline__ void copy_tile(Tile<T> tile, const T* global, int row_stride, int rows, int filled,
                                          int columns) {
    const int pieces = columns / PIECE<T>;
#pragma unroll 2
    for (int i = threadIdx.x; i < rows * pieces; i += THREADS) {
        const int row = i / pieces, column = i % pieces * PIECE<T>;
        const bool valid = row < filled;
        cp_async_16(tile.at(row, column), global + (valid ? row * row_stride + column : 0), valid);
    }
}

// ---- 16 x 16 numbers of a warp

// x[half][e] is (row(e), column(half, e)).
struct Block {
    float x[2][4];
    __device__ __forceinline__ static int row(int e) { return threadIdx.x % WARP / 4 + 8 * (e / 2); }
    __device__ __forceinline__ static int column(int half, int e) { return 8 * half + threadIdx.x % 4 * 2 + e % 2; }
};

// f(x, row, column) for each number of a block that this lane holds.
template <class B, class F>
__device__ __forceinline__ void each(B& block, F f) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int e = 0; e < 4; ++e) f(block.x[half][e], Block::row(e), Block::column(half, e));
}

template <int N>
__device__ __forceinline__ void clear(Block (&blocks)[N]) {
#pragma unroll
    for (Block& block : blocks) block = Block{};
}

// The transposed block from a tile: (row, column) is tile(first_row + column, first_column + row).
template <class T>
__device__ __forceinline__ Block transposed(Tile<T> tile, int first_row, int first_column) {
    Block block;
    each(block, [&](float& x, int row, int column) { x = tile(first_row + column, first_column + row); });
    return block;
}

// Write the block's transpose to a tile.
template <class T>
__device__ __forceinline__ void put_transposed(const Block& block, Tile<T> tile, int first_row, int first_column) {
    each(block, [&](const float& x, int row, int column) {
        *tile.at(first_row + column, first_column + row) = from_float<T>(x);
    });
}

// Write the first `filled` rows of a block to a global matrix.
template <class T>
__device__ __forceinline__ void store_block(const Block& block, T* global, int row_stride, int filled) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
            Pack<T, 2> pair;
            pair.set(0, block.x[half][e]);
            pair.set(1, block.x[half][e + 1]);
            if (Block::row(e) < filled) store<2>(global + Block::row(e) * row_stride + Block::column(half, e), pair);
        }
}

// ---- factors of a product: a left one of 16 rows and 16 columns, a right one of 16 rows and 16 columns

template <class T>
struct Left;
template <class T>
struct Right;

template <>
struct Left<__nv_bfloat16> {
    uint32_t a[4];
};
template <>
struct Right<__nv_bfloat16> {
    uint32_t b[2][2];  // for columns 0 .. 7 and 8 .. 15
};

__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
    const uint32_t first = __bfloat16_as_ushort(__float2bfloat16_rn(low));
    const uint32_t second = __bfloat16_as_ushort(__float2bfloat16_rn(high));
    return first | second << 16;
}

// high + low is x to 2^-24 of it, each a TF32 number.
struct Halves {
    uint32_t high, low;
};
__device__ __forceinline__ Halves halves(float x) {
    const uint32_t high = to_tf32(x);
    return {high, to_tf32(x - __uint_as_float(high))};
}

// The sum over a product's inner index runs in any order. A lane holds columns pair and pair + 1 of a Block where an mma
// expects columns at and at + 4: both factors are given with that permutation.
template <>
struct Left<float> {
    uint32_t high[2][4], low[2][4];  // for columns 0 .. 7 and 8 .. 15
};
template <>
struct Right<float> {
    uint32_t high[2][2][2], low[2][2][2];  // [columns 0 .. 7, 8 .. 15][rows 0 .. 7, 8 .. 15]
};

// A Block as left factor.
template <class T>
__device__ __forceinline__ Left<T> left(const Block& block) {
    Left<T> f;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            f.a[2 * half] = bf16_pair(block.x[half][0], block.x[half][1]);
            f.a[2 * half + 1] = bf16_pair(block.x[half][2], block.x[half][3]);
        }
    } else {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const Halves h = halves(block.x[half][e]);
                f.high[half][e / 2 + e % 2 * 2] = h.high;
                f.low[half][e / 2 + e % 2 * 2] = h.low;
            }
    }
    return f;
}

// The 16 x 16 numbers of a tile from (row, column) on, as left factor.
template <class T>
__device__ __forceinline__ Left<T> left_rows(Tile<T> tile, int row, int column) {
    if constexpr (sizeof(T) == 2) {
        Left<T> f;
        const int lane = threadIdx.x % WARP;
        ldmatrix_x4(f.a, tile.at(row + lane % 16, column + lane / 16 * 8));
        return f;
    } else {
        Block block;
        each(block, [&](float& x, int r, int c) { x = tile(row + r, column + c); });
        return left<T>(block);
    }
}

// Their transpose as left factor.
template <class T>
__device__ __forceinline__ Left<T> left_columns(Tile<T> tile, int row, int column) {
    if constexpr (sizeof(T) == 2) {
        Left<T> f;
        const int lane = threadIdx.x % WARP;
        ldmatrix_x4_trans(f.a, tile.at(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
        return f;
    } else {
        return left<T>(transposed(tile, row, column));
    }
}

// The transpose of the 16 x 16 numbers of a tile from (row, column) on, as right factor: x y^T takes y by its rows.
template <class T>
__device__ __forceinline__ Right<T> right_rows(Tile<T> tile, int row, int column) {
    Right<T> f;
    if constexpr (sizeof(T) == 2) {
        const int lane = threadIdx.x % WARP;
        uint32_t r[4];
        ldmatrix_x4(r, tile.at(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
        f = {{{r[0], r[1]}, {r[2], r[3]}}};
    } else {
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const auto pair = load<2>(tile.at(row + 8 * n + Block::row(0), column + Block::column(k, 0)));
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const Halves h = halves(pair[e]);
                    f.high[n][k][e] = h.high;
                    f.low[n][k][e] = h.low;
                }
            }
    }
    return f;
}

// The 16 x 16 numbers themselves as right factor: x y takes y by its columns.
template <class T>
__device__ __forceinline__ Right<T> right_columns(Tile<T> tile, int row, int column) {
    Right<T> f;
    if constexpr (sizeof(T) == 2) {
        const int lane = threadIdx.x % WARP;
        uint32_t r[4];
        ldmatrix_x4_trans(r, tile.at(row + lane % 16, column + lane / 16 * 8));
        f = {{{r[0], r[1]}, {r[2], r[3]}}};
    } else {
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int k = 0; k < 2; ++k)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const Halves h = halves(tile(row + Block::column(k, e), column + 8 * n + Block::row(0)));
                    f.high[n][k][e] = h.high;
                    f.low[n][k][e] = h.low;
                }
    }
    return f;
}

// d += x y
template <class T>
__device__ __forceinline__ void multiply(Block& d, const Left<T>& x, const Right<T>& y) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        if constexpr (sizeof(T) == 2) {
            mma_bf16(d.x[n], x.a, y.b[n]);
        } else {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                mma_tf32(d.x[n], x.low[k], y.high[n][k]);
                mma_tf32(d.x[n], x.high[k], y.low[n][k]);
                mma_tf32(d.x[n], x.high[k], y.high[n][k]);
            }
        }
    }
}

// ---- products of 16 rows with a tile

// Which blocks (k, n) of a right factor are not zero: k counts blocks of its rows, n of its columns.
enum class Shape { FULL, UPPER, LOWER };  // UPPER: k <= n, LOWER: k >= n

template <Shape SHAPE>
__device__ __forceinline__ constexpr bool holds(int k, int n) {
    return SHAPE == Shape::FULL || (SHAPE == Shape::UPPER ? k <= n : k >= n);
}

// d += x y^T for y in a tile; factor(k) is block k of x.
template <class T, Shape SHAPE = Shape::FULL, int K, int N, class F>
__device__ __forceinline__ void multiply_rows(Block (&d)[N], F factor, Tile<T> y) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const Left<T> x = factor(k);
#pragma unroll
        for (int n = 0; n < N; ++n)
            if (holds<SHAPE>(k, n)) multiply(d[n], x, right_rows(y, 16 * n, 16 * k));
    }
}

// d += x y for y in a tile; factor(k) is block k of x.
template <class T, Shape SHAPE = Shape::FULL, int K, int N, class F>
__device__ __forceinline__ void multiply_columns(Block (&d)[N], F factor, Tile<T> y) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const Left<T> x = factor(k);
#pragma unroll
        for (int n = 0; n < N; ++n)
            if (holds<SHAPE>(k, n)) multiply(d[n], x, right_columns(y, 16 * k, 16 * n));
    }
}

// Write the transposes of blocks, columns own .. own + 15 of N * 16 rows, to a global matrix, of which `filled` rows
// exist: through these columns of a tile, so that 16 bytes are written at once. No other warp may use them.
template <class T, int N>
__device__ __forceinline__ void store_rows(const Block (&x)[N], Tile<T> tile, int own, T* global, int row_stride,
                                           int filled) {
#pragma unroll
    for (int n = 0; n < N; ++n) put_transposed(x[n], tile, 16 * n, own);
    __syncwarp();  // the warp's columns of the tile are written
    constexpr int PIECES = 16 / PIECE<T>;
#pragma unroll 2
    for (int i = threadIdx.x % WARP; i < filled * PIECES; i += WARP) {
        const int row = i / PIECES, column = own + i % PIECES * PIECE<T>;
        store<PIECE<T>>(global + row * row_stride + column, load<PIECE<T>>(tile.at(row, column)));
    }
}
