// CUDA on a CPU: a header that g++ (C++17) compiles unchanged kernels against. docs/cuda-on-cpu.md is its manual.
//
// Blocks run one after the other, each thread of a block as a fiber. A fiber runs until it waits: at a barrier or at an
// operation of its warp (shuffle, ballot, ldmatrix, mma). The last one to arrive does the operation for all.
//
//   order        natural order of blocks, warps and lanes, or permuted by a seed: a race shows as other numbers
//   shared       arrays in shared memory are filled with 0xff (NaN) when a block starts
//   divergence   threads that wait at different places, or forever, end the launch with a message that names the lines
//   sites        every barrier and cp.async wait is known by file and line and can be switched off for a launch
//
// With -fsanitize=thread, ThreadSanitizer sees each CUDA thread as a thread of its own that only barriers order, and the
// blocks as not ordered at all. With -fsanitize=address each shared array ends where it should.
#pragma once

#include <math.h>
#include <stdarg.h>

#include <utility>

#include "fiber.h"

// ---- words of the language. Arrays in shared memory are declared through build.py (shared_memory below).

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#undef __noinline__
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#ifndef __restrict__
#define __restrict__ __restrict
#endif

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
    unsigned x, y, z;
};

#define EMULATOR_VECTOR2(NAME, T)                           \
    struct alignas(2 * sizeof(T)) NAME {                    \
        T x, y;                                             \
    };                                                      \
    static inline NAME make_##NAME(T x, T y) { return {x, y}; }
#define EMULATOR_VECTOR4(NAME, T)                           \
    struct alignas(4 * sizeof(T)) NAME {                    \
        T x, y, z, w;                                       \
    };                                                      \
    static inline NAME make_##NAME(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTOR2(float2, float)
EMULATOR_VECTOR2(int2, int)
EMULATOR_VECTOR2(uint2, unsigned)
EMULATOR_VECTOR4(float4, float)
EMULATOR_VECTOR4(int4, int)
EMULATOR_VECTOR4(uint4, unsigned)

static uint3 blockIdx;
static dim3 blockDim, gridDim;
static const int warpSize = 32;
#define threadIdx (::emulator::current->index)

namespace emulator {

const int WARP = 32, MOST_THREADS = 1024, MOST_WARPS = MOST_THREADS / WARP, MOST_SHARED = 227 << 10;

// ---- state: the threads of the running block

struct Place {
    const char* kind;  // "__syncthreads"; null: not waiting
    const char* file;
    int line;
};

EMULATOR_QUIET static bool same_line(const Place& a, const Place& b) {
    return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0);
}

struct Copy {  // a cp.async that has not been delivered
    void* to;
    const void* from;  // null: zeros
    int group;
};

struct Warp;

struct Thread {
    Fiber fiber;
    uint3 index;
    int number, lane;  // number: x runs fastest
    Warp* warp;
    Place waits;
    void* operand;  // of the operation that the warp waits for
    Copy* copies;   // the oldest first
    int copies_size, copies_capacity, group;  // group: the number of groups committed
};

using Combine = void (*)(void** operands);  // does an operation for a whole warp; operands of absent lanes are null

struct Warp {
    Thread* threads;
    int size, live, arrived;
    Place place;
    Combine combine;
    unsigned char order[WARP];  // lanes that can go on, in this order, from `taken` to `ready`
    int taken, ready;
    unsigned generation;
    char ordered[2];  // for ThreadSanitizer: see barrier()
};

struct Slot;

struct Block {
    Thread threads[MOST_THREADS];
    Warp warps[MOST_WARPS];
    int size, warp_count, live, arrived;
    Place place;
    unsigned generation;
    char ordered[2];
    unsigned serial;  // of the block in the process, from 1
    char* shared;
    size_t shared_bytes;
    Slot* slots;  // static arrays in use
};

