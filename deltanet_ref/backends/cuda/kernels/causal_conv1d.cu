// Causal depthwise convolution, then SiLU, with carried state and packed sequences [conv.1..7].
// Definition: ops/causal_conv1d.py.
//
// Design   a thread computes VECTOR channels of a run of tokens, with the last K inputs in registers; the K - 1 tokens
//          before a run are read again, by then from the L2 cache. Runs are numbered by blockIdx.y; where sequences end
//          is found by a search in cu_seqlens, so the launch depends on sizes only. Blocks beyond the last run do the
//          states, one sequence each. Backward computes the convolution again instead of reading it (as many bytes)
//          and, for the K - 1 tokens after its run, dc again. dw is summed over the run in registers and then by
//          column_sums.cu, so its runs are longer.
// Floors   8192 tokens, 6144 channels (0.8B) in bfloat16, at 2.94 TB/s: forward 201 MB  69 us, backward 302 MB  103 us.
//          By count about 35 and 55 instructions an element, so 60 and 95 us of an H100's issue slots: if a measurement
//          is above the floor, look there first. Registers (93 and 160) allow 5 and 3 blocks on a multiprocessor.
// Versions this one
// Macros   REAL; VECTOR: 16 bytes of REAL, or 1; TAPS = K
#include "common.cuh"

constexpr int THREADS = 128;
constexpr int PAST = TAPS - 1;  // inputs before a token that it reads
constexpr int WIDE = VECTOR * TAPS % 4 == 0 ? 4 : 1;  // floats of one access to a thread's taps

// A packed sequence: tokens start .. end - 1.
struct Sequence {
    int n, start, end;
};

// The sequence of token t: the last one that starts at or before it (empty ones, which start there too, come first).
__device__ __forceinline__ Sequence sequence_of(int t, const int* cu_seqlens, int count) {
    int n = 0, beyond = count;  // cu_seqlens[n] <= t < cu_seqlens[beyond]
    while (beyond - n > 1) {
        const int middle = (n + beyond) / 2;
        if (cu_seqlens[middle] <= t)
            n = middle;
        else
            beyond = middle;
    }
    return {n, cu_seqlens[n], cu_seqlens[n + 1]};
}

// Where the inputs of a sequence are; the K - 1 tokens before its start are its state.
struct Inputs {
    const REAL *x, *state;  // this thread's channels of (T, channels), (count, K - 1, channels) or null for zeros
    int channels;

    __device__ __forceinline__ Pack<REAL, VECTOR> at(const Sequence& sequence, int t) const {
        if (t >= sequence.start) return load<VECTOR>(x + (long long)t * channels);
        if (!state) return zeros<REAL, VECTOR>();
        return load<VECTOR>(state + ((long long)sequence.n * PAST + PAST + t - sequence.start) * channels);
    }
};

// Values of this thread's channels at K neighbouring tokens; [0] is the oldest.
struct Window {
    float value[TAPS][VECTOR];

    __device__ __forceinline__ void push(const Pack<REAL, VECTOR>& newest) {
        shift();
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) value[PAST][j] = newest[j];
    }
    __device__ __forceinline__ void shift() {
#pragma unroll
        for (int i = 0; i < PAST; ++i)
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) value[i][j] = value[i + 1][j];
    }
};

struct Taps {
    float value[VECTOR][TAPS];

    // w of this thread's channels: VECTOR K floats
    __device__ __forceinline__ void read(const float* w) {
        float* flat = &value[0][0];
#pragma unroll
        for (int i = 0; i < VECTOR * TAPS; i += WIDE) {
            const Pack<float, WIDE> part = load<WIDE>(w + i);
#pragma unroll
            for (int j = 0; j < WIDE; ++j) flat[i + j] = part[j];
        }
    }

