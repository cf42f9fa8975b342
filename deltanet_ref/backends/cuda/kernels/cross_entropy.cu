// Cross-entropy over a vocabulary: of given logits, and of a linear map whose logits exist only a tile at a time.
//
// Mathematics: docs/derivations/cross-entropy.md, tags [xent.1..11].
//
// Design. One block of THREADS threads per row. A row's softmax is kept as peak and total, both float32, as is
// everything else here but logits, x, w and their gradients.
//
//   cross_entropy_forward, _backward   logits are given; each pass reads them once
//   linear_cross_entropy_tile          step 2 of ops.linear_cross_entropy: a tile of logits becomes exp(logit - peak)
//                                      for the second product, and what was summed so far is rescaled to the new peak
//                                      [xent.7..9]
//   linear_cross_entropy_end, _dx      the row of dx, and its share of the loss's gradient [xent.6, xent.10]
//   linear_cross_entropy_dlogits       a tile of logits becomes its gradient, for dw [xent.11]
//   gather_rows, sum_rows              rows that are kept; the mean, in one fixed order
//
// The logits of a tile are float32: as bfloat16 a logit of 20 would be off by up to 0.06, and so would log p.
// A row whose label is negative is ignored: it adds 0 to the loss and its gradient is 0.
//
// Floor of the linear map at 8192 tokens, V 248,320, D 1024 in bfloat16: two products of 4.17 TFLOP, 11.2 ms at
// 747 TFLOP/s; w is read once, 0.51 GB or 0.17 ms. A tile of 2048 x 2048 (16.8 MB of float32, 8.4 of bfloat16) stays in
// an L2 of 50 MB, whose bandwidth, about 5 TB/s (assumed), then limits linear_cross_entropy_tile: 16.8 MB read twice,
// 8.4 written, 8.4 of `weighted` read and written, 12 us in addition to two products of 11.5 us each: 17 ms in all.
// Through device memory instead the tiles would be 24 GB, 8.3 ms. Not measured.
//
// Versions: one. Macros: REAL, the type of activations; THREADS.
#include "common.cuh"

constexpr int WARPS = THREADS / WARP;
constexpr int WIDTH = 8;                            // values of an access
constexpr float LOWEST = -3.402823466e38f;  // below every logit but minus infinity, whose exponential it makes 0

// f(x, i) for each number of a row, 16 bytes or more at a time where the row is aligned.
template <class T, class F>
__device__ __forceinline__ void each_of_row(const T* row, int n, F f) {
    const int whole = reinterpret_cast<unsigned long long>(row) % 16 == 0 ? n / WIDTH * WIDTH : 0;
    for (int i = WIDTH * threadIdx.x; i < whole; i += WIDTH * THREADS) {
        const auto x = load<WIDTH>(row + i);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) f(x[j], i + j);
    }
    for (int i = whole + threadIdx.x; i < n; i += THREADS) f(to_float(row[i]), i);
}

// y_i = f(x_i, i) for each number of a row.
template <class T, class U, class F>
__device__ __forceinline__ void map_row(const T* x, U* y, int n, F f) {
    const bool aligned = (reinterpret_cast<unsigned long long>(x) | reinterpret_cast<unsigned long long>(y)) % 16 == 0;
    const int whole = aligned ? n / WIDTH * WIDTH : 0;
    for (int i = WIDTH * threadIdx.x; i < whole; i += WIDTH * THREADS) {
        const auto values = load<WIDTH>(x + i);
        Pack<U, WIDTH> results;
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) results.set(j, f(values[j], i + j));
        store<WIDTH>(y + i, results);
    }
    for (int i = whole + threadIdx.x; i < n; i += THREADS) y[i] = from_float<U>(f(to_float(x[i]), i));
}

// dlogit_v = share (exp(logit_v - peak) / total - [v = label]) of a row, 0 if it is ignored [xent.5]
template <class T>
__device__ __forceinline__ void row_gradient(const T* logits, REAL* dlogits, int n, int label, bool ignored, float peak,
                                             float total, float share) {
    const float factor = share / total;
    map_row(logits, dlogits, n, [&](float x, int v) {
        const float p = factor * expf(x - peak) - (v == label ? share : 0.0f);
        return ignored ? 0.0f : p;
    });
}

// ---- logits that are given. grid: rows

extern "C" __global__ void __launch_bounds__(THREADS)
cross_entropy_forward(const REAL* logits, const int* labels, float* peak, float* total, float* surprise, int V) {
    __shared__ float maxima[WARPS];
    __shared__ float sums[WARPS];
    const REAL* row = logits + static_cast<long long>(blockIdx.x) * V;
    float top = LOWEST, sum = 0.0f;
    each_of_row(row, V, [&](float x, int) {                              // 1..2  of the values that this thread reads
        if (x > top) {
            sum *= expf(top - x);
            top = x;
        }
        sum += expf(x - top);
    });
    const float highest = block_max<WARPS>(top, maxima);                 // 1  peak = max_v logit_v
    sum = block_sum<WARPS>(sum * expf(top - highest), sums);             // 2  total = sum_v exp(logit_v - peak)
    if (threadIdx.x != 0) return;
    const int label = labels[blockIdx.x];
    peak[blockIdx.x] = highest;
    total[blockIdx.x] = sum;                                             // 3  -log p = log total + (peak - logit_label)
    surprise[blockIdx.x] = label < 0 ? 0.0f : logf(sum) + (highest - to_float(row[label]));
}