// Two sets of threads, of even and odd blocks, so that ThreadSanitizer takes neighbours for different threads.
static Block* blocks[2];
static Block* block;
static Thread* current;  // the running thread
static Warp* running_warp;
static unsigned ready_warps;  // a bit for each warp with ready lanes
static Fiber launcher;
static unsigned serial;
#if EMULATOR_THREAD
static void* own_identities[2 * MOST_THREADS];
static void** identities = own_identities;  // to ThreadSanitizer, made once: it has 8128, and 0.7 ms go into each
#endif

struct Launch {
    void (*run)(void** arguments);
    void** arguments;
    uint64_t random;  // 0: natural order
    Place off;
    char* message;  // of the failure
    size_t message_size;
    char start, end;  // for ThreadSanitizer: the launching thread before and after all threads
};
static Launch launch;

// ---- what ThreadSanitizer is told about the order of threads

EMULATOR_QUIET static void release(void* object) {
#if EMULATOR_THREAD
    __tsan_release(object);
#endif
    (void)object;
}
EMULATOR_QUIET static void acquire(void* object) {
#if EMULATOR_THREAD
    __tsan_acquire(object);
#endif
    (void)object;
}

// ---- failure: the launch ends, its threads are abandoned

[[noreturn]] EMULATOR_QUIET static void fail(const char* format, ...) {
    ignore_thread(true);
    va_list list;
    va_start(list, format);
    vsnprintf(launch.message, launch.message_size, format, list);
    va_end(list);
    ignore_thread(false);
    switch_fiber(&current->fiber, &launcher);
    abort();
}

// Where the threads of the block are: "divergent: 32 threads wait in __syncthreads at a.cu:7; ...".
[[noreturn]] EMULATOR_QUIET static void divergent() {
    char text[2000];
    ignore_thread(true);
    size_t length = snprintf(text, sizeof text, "divergent threads in block (%u, %u, %u): %d have ended", blockIdx.x,
                             blockIdx.y, blockIdx.z, block->size - block->live);
    for (int i = 0; i < block->size; ++i) {
        const Place& place = block->threads[i].waits;
        if (place.kind == nullptr) continue;
        int same = 0;
        bool first = true;
        for (int j = 0; j < block->size; ++j) {
            const Place& other = block->threads[j].waits;
            if (other.kind == nullptr || !same_line(place, other)) continue;
            first = first && j >= i;
            ++same;
        }
        if (first && length < sizeof text - 200)
            length += snprintf(text + length, sizeof text - length, ", %d wait in %s at %s:%d (the first is thread %d)",
                               same, place.kind, place.file, place.line, block->threads[i].number);
    }
    ignore_thread(false);
    fail("%s", text);
}

// ---- who runs next

EMULATOR_QUIET static unsigned random_below(unsigned n) {
    launch.random ^= launch.random << 13;
    launch.random ^= launch.random >> 7;
    launch.random ^= launch.random << 17;
    return static_cast<unsigned>(launch.random >> 33) % n;
}

// Lanes of a warp, all but the running one, can go on.
EMULATOR_QUIET static void make_ready(Warp* warp, const Thread* running) {
    int n = 0;
    for (int lane = 0; lane < warp->size; ++lane)
        if (warp->threads + lane != running) warp->order[n++] = static_cast<unsigned char>(lane);
    if (launch.random != 0)
        for (int i = n - 1; i > 0; --i) {
            const unsigned j = random_below(i + 1);
            const unsigned char lane = warp->order[i];
            warp->order[i] = warp->order[j];
            warp->order[j] = lane;
        }
    warp->taken = 0;
    warp->ready = n;
    if (n > 0) ready_warps |= 1u << (warp - block->warps);
}

// The next thread, null if all wait or have ended. The running warp goes on while it can: its stacks are in the cache.
EMULATOR_QUIET static Thread* take() {
    if (ready_warps == 0) return nullptr;
    Warp* warp = running_warp;
    if (launch.random != 0 && random_below(4) == 0) {
        unsigned skip = random_below(__builtin_popcount(ready_warps)), left = ready_warps;
        while (skip-- > 0) left &= left - 1;
        warp = block->warps + __builtin_ctz(left);
    } else if (warp->taken == warp->ready) {
        const unsigned at = warp - block->warps, later = at == 31 ? 0 : ready_warps & (~0u << (at + 1));
        warp = block->warps + __builtin_ctz(later != 0 ? later : ready_warps);
    }
    running_warp = warp;
    Thread* thread = warp->threads + warp->order[warp->taken++];
    if (warp->taken == warp->ready) ready_warps &= ~(1u << (warp - block->warps));
    return thread;
}

