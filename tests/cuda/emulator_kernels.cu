// Kernels for test_emulator.py: each feature of the emulator, and each mistake that it must notice.
#include <cuda_bf16.h>
#include <ptx.cuh>

#include "emulator_kernels.cuh"

constexpr unsigned ALL = 0xffffffffu;

// ---- features

extern "C" __global__ void indices(int* out) {
    const int threads = blockDim.x * blockDim.y * blockDim.z;
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    out[block * threads + thread] = 1000 * block + thread;
}

extern "C" __global__ void scalars(const float* nothing, int i, long long l, float f, double* out) {
    out[0] = nothing == nullptr, out[1] = i, out[2] = static_cast<double>(l), out[3] = f;
}

// What shared memory holds before anything is written to it; then something is.
extern "C" __global__ void initial_shared(float* out) {
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ float fixed[4];
    __shared__ int scalar;
    float* dynamic = reinterpret_cast<float*>(shared);
    float* mine = out + 9 * blockIdx.x;
    for (int i = 0; i < 4; ++i) mine[i] = dynamic[i], mine[4 + i] = fixed[i], dynamic[i] = fixed[i] = 1.0f;
    mine[8] = static_cast<float>(scalar);
    scalar = 1;
}

extern "C" __global__ void aligned_shared(int* out) {
    __shared__ char one[3];
    __shared__ __align__(64) float wide[5];
    one[threadIdx.x] = wide[threadIdx.x] = 0;
    out[threadIdx.x] = static_cast<int>(reinterpret_cast<unsigned long long>(wide) % 64);
}

extern "C" __global__ void shuffles(const float* x, float* out, int n, int width) {
    const float mine = x[threadIdx.x];
    float* row = out + 6 * threadIdx.x;
    row[0] = __shfl_sync(ALL, mine, n, width);
    row[1] = __shfl_xor_sync(ALL, mine, n, width);
    row[2] = __shfl_down_sync(ALL, mine, n, width);
    row[3] = __shfl_up_sync(ALL, mine, n, width);
    row[4] = static_cast<float>(__ballot_sync(ALL, threadIdx.x % 3 == 0) & 0xffff);
    row[5] = static_cast<float>(__shfl_xor_sync(ALL, static_cast<double>(mine), 1));
}

extern "C" __global__ void count(int* n, float* sum) {
    atomicAdd(n, 1);
    atomicAdd(sum, 0.5f);
}

extern "C" __global__ void round_to_bf16(const float* x, float* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = __bfloat162float(__float2bfloat16_rn(x[i]));
}

extern "C" __global__ void round_to_tf32(const float* x, float* out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = __uint_as_float(to_tf32(x[i]));
}

extern "C" __global__ void twice(const float* x, float* out) { out[threadIdx.x] = x[threadIdx.x] * 2.0f; }

__device__ uint32_t pair(const float* x, int first, int second) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(x[first])) |
           static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(x[second]))) << 16;
}

