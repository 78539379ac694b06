// Runs CUDA kernels on the CPU, so that their bits can be compared with the reference on a machine without a GPU.
//
// Included before everything else when csrc/cuda/*.cu are compiled as plain C++. Blocks run one after the other; the
// threads of a block are fibers, and one that reaches a barrier or a warp intrinsic waits until the others are there.
// A warp runs as far as it can before the next one does, so that a missing barrier shows. What does not show: other
// orders of the warps, races within a warp, speed.
#pragma once

#undef _FORTIFY_SOURCE  // its longjmp takes the stack of another fiber for an error
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define SEME_MMA
#define SEME_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emulator::dynamic_shared)

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

struct Thread {
    jmp_buf place;  // where it waits
    std::unique_ptr<char[]> stack;
    dim3 index;
    bool alive;
    long block_arrivals, warp_arrivals;
    uint64_t slot;  // what the thread shows to its warp
};

constexpr size_t kStack = 128 << 10;
constexpr int kWarp = 32;
alignas(16) inline char dynamic_shared[128 << 10];
inline std::vector<Thread> threads;
inline jmp_buf scheduler;
inline size_t current;
inline bool progress;
inline dim3 block, grid;
inline void* body;  // of the kernel, for every thread
inline void (*call_body)(void*);

// Back to the scheduler, until it comes to this thread again. swapcontext would ask the system at every switch.
__attribute__((noinline)) inline void leave() {
    if (!_setjmp(threads[current].place)) _longjmp(scheduler, 1);
}

// Waits until threads [first, last) that have not ended have called this as often as the current thread has.
inline void wait(size_t first, size_t last, long Thread::* arrivals) {
    const long mine = ++(threads[current].*arrivals);
    for (;;) {
        size_t t = first;
        while (t < last && (!threads[t].alive || threads[t].*arrivals >= mine)) ++t;
        if (t == last) break;
        leave();
    }
    progress = true;
}

inline void wait_block() { wait(0, threads.size(), &Thread::block_arrivals); }

inline size_t warp_first() { return current / kWarp * kWarp; }

// Shows `value` to the warp and calls read(first thread of the warp), when all show theirs.
template <class V, class Read>
auto exchange(V value, const Read& read) {
    static_assert(sizeof(V) <= sizeof(uint64_t), "a slot holds 8 bytes");
    threads[current].slot = 0;
    __builtin_memcpy(&threads[current].slot, &value, sizeof(V));
    wait(warp_first(), warp_first() + kWarp, &Thread::warp_arrivals);
    auto result = read(warp_first());
    wait(warp_first(), warp_first() + kWarp, &Thread::warp_arrivals);
    return result;
}

template <class V>
V slot(size_t thread) {
    V value;
    __builtin_memcpy(&value, &threads[thread].slot, sizeof(V));
    return value;
}

// What a fiber does: the kernel, for one block after the other.
inline void run_thread() {
    for (;;) {
        call_body(body);
        threads[current].alive = false;
        progress = true;
        leave();
    }
}

// Runs the current thread until it leaves.
__attribute__((noinline)) inline void enter() {
    Thread& thread = threads[current];
    if (_setjmp(scheduler)) return;
    if (thread.stack) _longjmp(thread.place, 1);
    thread.stack.reset(new char[kStack]);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = thread.stack.get();
    context.uc_stack.ss_size = kStack;
    makecontext(&context, run_thread, 0);
    setcontext(&context);
}

// Runs a warp until it has ended or waits for another one; false if it could not move.
inline bool run_warp(size_t first) {
    bool moved = false;
    do {
        progress = false;
        for (current = first; current < first + kWarp; ++current)
            if (threads[current].alive) enter();
        moved |= progress;
    } while (progress);
    return moved;
}

inline void run_block() {
    for (size_t t = 0; t < threads.size(); ++t) {
        threads[t].index = dim3(unsigned(t), 0, 0);
        threads[t].alive = true;
        threads[t].block_arrivals = threads[t].warp_arrivals = 0;
    }
    bool moved = true;
    while (moved) {
        moved = false;
        for (size_t warp = 0; warp < threads.size(); warp += kWarp) moved |= run_warp(warp);
    }
    for (const Thread& thread : threads)
        if (thread.alive) {
            std::fprintf(stderr, "emulator: threads of a block wait for each other at different barriers\n");
            std::abort();
        }
}

}  // namespace emulator