static void run_threads();

// The running thread waits, others run. Returns when somebody has made it ready.
EMULATOR_QUIET static void wait() {
    Thread *me = current, *next = take();
    if (next == nullptr) divergent();
    if (!next->fiber.started) prepare(&next->fiber, run_threads);
    current = next;
    switch_fiber(&me->fiber, &next->fiber);
}

// The entry of a fiber: the kernel for one thread, and on the same stack for others that have not started.
EMULATOR_QUIET static void run_threads() {
#if EMULATOR_ADDRESS
    arrived(nullptr);
#endif
    for (;;) {
        acquire(&launch.start);
        launch.run(launch.arguments);
        Thread* me = current;
        release(&launch.end);
        --block->live;
        --me->warp->live;
        if (block->arrived > 0 || me->warp->arrived > 0) divergent();
        Thread* next = take();
        if (next == nullptr && block->live > 0) divergent();
        if (!EMULATOR_THREAD && next != nullptr && !next->fiber.started) {
            hand_over(&me->fiber, &next->fiber);
            current = next;
            continue;
        }
        retire(&me->fiber);
        if (next != nullptr) {
            if (!next->fiber.started) prepare(&next->fiber, run_threads);
            current = next;
        }
        switch_fiber(&me->fiber, next != nullptr ? &next->fiber : &launcher, true);
    }
}

// ---- sites: barriers and waits, by file and line

const int MOST_SITES = 512;
static Place sites[MOST_SITES];  // those that were reached, in a hash table

EMULATOR_QUIET static void mark(const Place& place) {
    for (unsigned i = static_cast<unsigned>(place.line) * 7 % MOST_SITES, n = 0; n < MOST_SITES; ++n, i = (i + 1) % MOST_SITES) {
        if (sites[i].kind == nullptr) sites[i] = place;
        if (sites[i].file == place.file && sites[i].line == place.line && sites[i].kind == place.kind) return;
    }
}

EMULATOR_QUIET static bool switched_off(const Place& place) {
    return launch.off.line == place.line && launch.off.line != 0 && strcmp(launch.off.file, place.file) == 0;
}

// ---- barriers
//
// To ThreadSanitizer a thread releases an object before it waits and acquires it when it goes on: after the barrier it
// has seen what all did before. Two objects in turn: with a single one, a thread that reaches the next barrier would
// release it while others have not yet acquired it for this one, and they would seem to be ordered after all that the
// first one did in between.

EMULATOR_QUIET static void sync_threads(const char* file, int line) {
    const Place place{"__syncthreads", file, line};
    mark(place);
    if (switched_off(place)) return;
    Thread* me = current;
    me->waits = place;
    if (block->live < block->size) divergent();
    if (block->arrived == 0) block->place = place;
    if (!same_line(block->place, place)) divergent();
    char* object = &block->ordered[block->generation % 2];
    release(object);
    if (++block->arrived == block->size) {
        block->arrived = 0;
        ++block->generation;
        for (int i = 0; i < block->warp_count; ++i) make_ready(block->warps + i, me);
    } else {
        wait();
    }
    acquire(object);
    me->waits.kind = nullptr;
}

// Wait for all lanes of the warp; the last one calls combine.
EMULATOR_QUIET static void with_warp(const Place& place, unsigned mask, void* operand, Combine combine) {
    Thread* me = current;
    Warp* warp = me->warp;
    me->waits = place;
    me->operand = operand;
    if (mask != 0xffffffffu) fail("%s at %s:%d: only the full mask is supported", place.kind, place.file, place.line);
    if (warp->live < warp->size) divergent();
    if (warp->arrived == 0) {
        warp->place = place;
        warp->combine = combine;
    }
    if (!same_line(warp->place, place) || warp->combine != combine) divergent();
    if (++warp->arrived == warp->size) {
        void* operands[WARP] = {};
        for (int lane = 0; lane < warp->size; ++lane) operands[lane] = warp->threads[lane].operand;
        if (combine != nullptr) combine(operands);
        warp->arrived = 0;
        ++warp->generation;
        make_ready(warp, me);
    } else {
        wait();
    }
    me->waits.kind = nullptr;
}