extern "C" __global__ void __launch_bounds__(THREADS)
cross_entropy_backward(const REAL* logits, const int* labels, const float* peak, const float* total, REAL* dlogits,
                       int V, float dloss, const float* count) {
    const long long row = static_cast<long long>(blockIdx.x) * V;
    const int label = labels[blockIdx.x];
    row_gradient(logits + row, dlogits + row, V, label, label < 0, peak[blockIdx.x], total[blockIdx.x],
                 dloss / *count);
}

// ---- logits of a linear map, in tiles of `columns` words from `start` on, whose rows are `stride` apart. grid: rows

// s becomes e = exp(s - peak). weighted and label_row, rows of D numbers, are null where no gradient is needed; w holds
// the rows of the tile's words.
extern "C" __global__ void __launch_bounds__(THREADS)
linear_cross_entropy_tile(const float* s, const int* labels, const REAL* w, float* peak, float* total,
                          float* label_logit, float* weighted, REAL* label_row, REAL* e, int start, int columns,
                          int stride, int D) {
    __shared__ float maxima[WARPS];
    __shared__ float sums[WARPS];
    const int row = blockIdx.x, label = labels[row] - start;
    const long long at = static_cast<long long>(row) * stride, at_D = static_cast<long long>(row) * D;
    const float before = start == 0 ? LOWEST : peak[row];
    float top = before, sum = 0.0f;
    each_of_row(s + at, columns, [&](float x, int) { top = fmaxf(top, x); });
    top = block_max<WARPS>(top, maxima);                                 // 2  peak' = max(peak, max_v s_v)  [xent.7]
    const float shrink = expf(before - top);
    map_row(s + at, e + at, columns, [&](float x, int) {                 //    s = exp(s - peak')
        const float y = expf(x - top);
        sum += y;
        return y;
    });
    sum = block_sum<WARPS>(sum, sums);
    if (threadIdx.x == 0) {                                              //    total' = shrink total + sum_v s  [xent.8]
        total[row] = start == 0 ? sum : fmaf(total[row], shrink, sum);
        peak[row] = top;
        if (label >= 0 && label < columns) label_logit[row] = s[at + label];
    }
    if (weighted == nullptr) return;
    if (start > 0)                                                       //    weighted' = shrink weighted [xent.9]
        map_row(weighted + at_D, weighted + at_D, D, [&](float x, int) { return shrink * x; });
    if (label >= 0 && label < columns)
        map_row(w + static_cast<long long>(label) * D, label_row + at_D, D, [](float x, int) { return x; });
}

// weighted becomes the row's gradient; null where none is needed.
extern "C" __global__ void __launch_bounds__(THREADS)
linear_cross_entropy_end(const int* labels, const float* peak, const float* total, const float* label_logit,
                         const REAL* label_row, float* weighted, float* surprise, int D) {
    const int row = blockIdx.x;
    if (labels[row] < 0) {
        if (threadIdx.x == 0) surprise[row] = 0.0f;
        return;  // its row of weighted is never read
    }
    const long long at = static_cast<long long>(row) * D;
    const float sum = total[row];
    if (threadIdx.x == 0) surprise[row] = logf(sum) + (peak[row] - label_logit[row]);    // 4  -log p
    if (weighted == nullptr) return;
    for (int i = threadIdx.x; i < D; i += THREADS)                       // 5  E_softmax[w] - w_label  [xent.6]
        weighted[at + i] = weighted[at + i] / sum - to_float(label_row[at + i]);
}

// dx = share dx_row for kept rows, of which place is the number, and 0 for the others, whose place is -1.
extern "C" __global__ void __launch_bounds__(THREADS)
linear_cross_entropy_dx(const float* dx_row, const int* place, REAL* dx, int D, float dloss, const float* count) {
    const float share = dloss / *count;
    const int kept = place[blockIdx.x];
    REAL* y = dx + static_cast<long long>(blockIdx.x) * D;
    const float* x = dx_row + static_cast<long long>(kept < 0 ? 0 : kept) * D;
    for (int i = threadIdx.x; i < D; i += THREADS) y[i] = from_float<REAL>(kept < 0 ? 0.0f : share * x[i]);
}

// A tile of logits becomes a tile of their gradient.
extern "C" __global__ void __launch_bounds__(THREADS)
linear_cross_entropy_dlogits(const float* s, const int* labels, const float* peak, const float* total, REAL* dlogits,
                             int start, int columns, int stride, float dloss, const float* count) {
    const long long at = static_cast<long long>(blockIdx.x) * stride;
    const int label = labels[blockIdx.x];
    row_gradient(s + at, dlogits + at, columns, label - start, label < 0, peak[blockIdx.x], total[blockIdx.x],
                 dloss / *count);
}

// ---- rows

// y_i = x[ids_i], rows of D numbers. grid: rows of y
extern "C" __global__ void __launch_bounds__(THREADS) gather_rows(const REAL* x, const int* ids, REAL* y, int D) {
    const long long from = static_cast<long long>(ids[blockIdx.x]) * D, to = static_cast<long long>(blockIdx.x) * D;
    map_row(x + from, y + to, D, [](float value, int) { return value; });
}

// mean = sum of x (n,) / count. grid: 1
extern "C" __global__ void __launch_bounds__(THREADS) sum_rows(const float* x, float* mean, int n, const float* count) {
    __shared__ float sums[WARPS];
    float sum = 0.0f;
    for (int i = threadIdx.x; i < n; i += THREADS) sum += x[i];
    sum = block_sum<WARPS>(sum, sums);
    if (threadIdx.x == 0) mean[0] = sum / *count;
}
