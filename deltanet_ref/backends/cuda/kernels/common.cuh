// What all kernels share: conversion of activations to and from float32, accesses of several values at once, sums and
// maxima over a warp or a block, and the sigmoid with its complement.
//
// Every sum runs in one fixed order, so results have the same bits in every run.
#pragma once

#include <cuda_bf16.h>

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// ---- conversion: bfloat16 is read exactly and written with one rounding, to nearest even

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

// ---- N neighbouring values as one access of N sizeof(T) bytes (several of 16 bytes where that is more)

template <class T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
    T value[N];
    __device__ __forceinline__ float operator[](int i) const { return to_float(value[i]); }
    __device__ __forceinline__ void set(int i, float x) { value[i] = from_float<T>(x); }
};

// p must be aligned to the size of the access.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* p) { return *reinterpret_cast<const Pack<T, N>*>(p); }

template <int N, class T>
__device__ __forceinline__ void store(T* p, const Pack<T, N>& values) { *reinterpret_cast<Pack<T, N>*>(p) = values; }

template <class T, int N>
__device__ __forceinline__ Pack<T, N> zeros() {
    Pack<T, N> values;
#pragma unroll
    for (int i = 0; i < N; ++i) values.set(i, 0.0f);
    return values;
}

// ---- sums and maxima; every thread gets the result

// Over each group of SIZE neighbouring lanes: 2, 4, 8, 16 or all 32 of the warp.
template <int SIZE = WARP>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int other = SIZE / 2; other > 0; other /= 2) x += __shfl_xor_sync(ALL_LANES, x, other);
    return x;
}

template <int SIZE = WARP>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int other = SIZE / 2; other > 0; other /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, other));
    return x;
}

// Over the COUNT warps of a block. scratch: COUNT floats in shared memory, which no thread may write again before the
// next barrier.
template <int COUNT>
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();  // the sums of all warps are in scratch
    float total = scratch[0];
#pragma unroll
    for (int warp = 1; warp < COUNT; ++warp) total += scratch[warp];
    return total;
}

template <int COUNT>
__device__ __forceinline__ float block_max(float x, float* scratch) {
    x = warp_max(x);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();  // the maxima of all warps are in scratch
    float most = scratch[0];
#pragma unroll
    for (int warp = 1; warp < COUNT; ++warp) most = fmaxf(most, scratch[warp]);
    return most;
}

// ---- elementary functions

// sigmoid(x) [gate.1] and 1 - sigmoid(x), each accurate to its last bits: neither is a difference of near numbers.
struct Sigmoid {
    float value, complement;
};

__device__ __forceinline__ Sigmoid sigmoid(float x) {
    const float e = expf(-fabsf(x)), larger = 1.0f / (1.0f + e), smaller = e * larger;
    return x >= 0.0f ? Sigmoid{larger, smaller} : Sigmoid{smaller, larger};
}

// SiLU(x) = x sigmoid(x) [gate.3] and its derivative [gate.4], from s = sigmoid(x).
__device__ __forceinline__ float silu(float x, Sigmoid s) { return x * s.value; }
__device__ __forceinline__ float silu_derivative(float x, Sigmoid s) { return s.value * fmaf(x, s.complement, 1.0f); }