EMULATOR_QUIET static void sync_warp(unsigned mask, const char* file, int line) {
    const Place place{"__syncwarp", file, line};
    mark(place);
    if (switched_off(place)) return;
    char* object = &current->warp->ordered[current->warp->generation % 2];
    release(object);
    with_warp(place, mask, nullptr, nullptr);
    acquire(object);
}

// ---- exchange within a warp: of 4 or 8 bytes, with another lane

struct Exchange {
    uint64_t value, result;
    int source;
};

EMULATOR_QUIET static void exchange(void** operands) {
    for (int lane = 0; lane < WARP; ++lane) {
        if (operands[lane] == nullptr) continue;
        Exchange* mine = static_cast<Exchange*>(operands[lane]);
        const Exchange* other = static_cast<const Exchange*>(operands[mine->source]);
        mine->result = other == nullptr ? ~0ull : other->value;  // a lane that is not there: poison
    }
}

// shuffle<T>(value, source lane or -1 for the own value)
template <class T>
static inline T shuffle(const char* kind, unsigned mask, T value, int source, const char* file, int line) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle takes 4 or 8 bytes");
    Exchange operand{0, 0, source};
    memcpy(&operand.value, &value, sizeof(T));
    with_warp({kind, file, line}, mask, &operand, exchange);
    memcpy(&value, &operand.result, sizeof(T));
    return value;
}

struct Vote {
    unsigned predicate, result;
};

EMULATOR_QUIET static void vote(void** operands) {
    unsigned result = 0;
    for (int lane = 0; lane < WARP; ++lane)
        if (operands[lane] != nullptr && static_cast<Vote*>(operands[lane])->predicate) result |= 1u << lane;
    for (int lane = 0; lane < WARP; ++lane)
        if (operands[lane] != nullptr) static_cast<Vote*>(operands[lane])->result = result;
}

// ---- shared memory

// Not memset: ThreadSanitizer would take it for an access of the kernel.
EMULATOR_QUIET static void poison(char* memory, size_t bytes) {
    volatile uint64_t* words = reinterpret_cast<volatile uint64_t*>(memory);
    for (size_t i = 0; i < bytes / 8; ++i) words[i] = ~0ull;
    for (size_t i = bytes / 8 * 8; i < bytes; ++i) reinterpret_cast<volatile char*>(memory)[i] = -1;
}

#if EMULATOR_THREAD

// Each block has fresh addresses: it is not ordered after the blocks before. When the arena is full it begins anew, and
// what was done so far is ordered before what follows.
static const size_t ARENA_BYTES = 64 << 20;
static char* arena;
static size_t arena_used = ARENA_BYTES;

EMULATOR_QUIET static char* allocate(size_t bytes, size_t) {  // aligned to 128 bytes
    if (arena == nullptr) arena = map(ARENA_BYTES);
    char* memory = arena + arena_used;
    arena_used += (bytes + 127) / 128 * 128;
    poison(memory, bytes);
    return memory;
}

EMULATOR_QUIET static void begin_arena() {  // between two blocks
    if (ARENA_BYTES - arena_used >= 4 * static_cast<size_t>(MOST_SHARED)) return;
    acquire(&launch.end);
    release(&launch.start);
    arena_used = 0;
}
static void deallocate(char*) {}

#else

static char* allocate(size_t bytes, size_t alignment) {  // of exactly this size: the sanitizer sees both ends
    void* start;
    if (posix_memalign(&start, alignment, bytes) != 0) abort();
    char* memory = static_cast<char*>(start);
    poison(memory, bytes);
    return memory;
}
static void begin_arena() {}
static void deallocate(char* memory) { free(memory); }

#endif

