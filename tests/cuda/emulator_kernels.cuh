// Included by emulator_kernels.cu.
#pragma once

__device__ __forceinline__ void sync_in_header() {
    __syncthreads();  // line 5
}

// The sum of x over the threads of a block of 64.
__device__ __forceinline__ float block_total(float x) {
    __shared__ float sums[2];
    for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();  // line 13
    return sums[0] + sums[1];
}