    // c = sum_i w_i x_{t - (K-1) + i} [conv.2]
    __device__ __forceinline__ float convolve(const Window& x, int j) const {
        float c = 0.0f;
#pragma unroll
        for (int i = 0; i < TAPS; ++i) c = fmaf(value[j][i], x.value[i][j], c);
        return c;
    }

    // dx_t = sum_i w_i dc_{t + (K-1) - i} [conv.5]; dc holds tokens t .. t + K - 1
    __device__ __forceinline__ float convolve_backward(const Window& dc, int j) const {
        float dx = 0.0f;
#pragma unroll
        for (int i = 0; i < TAPS; ++i) dx = fmaf(value[j][i], dc.value[PAST - i][j], dx);
        return dx;
    }
};

// The inputs t - (K-1) .. t - 1, at [1] .. [K-1]: push(x_t) makes it the window of t.
__device__ __forceinline__ Window inputs_before(int t, const Inputs& inputs, const Sequence& sequence) {
    Window window = {};
#pragma unroll
    for (int i = 0; i < PAST; ++i) window.push(inputs.at(sequence, t - PAST + i));
    return window;
}

__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }

// x, y (T, channels); state, state_end (count, K - 1, channels), state null for zeros; w (channels, K);
// cu_seqlens (count + 1,); grid (channels / (VECTOR THREADS), runs + count), runs of `run` tokens
extern "C" __global__ void __launch_bounds__(THREADS, 1)
causal_conv1d_forward(const REAL* __restrict__ x, const float* __restrict__ w, const REAL* __restrict__ state,
                      const int* __restrict__ cu_seqlens, int count, int T, int channels, int run, int runs,
                      REAL* __restrict__ y, REAL* __restrict__ state_end) {
    const int channel = (blockIdx.x * THREADS + threadIdx.x) * VECTOR;
    if (channel >= channels) return;
    const Inputs inputs = {x + channel, state ? state + channel : nullptr, channels};
    if (blockIdx.y >= runs) {  // the last K - 1 inputs of a sequence
        const int n = blockIdx.y - runs;
        const Sequence sequence = {n, cu_seqlens[n], cu_seqlens[n + 1]};
        for (int i = 0; i < PAST; ++i)
            store(state_end + ((long long)n * PAST + i) * channels + channel,
                  inputs.at(sequence, sequence.end - PAST + i));
        return;
    }
    Taps taps;
    taps.read(w + (long long)channel * TAPS);
    const int first = blockIdx.y * run, last = smaller(first + run, T);
    for (int begin = first; begin < last;) {
        const Sequence sequence = sequence_of(begin, cu_seqlens, count);
        const int end = smaller(sequence.end, last);
        Window window = inputs_before(begin, inputs, sequence);  // 1  the sequence after its state
#pragma unroll 2
        for (int t = begin; t < end; ++t) {
            window.push(load<VECTOR>(x + (long long)t * channels + channel));
            Pack<REAL, VECTOR> y_t;
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                const float c = taps.convolve(window, j);  // 2  c_t = sum_i w_i padded_{t+i}
                y_t.set(j, silu(c, sigmoid(c)));           // 3  y = SiLU(c)
            }
            store(y + (long long)t * channels + channel, y_t);
        }
        begin = end;
    }
}

// The gradients of inputs first .. last - 1 of one sequence; those before its start are its state's.
struct Backward {
    const REAL *dy, *dstate_end;  // this thread's channels; dstate_end null for zeros
    REAL *dx, *dstate;
    Inputs inputs;
    Taps taps;
    float dw[VECTOR][TAPS];

