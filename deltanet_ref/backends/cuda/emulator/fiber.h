// Fibers: stacks, the switch from one to another, and what the sanitizers must be told about it.
//
// EMULATOR_QUIET marks functions of the emulator itself: ThreadSanitizer must not take their accesses for the kernel's.
// (AddressSanitizer could look at them, but they would be ten times as slow.)
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__SANITIZE_THREAD__)
#define EMULATOR_THREAD 1
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_ignore_thread_begin();  // of the library, not in that header
extern "C" void __tsan_ignore_thread_end();
#define EMULATOR_QUIET __attribute__((no_sanitize("thread"), noinline))
#elif defined(__SANITIZE_ADDRESS__)
#define EMULATOR_THREAD 0
#define EMULATOR_QUIET __attribute__((no_sanitize("address"), no_sanitize("undefined")))
#else
#define EMULATOR_THREAD 0
#define EMULATOR_QUIET
#endif

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ADDRESS 1
#include <sanitizer/common_interface_defs.h>
#else
#define EMULATOR_ADDRESS 0
#endif

#if !defined(EMULATOR_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define EMULATOR_UCONTEXT  // may be defined on any processor
#endif
#ifdef EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

namespace emulator {

// ---- the switch: save the registers that a call preserves on this stack, take them from another one

#if defined(EMULATOR_UCONTEXT)
#elif defined(__x86_64__)

// The System V ABI preserves rbp, rbx and r12 .. r15; the modes of the floating-point units are the same in all fibers.
asm(R"(
    .pushsection .text
    .type emulator_switch_stack, @function
emulator_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulator_switch_stack, .-emulator_switch_stack
    .popsection
)");

using Context = void*;  // the stack pointer

EMULATOR_QUIET static Context new_context(char* bottom, size_t size, void (*entry)()) {
    void** frame = reinterpret_cast<void**>(bottom + size) - 8;  // six registers, the return address, and none to return to
    for (int i = 0; i < 8; ++i) frame[i] = nullptr;
    frame[6] = reinterpret_cast<void*>(entry);
    return frame;
}

#elif defined(__aarch64__)

// The procedure call standard preserves x19 .. x30 and the low halves of v8 .. v15.
asm(R"(
    .pushsection .text
    .type emulator_switch_stack, %function
emulator_switch_stack:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size emulator_switch_stack, .-emulator_switch_stack
    .popsection
)");

using Context = void*;

EMULATOR_QUIET static Context new_context(char* bottom, size_t size, void (*entry)()) {
    void** frame = reinterpret_cast<void**>(bottom + size) - 20;
    for (int i = 0; i < 20; ++i) frame[i] = nullptr;
    frame[11] = reinterpret_cast<void*>(entry);  // x30
    return frame;
}

#endif

#ifndef EMULATOR_UCONTEXT

extern "C" void emulator_switch_stack(Context* save, Context load) __asm__("emulator_switch_stack");
EMULATOR_QUIET static void switch_context(Context* save, Context load) { emulator_switch_stack(save, load); }

#else  // two system calls a switch

using Context = ucontext_t*;

static Context new_context(char* bottom, size_t size, void (*entry)()) {
    Context context = reinterpret_cast<Context>(bottom + size - (sizeof(ucontext_t) + 63) / 64 * 64);
    getcontext(context);
    context->uc_stack.ss_sp = bottom;
    context->uc_stack.ss_size = reinterpret_cast<char*>(context) - bottom;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    return context;
}

static void switch_context(Context* save, Context load) {
    static ucontext_t launching_thread;
    if (*save == nullptr) *save = &launching_thread;
    swapcontext(*save, load);
}

#endif

// ThreadSanitizer ignores what the running thread does while `on`, in functions of the C library.
EMULATOR_QUIET static void ignore_thread(bool on) {
#if EMULATOR_THREAD
    on ? __tsan_ignore_thread_begin() : __tsan_ignore_thread_end();
#endif
    (void)on;
}

// Memory of zeros. ThreadSanitizer would take its allocation for a write by the running thread.
EMULATOR_QUIET static char* map(size_t bytes) {
    ignore_thread(true);
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    ignore_thread(false);
    if (memory != MAP_FAILED) return static_cast<char*>(memory);
    fprintf(stderr, "emulator: no memory\n");
    abort();
}

// ---- stacks, kept for the next fiber. The page below each faults, the description is in the page above.

struct Stack {
    char* bottom = nullptr;
    size_t size = 0;
    Stack* next = nullptr;
};

static const size_t STACK_BYTES = EMULATOR_THREAD || EMULATOR_ADDRESS ? 256 << 10 : 64 << 10;
static Stack* free_stacks = nullptr;

EMULATOR_QUIET static Stack* take_stack() {
    if (free_stacks == nullptr) {
        static unsigned made = 0;
        const size_t page = 4096, stagger = 64 * (5 * made++ % 61);  // else all stacks fall into the same lines of the cache
        char* memory = map(STACK_BYTES + 2 * page);
        mprotect(memory, page, PROT_NONE);
        free_stacks = reinterpret_cast<Stack*>(memory + STACK_BYTES + 2 * page) - 1;
        *free_stacks = Stack{memory + page, STACK_BYTES - stagger, nullptr};
    }
    Stack* stack = free_stacks;
    free_stacks = stack->next;
    return stack;
}

EMULATOR_QUIET static void give_stack(Stack* stack) {
    stack->next = free_stacks;
    free_stacks = stack;
}

// ---- what runs: the launching thread, or a CUDA thread that has started

struct Fiber {
    Context context = nullptr;
    Stack* stack = nullptr;  // null: none yet, or the launching thread
    bool started = false;
#if EMULATOR_THREAD
    void* identity = nullptr;  // to ThreadSanitizer
#endif
#if EMULATOR_ADDRESS
    void* fake_stack = nullptr;
    const void* bottom = nullptr;
    size_t size = 0;
#endif
};

#if EMULATOR_ADDRESS
static Fiber* left = nullptr;  // the fiber that was left last

static void arrived(Fiber* here) {
    __sanitizer_finish_switch_fiber(here == nullptr ? nullptr : here->fake_stack, &left->bottom, &left->size);
}
#endif

// Leave `from`, which ends if `ends`, for `to`; returns when somebody switches back.
EMULATOR_QUIET static void switch_fiber(Fiber* from, Fiber* to, bool ends = false) {
#if EMULATOR_THREAD
    __tsan_switch_to_fiber(to->identity, __tsan_switch_to_fiber_no_sync);
#endif
#if EMULATOR_ADDRESS
    left = from;
    __sanitizer_start_switch_fiber(ends ? nullptr : &from->fake_stack, to->stack ? to->stack->bottom : to->bottom,
                                   to->stack ? to->stack->size : to->size);
#endif
    switch_context(&from->context, to->context);
#if EMULATOR_ADDRESS
    arrived(from);
#endif
    (void)ends;
}

EMULATOR_QUIET static void prepare(Fiber* fiber, void (*entry)()) {
    if (fiber->stack == nullptr) fiber->stack = take_stack();
    fiber->started = true;
    fiber->context = new_context(fiber->stack->bottom, fiber->stack->size, entry);
}

// The fiber has ended, or will never go on. ThreadSanitizer would take two threads that use one stack in turn for a race:
// there each keeps its own.
EMULATOR_QUIET static void retire(Fiber* fiber) {
    fiber->started = false;
    if (EMULATOR_THREAD || fiber->stack == nullptr) return;
    give_stack(fiber->stack);
    fiber->stack = nullptr;
}

// `next`, which has not started, goes on with the stack of `from`, which has ended. Not under ThreadSanitizer.
EMULATOR_QUIET static void hand_over(Fiber* from, Fiber* next) {
    next->stack = from->stack;
    from->stack = nullptr;
    next->started = true;
    from->started = false;
}

}  // namespace emulator