// An array that is declared in a kernel: __shared__ float sums[32].
struct Slot {
    unsigned serial;  // of the block that it was made for
    char* memory;
    size_t bytes;
    Slot* next;

    template <class T>
    EMULATOR_QUIET T& get(size_t alignment) {  // T has lost the attribute __align__
        if (serial != block->serial) {
            serial = block->serial;
            memory = allocate(bytes = sizeof(T), alignment < 16 ? 16 : alignment);
            next = block->slots;
            block->slots = this;
        }
        return *reinterpret_cast<T*>(memory);
    }
};

template <class T>
EMULATOR_QUIET static T* dynamic_shared() {
    return reinterpret_cast<T*>(block->shared);
}

EMULATOR_QUIET static bool in_shared(const void* p, size_t bytes) {
    const char* at = static_cast<const char*>(p);
    if (at >= block->shared && at + bytes <= block->shared + block->shared_bytes) return true;
    for (const Slot* slot = block->slots; slot != nullptr; slot = slot->next)
        if (at >= slot->memory && at + bytes <= slot->memory + slot->bytes) return true;
    return false;
}

// Fail unless 16 bytes at p are aligned, and in shared memory.
EMULATOR_QUIET static void check_row(const void* p, bool shared, const Place& place) {
    const bool aligned = reinterpret_cast<uintptr_t>(p) % 16 == 0;
    if (aligned && (!shared || in_shared(p, 16))) return;
    const uint3 &thread = current->index, &at = blockIdx;
    fail("%s at %s:%d: the address %p in thread (%u, %u, %u) of block (%u, %u, %u) %s", place.kind, place.file, place.line,
         p, thread.x, thread.y, thread.z, at.x, at.y, at.z,
         aligned ? "is not in shared memory, or not all 16 bytes of it are" : "is not a multiple of 16");
}

// ---- launches

EMULATOR_QUIET static void start_block(unsigned x, unsigned y, unsigned z, size_t shared_bytes) {
    const bool odd = EMULATOR_THREAD && serial % 2;
    if (blocks[odd] == nullptr) blocks[odd] = reinterpret_cast<Block*>(map(sizeof(Block)));  // zeros
    block = blocks[odd];
    begin_arena();
    blockIdx = {x, y, z};
    block->serial = ++serial;
    block->size = block->live = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
    block->warp_count = (block->size + WARP - 1) / WARP;
    block->arrived = 0;
    block->shared_bytes = shared_bytes;
    block->shared = allocate(shared_bytes, 16);
    block->slots = nullptr;
    ready_warps = 0;
    for (int i = 0; i < block->size; ++i) {
        Thread& thread = block->threads[i];
        thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
        thread.number = i;
        thread.lane = i % WARP;
        thread.warp = block->warps + i / WARP;
        thread.waits.kind = nullptr;
        thread.copies_size = thread.group = 0;
#if EMULATOR_THREAD
        void** identity = identities + odd * MOST_THREADS + i;
        if (*identity == nullptr) *identity = __tsan_create_fiber(0);
        thread.fiber.identity = *identity;
#endif
    }
    for (int i = 0; i < block->warp_count; ++i) {
        Warp* warp = block->warps + i;
        warp->threads = block->threads + i * WARP;
        warp->size = warp->live = block->size - i * WARP < WARP ? block->size - i * WARP : WARP;
        warp->arrived = 0;
        make_ready(warp, nullptr);
    }
    running_warp = block->warps;
}

EMULATOR_QUIET static void end_block() {
    for (int i = 0; i < block->size; ++i) {
        Fiber& fiber = block->threads[i].fiber;
        if (!fiber.started) continue;
#if EMULATOR_THREAD
        __tsan_switch_to_fiber(fiber.identity, __tsan_switch_to_fiber_no_sync);  // what it did is over
        release(&launch.end);
        __tsan_switch_to_fiber(launcher.identity, __tsan_switch_to_fiber_no_sync);
#endif
        retire(&fiber);  // it was left when another one failed
    }
    for (Slot* slot = block->slots; slot != nullptr; slot = slot->next) deallocate(slot->memory);
    deallocate(block->shared);
}

