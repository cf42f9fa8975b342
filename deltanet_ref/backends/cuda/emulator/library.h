// What a library exports to build.py and main.cpp; included behind the kernels and the table emulator_kernels of them.
#pragma once

#include "cuda.h"

#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

static const emulator::Kernel* emulator_find(const char* name) {
    for (const emulator::Kernel& kernel : emulator_kernels)
        if (kernel.name != nullptr && strcmp(kernel.name, name) == 0) return &kernel;
    return nullptr;
}

// The types of a kernel's arguments, a letter each; null if there is no such kernel.
EMULATOR_EXPORT const char* emulator_types(const char* name) {
    const emulator::Kernel* kernel = emulator_find(name);
    return kernel == nullptr ? nullptr : kernel->types;
}

// 0, or 1 with a message.
EMULATOR_EXPORT int emulator_launch(const char* name, const uint32_t* grid, const uint32_t* block, uint64_t shared_bytes,
                                    void** arguments, uint64_t seed, const char* off_file, int off_line, char* message,
                                    uint64_t message_size) {
    const emulator::Kernel* kernel = emulator_find(name);
    if (kernel == nullptr) {
        snprintf(message, message_size, "there is no kernel %s", name);
        return 1;
    }
    const emulator::Options options{seed, off_file, off_line, kernel->most_threads};
    return !emulator::run_grid(kernel->run, arguments, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]},
                               shared_bytes, options, message, message_size);
}

// The sites reached since the library was loaded, or since they were last forgotten, a line "kind<tab>line<tab>file"
// each. Returns the number of characters.
EMULATOR_EXPORT uint64_t emulator_sites(char* text, uint64_t size, int forget) {
    uint64_t length = 0;
    if (forget) memset(emulator::sites, 0, sizeof emulator::sites);
    for (const emulator::Place& site : emulator::sites)
        if (site.kind != nullptr)
            length += snprintf(length < size ? text + length : nullptr, length < size ? size - length : 0, "%s\t%d\t%s\n",
                               site.kind, site.line, site.file);
    return length;
}

// A process with several libraries has one table of 2048 pointers for all.
EMULATOR_EXPORT void emulator_share(void** identities) {
#if EMULATOR_THREAD
    emulator::identities = identities;
#endif
    (void)identities;
}