// d += a b from the layout in the PTX ISA. swapped: the rows g and g + 8 of a in each other's register.
extern "C" __global__ void product_bf16(const float* a, const float* b, float* d, int swapped) {
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    uint32_t a_fragment[4], b_fragment[2];
    float sums[4];
    for (int i = 0; i < 4; ++i) {
        const int row = g + (i % 2 != swapped ? 8 : 0), column = 2 * t + i / 2 * 8;
        a_fragment[i] = pair(a, row * 16 + column, row * 16 + column + 1);
    }
    for (int i = 0; i < 2; ++i) b_fragment[i] = pair(b, (2 * t + 8 * i) * 8 + g, (2 * t + 8 * i + 1) * 8 + g);
    for (int i = 0; i < 4; ++i) sums[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    mma_bf16(sums, a_fragment, b_fragment);
    for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

extern "C" __global__ void product_tf32(const float* a, const float* b, float* d, int swapped) {
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    uint32_t a_fragment[4], b_fragment[2];
    float sums[4];
    for (int i = 0; i < 4; ++i) a_fragment[i] = __float_as_uint(a[(g + (i % 2 != swapped ? 8 : 0)) * 8 + t + i / 2 * 4]);
    for (int i = 0; i < 2; ++i) b_fragment[i] = __float_as_uint(b[(t + 4 * i) * 8 + g]);
    for (int i = 0; i < 4; ++i) sums[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
    mma_tf32(sums, a_fragment, b_fragment);
    for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

// r of ldmatrix for N matrices of 8 x 8 numbers of 16 bits; offset: in bytes, of every row.
extern "C" __global__ void load_matrices(const unsigned* x, unsigned* out, int transposed, int n, int offset) {
    extern __shared__ __align__(16) unsigned char shared[];
    unsigned* words = reinterpret_cast<unsigned*>(shared);
    for (int i = 0; i < 4; ++i) words[threadIdx.x * 4 + i] = x[threadIdx.x * 4 + i];
    __syncwarp();
    const void* row = shared + 16 * threadIdx.x + offset;
    uint32_t r[4] = {}, half[2] = {};
    if (n == 4 && !transposed) ldmatrix_x4(r, row);
    if (n == 4 && transposed) ldmatrix_x4_trans(r, row);
    if (n == 2 && !transposed) ldmatrix_x2(half, row);
    if (n == 2 && transposed) ldmatrix_x2_trans(half, row);
    for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = n == 4 ? r[i] : i < 2 ? half[i] : 0;
}

extern "C" __global__ void load_global_matrix(const unsigned* x) {
    uint32_t r[4];
    ldmatrix_x4(r, x + 4 * threadIdx.x);
}

// Two groups of copies; out: what is in shared memory before a wait, after the first, after the second.
extern "C" __global__ void copies(const float* x, float* out) {
    extern __shared__ __align__(16) unsigned char shared[];
    float* s = reinterpret_cast<float*>(shared);
    for (int i = 0; i < 12; ++i) s[i] = -1.0f;
    cp_async_16(s, x, true);
    cp_async_commit();
    cp_async_16(s + 4, x + 4, true);
    cp_async_16(s + 8, x + 8, false);
    cp_async_commit();
    for (int i = 0; i < 12; ++i) out[i] = s[i];
    cp_async_wait<1>();
    for (int i = 0; i < 12; ++i) out[12 + i] = s[i];
    cp_async_wait<0>();
    for (int i = 0; i < 12; ++i) out[24 + i] = s[i];
}

extern "C" __global__ void copy_to(const float* x, int offset) {
    extern __shared__ __align__(16) unsigned char shared[];
    cp_async_16(shared + offset, x, true);
}

// ---- a correct kernel with each kind of synchronisation, and one barrier too many

// Each block reverses its numbers, each warp of it reverses them again, and they are added up in pairs.
extern "C" __global__ void __launch_bounds__(64) correct(const float* x, float* out) {
    extern __shared__ __align__(16) unsigned char shared[];
    float* s = reinterpret_cast<float*>(shared);  // 2 x 64
    const int i = threadIdx.x, last = blockDim.x - 1;
    x += blockIdx.x * blockDim.x;
    if (i < 16) cp_async_16(s + 4 * i, x + 4 * i, true);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    const float reversed = s[last - i];
    s[64 + i] = reversed;
    __syncwarp();
    const float again = s[64 + (i ^ 31)];
    __syncthreads();
    s[i] = again;
    sync_in_header();
    const float pair = s[i] + s[i ^ 1];
    __syncthreads();  // not needed
    out[blockIdx.x * blockDim.x + i] = pair + block_total(reversed);
}

// ---- mistakes

extern "C" __global__ void missing_barrier(const float* x, float* out) {
    __shared__ float s[64];
    s[threadIdx.x] = x[threadIdx.x];
    out[threadIdx.x] = s[63 - threadIdx.x];  // reads what another thread writes
}

extern "C" __global__ void missing_syncwarp(const float* x, float* out) {
    __shared__ float s[32];
    s[threadIdx.x] = x[threadIdx.x];
    const float same = __shfl_xor_sync(ALL, x[threadIdx.x], 0);  // a shuffle orders no memory
    out[threadIdx.x] = s[31 - threadIdx.x] + same;
}

extern "C" __global__ void same_output_of_all_blocks(float* out) { out[threadIdx.x] = 1.0f + blockIdx.x; }

// The copy may arrive while other threads still read what was there before: they are ordered before the wait only.
extern "C" __global__ void copy_too_early(const float* x, float* out) {
    __shared__ __align__(16) float s[128];
    const int i = threadIdx.x;
    if (i < 32) cp_async_16(s + 4 * i, x + 4 * i, true);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    out[i] = s[127 - i];
    if (i < 32) cp_async_16(s + 4 * i, x + 4 * i, true);  // a barrier is missing before
    cp_async_commit();
    __syncthreads();
    cp_async_wait<0>();
    __syncthreads();
    out[i] += s[i];
}

// Right only if the blocks run one after the other.
extern "C" __global__ void from_block_to_block(int* out) {
    if (threadIdx.x == 0) out[blockIdx.x + 1] = out[blockIdx.x] + 1;
}

extern "C" __global__ void read_outside(const float* x, float* out, int i) { out[0] = x[i]; }

extern "C" __global__ void read_outside_dynamic(float* out, int i) {
    extern __shared__ __align__(16) unsigned char shared[];
    float* s = reinterpret_cast<float*>(shared);
    s[0] = 1.0f;
    out[0] = s[i];
}

extern "C" __global__ void read_outside_static(float* out, int i) {
    __shared__ float s[6];
    s[0] = 1.0f;
    out[0] = s[i];
}

extern "C" __global__ void misaligned(const float* x, float* out, int i) {
    out[0] = reinterpret_cast<const float4*>(x + i)->y;
}

extern "C" __global__ void overflow(int x, int* out) { out[0] = x + 1; }

extern "C" __global__ void write_null(float* out) { out[0] = 1.0f; }

extern "C" __global__ void different_barriers(int n) {
    if (static_cast<int>(threadIdx.x) < n)
        __syncthreads();  // first
    else
        __syncthreads();  // second
}

extern "C" __global__ void ended_before_barrier(int n) {
    if (static_cast<int>(threadIdx.x) < n) return;
    __syncthreads();  // the others wait here
}

extern "C" __global__ void barrier_or_shuffle(float* out) {
    if (threadIdx.x < 16)
        __syncthreads();  // half a warp
    else
        out[threadIdx.x] = __shfl_sync(ALL, 1.0f, 0);  // the other half
}

extern "C" __global__ void different_shuffles(float* out) {
    if (threadIdx.x < 16)
        out[threadIdx.x] = __shfl_sync(ALL, 1.0f, 0);
    else
        out[threadIdx.x] = __shfl_sync(ALL, 2.0f, 0);
}

extern "C" __global__ void half_mask(float* out) { out[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 0); }

// ---- what the preprocessor leaves out

#ifdef NEVER
extern "C" __global__ void never() { __syncthreads(); }
#endif
/* extern "C" __global__ void commented_out() { __syncthreads(); } */