    __device__ __forceinline__ void segment(const Sequence& sequence, int first, int last) {
        const int channels = inputs.channels;
        const int begin = first < sequence.start ? sequence.start : first;
        const int end = smaller(last + PAST, sequence.end);  // the tokens that read these inputs end here
        Window x = inputs_before(begin, inputs, sequence), dc = {};
        for (int t = begin; t < last + PAST; ++t) {
            dc.shift();
            if (t < end) {
                x.push(load<VECTOR>(inputs.x + (long long)t * channels));
                const Pack<REAL, VECTOR> dy_t = load<VECTOR>(dy + (long long)t * channels);
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) {
                    // 3  y = SiLU(c)
                    const float c = taps.convolve(x, j);
                    const float dc_t = dy_t[j] * silu_derivative(c, sigmoid(c));
                    dc.value[PAST][j] = dc_t;
                    if (t < last) {  // a token of this run: the next run counts the others
#pragma unroll
                        for (int i = 0; i < TAPS; ++i) dw[j][i] = fmaf(dc_t, x.value[i][j], dw[j][i]);
                    }
                }
            } else {  // after the sequence
#pragma unroll
                for (int j = 0; j < VECTOR; ++j) dc.value[PAST][j] = 0.0f;
            }
            if (t - PAST >= first) write(sequence, t - PAST, dc);
        }
    }

    // 2  c_t = sum_i w_i padded_{t+i}; state_end = the last K-1 of padded.   1  padded = state, then the sequence
    __device__ __forceinline__ void write(const Sequence& sequence, int t, const Window& dc) const {
        const long long channels = inputs.channels, state = (long long)sequence.n * PAST;
        const int kept = t - (sequence.end - PAST);  // its place in state_end, if not negative
        Pack<REAL, VECTOR> dkept = zeros<REAL, VECTOR>(), dx_t;
        if (kept >= 0 && dstate_end) dkept = load<VECTOR>(dstate_end + (state + kept) * channels);
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) dx_t.set(j, taps.convolve_backward(dc, j) + dkept[j]);
        store(t >= sequence.start ? dx + t * channels : dstate + (state + PAST + t - sequence.start) * channels, dx_t);
    }
};

// dy, x, dx (T, channels); dstate_end (or null for zeros), state (likewise), dstate (count, K - 1, channels);
// dw_parts (runs, channels, K), null without dw; grid as above
extern "C" __global__ void __launch_bounds__(THREADS)
causal_conv1d_backward(const REAL* __restrict__ dy, const REAL* __restrict__ dstate_end, const REAL* __restrict__ x,
                       const float* __restrict__ w, const REAL* __restrict__ state,
                       const int* __restrict__ cu_seqlens, int count, int T, int channels, int run, int runs,
                       REAL* __restrict__ dx, REAL* __restrict__ dstate, float* __restrict__ dw_parts) {
    const int channel = (blockIdx.x * THREADS + threadIdx.x) * VECTOR;
    if (channel >= channels) return;
    Backward backward = {dy + channel,
                         dstate_end ? dstate_end + channel : nullptr,
                         dx + channel,
                         dstate + channel,
                         {x + channel, state ? state + channel : nullptr, channels},
                         {},
                         {}};
    backward.taps.read(w + (long long)channel * TAPS);
    if (blockIdx.y >= runs) {
        const int n = blockIdx.y - runs;
        const Sequence sequence = {n, cu_seqlens[n], cu_seqlens[n + 1]};
        backward.segment(sequence, sequence.start - PAST, sequence.start);
        return;
    }
    const int first = blockIdx.y * run, last = smaller(first + run, T);
    for (int begin = first; begin < last;) {
        const Sequence sequence = sequence_of(begin, cu_seqlens, count);
        const int end = smaller(sequence.end, last);
        backward.segment(sequence, begin, end);
        begin = end;
    }
    if (dw_parts) {
        float* part = dw_parts + ((long long)blockIdx.y * channels + channel) * TAPS;
        const float* dw = &backward.dw[0][0];
#pragma unroll
        for (int i = 0; i < VECTOR * TAPS; i += WIDE) {
            Pack<float, WIDE> values;
#pragma unroll
            for (int j = 0; j < WIDE; ++j) values.set(j, dw[i + j]);
            store(part + i, values);
        }
    }
}