#define threadIdx (emulator::threads[emulator::current].index)
inline const dim3 &blockIdx = emulator::block, &gridDim = emulator::grid;

// The runtime library, as far as it is used.
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
enum { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : int(sizeof(emulator::dynamic_shared));
    return cudaSuccess;
}
template <class K>
cudaError_t cudaFuncSetAttribute(K, int, int) {
    return cudaSuccess;
}

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), const A&... args) {
    if (config->gridDim.x == 0 || config->gridDim.y == 0 || config->blockDim.x > 1024 ||
        config->blockDim.x % emulator::kWarp || config->dynamicSmemBytes > sizeof(emulator::dynamic_shared))
        return cudaErrorInvalidConfiguration;
    auto body = [&] { kernel(args...); };
    emulator::body = &body;
    emulator::call_body = [](void* f) { (*static_cast<decltype(body)*>(f))(); };
    emulator::grid = config->gridDim;
    emulator::threads.resize(config->blockDim.x);
    emulator::block = dim3(0, 0, 0);
    for (emulator::block.y = 0; emulator::block.y < emulator::grid.y; ++emulator::block.y)
        for (emulator::block.x = 0; emulator::block.x < emulator::grid.x; ++emulator::block.x) emulator::run_block();
    return cudaSuccess;
}

// Intrinsics, as far as they are used.
inline void __syncthreads() { emulator::wait_block(); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }

template <class V>
V __shfl_sync(unsigned, V value, int source) {
    return emulator::exchange(value, [&](size_t first) { return emulator::slot<V>(first + size_t(source)); });
}
template <class V>
V __shfl_up_sync(unsigned, V value, unsigned delta) {
    const size_t source = emulator::current % emulator::kWarp >= delta ? emulator::current - delta : emulator::current;
    return emulator::exchange(value, [&](size_t) { return emulator::slot<V>(source); });
}
template <class V>
V __shfl_down_sync(unsigned, V value, unsigned delta) {
    const bool inside = emulator::current % emulator::kWarp + delta < emulator::kWarp;
    const size_t source = inside ? emulator::current + delta : emulator::current;
    return emulator::exchange(value, [&](size_t) { return emulator::slot<V>(source); });
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
    return emulator::exchange(predicate, [](size_t first) {
        unsigned votes = 0;
        for (int t = 0; t < emulator::kWarp; ++t) votes |= unsigned(emulator::slot<bool>(first + t)) << t;
        return votes;
    });
}
template <class V>
V __reduce_add_sync(unsigned, V value) {
    return emulator::exchange(value, [](size_t first) {
        V sum = 0;
        for (int t = 0; t < emulator::kWarp; ++t) sum += emulator::slot<V>(first + t);
        return sum;
    });
}
template <class V>
V atomicAdd(V* p, V value) {
    V old = *p;
    *p += value;
    return old;
}

// mma.m16n8k16 of bfloat16 as the manual lays it out: lane 4g + t of a warp holds rows g and g + 8 of a, row g of b,
// the entries 2t, 2t + 1, 2t + 8 and 2t + 9 of each, and columns 2t and 2t + 1 of c.
inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Fragments {
        uint32_t a[4], b[2];
    };
    static Fragments warp[emulator::kWarp];
    const size_t first = emulator::warp_first(), lane = emulator::current - first;
    for (int i = 0; i < 4; ++i) warp[lane].a[i] = a[i];
    for (int i = 0; i < 2; ++i) warp[lane].b[i] = b[i];
    emulator::wait(first, first + emulator::kWarp, &emulator::Thread::warp_arrivals);
    auto value = [](uint32_t word, size_t half) {
        const uint32_t bits = (half ? word >> 16 : word) << 16;
        float x;
        __builtin_memcpy(&x, &bits, sizeof(x));
        return x;
    };
    const size_t group = lane / 4, pair = lane % 4;
    for (size_t i = 0; i < 4; ++i) {
        const size_t row = group + i / 2 * 8, column = 2 * pair + i % 2;
        for (size_t k = 0; k < 16; ++k) {
            const size_t holder = k % 8 / 2;
            const uint32_t left = warp[row % 8 * 4 + holder].a[k / 8 * 2 + row / 8];
            const uint32_t right = warp[column * 4 + holder].b[k / 8];
            c[i] += value(left, k % 2) * value(right, k % 2);
        }
    }
    emulator::wait(first, first + emulator::kWarp, &emulator::Thread::warp_arrivals);
}
