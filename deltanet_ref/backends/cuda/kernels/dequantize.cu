// Tensors in the bytes of a GGUF file, decoded: Q8_0 Q4_0 Q4_K Q5_K Q6_K, and F16 BF16 F32 converted.
//
// Layouts: github.com/ggml-org/ggml, the block_* structs of src/ggml-common.h; backends/numba_cpu/quants.py describes
// them in the same terms. A value is (d scale) number - m minimum.
//
// Design. Each thread decodes 8 neighbouring values, so that a
// warp writes 256 neighbouring values and reads their bytes once; scales come from the L1 cache. Blocks start at even
// addresses only, so bytes are read in pairs.
//
// The float32 values are those of formats/quants.py to the bit, also where the compiler contracts a product and a
// difference to one fused operation: d is a float16 (11 bits), scales have at most 7 bits and numbers at most 5 beyond
// powers of two, so that d scale number is exact in 24 bits, as is m minimum, and only the difference is rounded.
// bfloat16 values are the float32 ones rounded once.
//
// Floor for a tensor of 3584 x 1024 (2.06 MB as Q4_K) to bfloat16 (7.34 MB): 3.2 us at 2.94 TB/s; the product with 8192
// tokens that follows takes 80 us at 747 TFLOP/s. Not measured.
//
// Versions: one entry point per type. Macros: REAL, the type of the result; THREADS.
#include "common.cuh"

constexpr int WIDTH = 8;  // values of a thread

using Byte = unsigned char;
using Bits16 = unsigned short;

__device__ __forceinline__ unsigned pair_at(const Byte* p) { return *reinterpret_cast<const Bits16*>(p); }

struct Bytes {
    unsigned value[WIDTH];
};
__device__ __forceinline__ Bytes bytes_at(const Byte* p) {
    Bytes x;
#pragma unroll
    for (int i = 0; i < WIDTH; i += 2) {
        const unsigned both = pair_at(p + i);
        x.value[i] = both & 255;
        x.value[i + 1] = both >> 8;
    }
    return x;
}

__device__ __forceinline__ int as_signed(unsigned byte) { return static_cast<int>(byte ^ 128) - 128; }

// A float16 from its bits; every one of them is a float32 number.
__device__ __forceinline__ float half_to_float(unsigned bits) {
    const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 0) {                                                 // zero or subnormal: mantissa 2^-24
        const float size = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
        return sign ? -size : size;
    }
    const unsigned bias = exponent == 31 ? 255 : exponent + 112;         // infinity and NaN stay what they are
    return __uint_as_float(sign | bias << 23 | mantissa << 13);
}

__device__ __forceinline__ float bfloat_to_float(unsigned bits) { return __uint_as_float(bits << 16); }

// ---- the types. decode: values WIDTH part .. WIDTH (part + 1) - 1 of a block

struct Q8_0 {
    static constexpr int VALUES = 32, BYTES = 34;  // d: 2, numbers: 32 signed bytes
    static __device__ __forceinline__ void decode(const Byte* block, int part, float (&y)[WIDTH]) {
        const float d = half_to_float(pair_at(block));
        const Bytes q = bytes_at(block + 2 + WIDTH * part);
        for (int i = 0; i < WIDTH; ++i) y[i] = d * as_signed(q.value[i]);
    }
};

struct Q4_0 {
    static constexpr int VALUES = 32, BYTES = 18;  // d: 2, numbers + 8: 16 lower nibbles, then the upper ones
    static __device__ __forceinline__ void decode(const Byte* block, int part, float (&y)[WIDTH]) {
        const float d = half_to_float(pair_at(block));
        const Bytes q = bytes_at(block + 2 + part % 2 * WIDTH);
        for (int i = 0; i < WIDTH; ++i) y[i] = d * (static_cast<int>(q.value[i] >> part / 2 * 4 & 15) - 8);
    }
};

// In the K types a byte holds bits of numbers that are 32 apart; part / 4 counts groups of 32.

// d scale and m minimum of a group of 32, from 8 scales and 8 minima of 6 bits. The first 4 of each are whole in 4
// bytes; of the last 4 the lower 4 bits are in 4 bytes more, and the upper 2 above those whole ones.
struct ScaleAndMinimum {
    float scale, minimum;
};
__device__ __forceinline__ ScaleAndMinimum six_bits_each(const Byte* block, int group) {
    const Byte* scales = block + 4;
    unsigned scale, minimum;
    if (group < 4) {
        scale = scales[group] & 63;
        minimum = scales[group + 4] & 63;
    } else {
        scale = (scales[group + 4] & 15) | scales[group - 4] >> 6 << 4;
        minimum = scales[group + 4] >> 4 | scales[group] >> 6 << 4;
    }
    return {half_to_float(pair_at(block)) * scale, half_to_float(pair_at(block + 2)) * minimum};
}