// On the device subnormal float32 numbers are zeros (CuPy compiles with -ftz=true).
#if defined(__x86_64__)
EMULATOR_QUIET static unsigned long flush_subnormals() {
    const unsigned before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(before | 0x8040);
    return before;
}
EMULATOR_QUIET static void restore_modes(unsigned long before) { __builtin_ia32_ldmxcsr(static_cast<unsigned>(before)); }
#elif defined(__aarch64__)
static unsigned long flush_subnormals() {
    unsigned long before;
    asm volatile("mrs %0, fpcr" : "=r"(before));
    asm volatile("msr fpcr, %0" ::"r"(before | 1ul << 24));
    return before;
}
static void restore_modes(unsigned long before) { asm volatile("msr fpcr, %0" ::"r"(before)); }
#else
static unsigned long flush_subnormals() { return 0; }
static void restore_modes(unsigned long) {}
#endif

EMULATOR_QUIET static uint64_t greatest_divisor(uint64_t a, uint64_t b) {
    while (b != 0) {
        const uint64_t rest = a % b;
        a = b;
        b = rest;
    }
    return a;
}

struct Options {
    uint64_t seed = 0;
    const char* off_file = nullptr;  // the site that is switched off
    int off_line = 0;
    int most_threads = MOST_THREADS;  // __launch_bounds__
};

// Run a kernel for the whole grid. False: it failed, and the message says why.
EMULATOR_QUIET static bool run_grid(void (*run)(void**), void** arguments, dim3 grid, dim3 threads, size_t shared_bytes,
                                    const Options& options, char* message, size_t message_size) {
    message[0] = 0;
    launch.run = run;
    launch.arguments = arguments;
    launch.random = options.seed * 0x9e3779b97f4a7c15ull;
    launch.off = {nullptr, options.off_file, options.off_file == nullptr ? 0 : options.off_line};
    launch.message = message;
    launch.message_size = message_size;
    gridDim = grid;
    blockDim = threads;
    const uint64_t size = uint64_t{threads.x} * threads.y * threads.z;
    if (size < 1 || size > static_cast<uint64_t>(options.most_threads) || threads.z > 64)
        snprintf(message, message_size, "a block of (%u, %u, %u) threads: at most %d are allowed, and one is needed",
                 threads.x, threads.y, threads.z, options.most_threads);
    else if (grid.x < 1 || grid.x > 0x7fffffff || grid.y < 1 || grid.y > 65535 || grid.z < 1 || grid.z > 65535)
        snprintf(message, message_size, "a grid of (%u, %u, %u) blocks: 1 .. 2147483647, 65535 and 65535 are allowed",
                 grid.x, grid.y, grid.z);
    else if (shared_bytes > MOST_SHARED)
        snprintf(message, message_size, "%zu bytes of shared memory: no device has more than %d", shared_bytes, MOST_SHARED);
    if (message[0] != 0) return false;
#if EMULATOR_THREAD
    launcher.identity = __tsan_get_current_fiber();
#endif
    release(&launch.start);
    const unsigned long modes = flush_subnormals();
    const uint64_t count = uint64_t{grid.x} * grid.y * grid.z;
    uint64_t number = 0, step = 1;
    if (options.seed != 0) {  // any first block, and a step that meets all others
        number = random_below(static_cast<unsigned>(count < 0x7fffffff ? count : 0x7fffffff));
        step = count / 2 + 1;
        while (greatest_divisor(step, count) != 1) ++step;
    }
    for (uint64_t i = 0; i < count && message[0] == 0; ++i, number = (number + step) % count) {
        start_block(number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y, shared_bytes);
        current = take();
        prepare(&current->fiber, run_threads);
        switch_fiber(&launcher, &current->fiber);
        end_block();
    }
    restore_modes(modes);
    acquire(&launch.end);
    return message[0] == 0;
}

