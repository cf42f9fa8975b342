// Runs launches from a file in a process of its own, under a sanitizer or not: the other side of jobs.py.
//
//   main JOB ARRAYS RESULTS FIRST     tasks FIRST .. of JOB
//
// Numbers are little-endian, a text is its length (uint32) and its bytes. JOB: the number of tasks (uint32), then each:
//
//   uint32 group, uint32 flags     1: return the arrays; 2: stop the group when a result is not the expected one
//   text library, text kernel, uint32 grid[3], uint32 block[3], uint64 shared bytes, uint64 seed
//   text file, int32 line          the site that is switched off; line 0: none
//   uint32 n, n times              uint64 place in ARRAYS, uint64 bytes, uint64 address modulo 16
//   uint32 n, n times              int32 array, or -1; uint64 offset in the array, or the bits of a number
//   uint64 expected                digest of the arrays; 0: any
//
// RESULTS, each task's flushed when it has run:
//
//   uint32 task, uint32 outcome    0 as expected, 1 another digest, 2 failed, 3 reported by the sanitizer, 4 left out
//   uint64 digest, float64 seconds, text message, text sites, then the bytes of the arrays if they were asked for
//
// Each array is allocated by itself with exactly its size, so that AddressSanitizer sees both ends.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <map>
#include <set>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#define ASAN_UNPOISON_MEMORY_REGION(p, n) ((void)(p), (void)(n))
#endif

namespace {

[[noreturn]] void stop(const std::string& why) {
    fprintf(stderr, "emulator: %s\n", why.c_str());
    exit(2);
}

std::string read_file(const char* path) {
    FILE* file = fopen(path, "rb");
    if (file == nullptr) stop(std::string("cannot read ") + path);
    std::string bytes;
    char buffer[1 << 16];
    for (size_t n; (n = fread(buffer, 1, sizeof buffer, file)) > 0;) bytes.append(buffer, n);
    fclose(file);
    return bytes;
}

struct Reader {
    const std::string bytes;
    size_t at = 0;

    void take(void* to, size_t n) {
        if (n > bytes.size() - at) stop("the job is cut off");
        memcpy(to, bytes.data() + at, n);
        at += n;
    }
    template <class T>
    T number() {
        T x;
        take(&x, sizeof x);
        return x;
    }
    std::string text() {
        std::string s(number<uint32_t>(), 0);
        take(&s[0], s.size());
        return s;
    }
};

FILE* results;

template <class T>
void put(T x) { fwrite(&x, sizeof x, 1, results); }
void put_text(const std::string& s) {
    put(static_cast<uint32_t>(s.size()));
    fwrite(s.data(), 1, s.size(), results);
}

struct Array {
    uint64_t place, bytes, shift;
    char* memory = nullptr;  // allocated
    char* data() const { return memory + shift; }
};

struct Argument {
    int32_t array;
    uint64_t value;
};

struct Task {
    uint32_t group, flags;
    std::string library, kernel;
    uint32_t grid[3], block[3];
    uint64_t shared_bytes, seed;
    std::string off_file;
    int32_t off_line;
    std::vector<Array> arrays;
    std::vector<Argument> arguments;
    uint64_t expected;
};

Task read_task(Reader& job) {
    Task task;
    task.group = job.number<uint32_t>();
    task.flags = job.number<uint32_t>();
    task.library = job.text();
    task.kernel = job.text();
    job.take(task.grid, sizeof task.grid);
    job.take(task.block, sizeof task.block);
    task.shared_bytes = job.number<uint64_t>();
    task.seed = job.number<uint64_t>();
    task.off_file = job.text();
    task.off_line = job.number<int32_t>();
    task.arrays.resize(job.number<uint32_t>());
    for (Array& array : task.arrays) {
        array.place = job.number<uint64_t>();
        array.bytes = job.number<uint64_t>();
        array.shift = job.number<uint64_t>();
    }
    task.arguments.resize(job.number<uint32_t>());
    for (Argument& argument : task.arguments) {
        argument.array = job.number<int32_t>();
        argument.value = job.number<uint64_t>();
    }
    task.expected = job.number<uint64_t>();
    return task;
}

using LaunchFunction = int (*)(const char*, const uint32_t*, const uint32_t*, uint64_t, void**, uint64_t, const char*, int,
                               char*, uint64_t);
using SitesFunction = uint64_t (*)(char*, uint64_t, int);
using ShareFunction = void (*)(void**);

struct Library {
    LaunchFunction launch;
    SitesFunction sites;
};

const Library& open(const std::string& path) {
    static std::map<std::string, Library> opened;
    static void* identities[2048];
    Library& library = opened[path];
    if (library.launch == nullptr) {
        void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (handle == nullptr) stop(dlerror());
        library.launch = reinterpret_cast<LaunchFunction>(dlsym(handle, "emulator_launch"));
        library.sites = reinterpret_cast<SitesFunction>(dlsym(handle, "emulator_sites"));
        reinterpret_cast<ShareFunction>(dlsym(handle, "emulator_share"))(identities);
    }
    return library;
}

// FNV-1a over words of 8 bytes, then bytes; not 0.
uint64_t digest(uint64_t before, const char* data, size_t n) {
    uint64_t h = before;
    for (; n >= 8; data += 8, n -= 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        h = (h ^ word) * 0x100000001b3ull;
        h ^= h >> 29;
    }
    for (; n > 0; ++data, --n) h = (h ^ static_cast<unsigned char>(*data)) * 0x100000001b3ull;
    return h == 0 ? 1 : h;
}

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

int reports = 0;
const int MOST_REPORTS = 10;

enum Outcome : uint32_t { EXPECTED, ANOTHER, FAILED, REPORTED, LEFT_OUT };

}  // namespace