struct Q4_K {
    static constexpr int VALUES = 256, BYTES = 144;  // d: 2, m: 2, scales and minima: 12, nibbles: 128
    static __device__ __forceinline__ void decode(const Byte* block, int part, float (&y)[WIDTH]) {
        const int group = part / 4;
        const ScaleAndMinimum of = six_bits_each(block, group);
        const Bytes q = bytes_at(block + 16 + group / 2 * 32 + part % 4 * WIDTH);
        for (int i = 0; i < WIDTH; ++i) y[i] = of.scale * (q.value[i] >> group % 2 * 4 & 15) - of.minimum;
    }
};

struct Q5_K {
    static constexpr int VALUES = 256, BYTES = 176;  // d: 2, m: 2, scales and minima: 12, fifth bits: 32, nibbles: 128
    static __device__ __forceinline__ void decode(const Byte* block, int part, float (&y)[WIDTH]) {
        const int group = part / 4, within = part % 4 * WIDTH;
        const ScaleAndMinimum of = six_bits_each(block, group);
        const Bytes fifth = bytes_at(block + 16 + within), q = bytes_at(block + 48 + group / 2 * 32 + within);
        for (int i = 0; i < WIDTH; ++i) {
            const unsigned number = (q.value[i] >> group % 2 * 4 & 15) | (fifth.value[i] >> group & 1) << 4;
            y[i] = of.scale * number - of.minimum;
        }
    }
};

struct Q6_K {
    static constexpr int VALUES = 256, BYTES = 210;  // lower 4 bits: 128, upper 2: 64, scales: 16 signed bytes, d: 2
    static __device__ __forceinline__ void decode(const Byte* block, int part, float (&y)[WIDTH]) {
        const int half = part / 16, quarter = part / 4 % 4, within = part % 4 * WIDTH;
        const float scale = half_to_float(pair_at(block + 208)) * as_signed(block[192 + part / 2]);
        const Bytes lower = bytes_at(block + half * 64 + quarter % 2 * 32 + within);
        const Bytes upper = bytes_at(block + 128 + half * 32 + within);
        for (int i = 0; i < WIDTH; ++i) {
            const unsigned number = (lower.value[i] >> quarter / 2 * 4 & 15) | (upper.value[i] >> quarter * 2 & 3) << 4;
            y[i] = scale * (static_cast<int>(number) - 32);
        }
    }
};

// y (n,), n a multiple of the block's values
template <class Type>
__device__ __forceinline__ void dequantize(const Byte* raw, REAL* y, long long n) {
    const long long at = (static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x) * WIDTH;
    if (at >= n) return;
    float values[WIDTH];
    Type::decode(raw + at / Type::VALUES * Type::BYTES, static_cast<int>(at % Type::VALUES / WIDTH), values);
    Pack<REAL, WIDTH> results;
    for (int i = 0; i < WIDTH; ++i) results.set(i, values[i]);
    store(y + at, results);
}

// y (n,), any n; f converts one stored number
template <class Stored, class F>
__device__ __forceinline__ void convert(const Stored* raw, REAL* y, long long n, F f) {
    const long long at = (static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x) * WIDTH;
    for (long long i = at; i < min(at + WIDTH, n); ++i) y[i] = from_float<REAL>(f(raw[i]));
}

// ---- entry points. grid: ceil(n / (WIDTH THREADS))

extern "C" __global__ void __launch_bounds__(THREADS) dequantize_q8_0(const Byte* raw, REAL* y, long long n) {
    dequantize<Q8_0>(raw, y, n);
}

extern "C" __global__ void __launch_bounds__(THREADS) dequantize_q4_0(const Byte* raw, REAL* y, long long n) {
    dequantize<Q4_0>(raw, y, n);
}

extern "C" __global__ void __launch_bounds__(THREADS) dequantize_q4_k(const Byte* raw, REAL* y, long long n) {
    dequantize<Q4_K>(raw, y, n);
}

extern "C" __global__ void __launch_bounds__(THREADS) dequantize_q5_k(const Byte* raw, REAL* y, long long n) {
    dequantize<Q5_K>(raw, y, n);
}

extern "C" __global__ void __launch_bounds__(THREADS) dequantize_q6_k(const Byte* raw, REAL* y, long long n) {
    dequantize<Q6_K>(raw, y, n);
}

extern "C" __global__ void __launch_bounds__(THREADS) dequantize_f16(const Bits16* raw, REAL* y, long long n) {
    convert(raw, y, n, [](Bits16 x) { return half_to_float(x); });
}

extern "C" __global__ void __launch_bounds__(THREADS) dequantize_bf16(const Bits16* raw, REAL* y, long long n) {
    convert(raw, y, n, [](Bits16 x) { return bfloat_to_float(x); });
}

extern "C" __global__ void __launch_bounds__(THREADS) dequantize_f32(const float* raw, REAL* y, long long n) {
    convert(raw, y, n, [](float x) { return x; });
}