// A kernel as one function of an array of pointers to its arguments, and the types of these: p pointer, i int,
// u unsigned, l long long, f float.
template <class T>
constexpr char letter() {
    if constexpr (std::is_pointer_v<T>) return 'p';
    else if constexpr (std::is_same_v<T, int>) return 'i';
    else if constexpr (std::is_same_v<T, unsigned>) return 'u';
    else if constexpr (std::is_same_v<T, long long>) return 'l';
    else {
        static_assert(std::is_same_v<T, float>, "an argument is a pointer, int, unsigned, long long or float");
        return 'f';
    }
}

template <auto>
struct Entry;
template <class... P, void (*kernel)(P...)>
struct Entry<kernel> {
    static constexpr char types[] = {letter<P>()..., 0};
    template <size_t... I>
    static void call(void** arguments, std::index_sequence<I...>) {
        kernel(*static_cast<P*>(arguments[I])...);
    }
    static void run(void** arguments) { call(arguments, std::index_sequence_for<P...>()); }
};

struct Kernel {
    const char* name;
    const char* types;
    void (*run)(void**);
    int most_threads;
};

}  // namespace emulator

// ---- functions of the language

#define EMULATOR_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

static inline void __syncthreads(EMULATOR_HERE) { emulator::sync_threads(file, line); }
static inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_HERE) { emulator::sync_warp(mask, file, line); }

// Lanes form segments of `width`, a power of two. What would leave the segment takes the own value.
template <class T>
static inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_HERE) {
    const int lane = emulator::current->lane, segment = lane / width * width;
    return emulator::shuffle("__shfl_sync", mask, value, segment + (source & (width - 1)), file, line);
}
template <class T>
static inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, EMULATOR_HERE) {
    const int lane = emulator::current->lane, end = (lane / width + 1) * width, source = lane ^ lanes;
    return emulator::shuffle("__shfl_xor_sync", mask, value, source < end ? source : lane, file, line);
}
template <class T>
static inline T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32, EMULATOR_HERE) {
    const int lane = emulator::current->lane, end = (lane / width + 1) * width, source = lane + static_cast<int>(lanes);
    return emulator::shuffle("__shfl_down_sync", mask, value, source < end ? source : lane, file, line);
}
template <class T>
static inline T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32, EMULATOR_HERE) {
    const int lane = emulator::current->lane, segment = lane / width * width, source = lane - static_cast<int>(lanes);
    return emulator::shuffle("__shfl_up_sync", mask, value, source >= segment ? source : lane, file, line);
}
static inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_HERE) {
    emulator::Vote operand{predicate != 0, 0};
    emulator::with_warp({"__ballot_sync", file, line}, mask, &operand, emulator::vote);
    return operand.result;
}

static inline int atomicAdd(int* p, int x) { return __atomic_fetch_add(p, x, __ATOMIC_RELAXED); }
static inline unsigned atomicAdd(unsigned* p, unsigned x) { return __atomic_fetch_add(p, x, __ATOMIC_RELAXED); }
static inline float atomicAdd(float* p, float x) {
    float before, after;
    __atomic_load(p, &before, __ATOMIC_RELAXED);
    do after = before + x;
    while (!__atomic_compare_exchange(p, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return before;
}

template <class T>
static inline T __ldg(const T* p) {
    return *p;
}

template <class To, class From>
static inline To emulator_bits(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
static inline unsigned __float_as_uint(float x) { return emulator_bits<unsigned>(x); }
static inline int __float_as_int(float x) { return emulator_bits<int>(x); }
static inline float __uint_as_float(unsigned x) { return emulator_bits<float>(x); }
static inline float __int_as_float(int x) { return emulator_bits<float>(x); }

static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

// cos and sin of pi x. Macros, since newer C libraries have functions of these names.
static inline double emulator_cospi(double x) { return cos(3.14159265358979323846 * x); }
static inline double emulator_sinpi(double x) { return sin(3.14159265358979323846 * x); }
#define cospi emulator_cospi
#define sinpi emulator_sinpi

#define EMULATOR_MINMAX(T)                                          \
    static inline T min(T a, T b) { return b < a ? b : a; }         \
    static inline T max(T a, T b) { return a < b ? b : a; }
EMULATOR_MINMAX(int)
EMULATOR_MINMAX(unsigned)
EMULATOR_MINMAX(long long)
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