// Called by ThreadSanitizer at each report, before it is printed and with its locks held: exit() would wait for these, and
// so would a report about this function.
extern "C" __attribute__((visibility("default"), no_sanitize("thread"))) void __tsan_on_report(void*) {
    if (++reports > MOST_REPORTS) syscall(SYS_exit_group, 66);  // a race may have thousands
}

int main(int count, char** arguments) {
    if (count != 5) stop("usage: main JOB ARRAYS RESULTS FIRST");
    Reader job{read_file(arguments[1])};
    const std::string all = read_file(arguments[2]);
    results = fopen(arguments[3], "ab");
    if (results == nullptr) stop("cannot write the results");
    const uint32_t first = static_cast<uint32_t>(atoi(arguments[4])), tasks = job.number<uint32_t>();
    std::set<uint32_t> stopped;
    for (uint32_t number = 0; number < tasks; ++number) {
        Task task = read_task(job);
        if (number < first) continue;
        char message[2500] = "";
        std::string sites;
        Outcome outcome = LEFT_OUT;
        uint64_t h = 1;
        double seconds = 0;
        if (stopped.count(task.group) == 0) {
            fprintf(stderr, "emulator: task %u\n", number);
            for (Array& array : task.arrays) {
                array.memory = static_cast<char*>(malloc(array.shift + array.bytes));
                memcpy(array.data(), all.data() + array.place, array.bytes);
                ASAN_POISON_MEMORY_REGION(array.memory, array.shift);
            }
            std::vector<uint64_t> values(task.arguments.size());
            std::vector<void*> pointers(task.arguments.size() + 1);
            for (size_t i = 0; i < values.size(); ++i) {
                const Argument& argument = task.arguments[i];
                values[i] = argument.value;
                if (argument.array >= 0) values[i] += reinterpret_cast<uint64_t>(task.arrays[argument.array].data());
                pointers[i] = &values[i];
            }
            const Library& library = open(task.library);
            const int reports_before = reports;
            const double start = now();
            library.sites(nullptr, 0, true);
            const bool failed = library.launch(task.kernel.c_str(), task.grid, task.block, task.shared_bytes, pointers.data(),
                                               task.seed, task.off_file.c_str(), task.off_line, message, sizeof message);
            seconds = now() - start;
            for (const Array& array : task.arrays) h = digest(h, array.data(), array.bytes);
            outcome = reports > reports_before                             ? REPORTED
                      : failed                                             ? FAILED
                      : task.expected != 0 && task.expected != h           ? ANOTHER
                                                                           : EXPECTED;
            if ((task.flags & 2) && outcome != EXPECTED) stopped.insert(task.group);
            sites.resize(library.sites(nullptr, 0, false) + 1);
            library.sites(&sites[0], sites.size(), false);
            sites.pop_back();
        }
        put(number);
        put(static_cast<uint32_t>(outcome));
        put(h);
        put(seconds);
        put_text(message);
        put_text(sites);
        for (const Array& array : task.arrays) {
            if ((task.flags & 1) && outcome != LEFT_OUT) fwrite(array.data(), 1, array.bytes, results);
            if (array.memory != nullptr) ASAN_UNPOISON_MEMORY_REGION(array.memory, array.shift);
            free(array.memory);
        }
        fflush(results);
    }
    return 0;
}
