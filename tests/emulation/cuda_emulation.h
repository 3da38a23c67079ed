// Enough of CUDA to run kernels/lif_cuda.cu on a CPU: a block is a set of fibers, one per thread, that take turns at
// barriers and shuffles; blocks run one after the other. Include before the source, with LIF_EMULATION defined by it.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#define LIF_EMULATION 1
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

typedef int cudaError_t;
typedef void* cudaStream_t;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace emulation {

constexpr int warp_size = 32;
constexpr std::size_t stack_bytes = 128 * 1024;
constexpr int most_threads = 1024;
constexpr long most_shared = 227 * 1024;

enum State { running, at_barrier, at_shuffle, done };

struct Fiber {
    ucontext_t context;
    State state = done;
    int line = 0;  // of the barrier or shuffle it stands at
    double shuffled = 0;
    std::unique_ptr<char[]> stack;
};

struct Block {
    std::vector<Fiber> fibers = std::vector<Fiber>(most_threads);
    ucontext_t scheduler;
    int threads = 0, current = 0;
    unsigned char* shared = nullptr;
    void (*call)(void*) = nullptr;
    void* argument = nullptr;
    std::string error;
};
inline thread_local Block block;

// Bytes of global memory that launches have read and written so far, through the accesses that stream x and its kin.
inline long long bytes_read = 0, bytes_written = 0;

inline unsigned char* shared_memory() { return block.shared; }

inline void enter() {
    block.call(block.argument);
    block.fibers[block.current].state = done;
    swapcontext(&block.fibers[block.current].context, &block.scheduler);
}
inline void wait(State state, int line) {
    Fiber& fiber = block.fibers[block.current];
    fiber.state = state;
    fiber.line = line;
    swapcontext(&fiber.context, &block.scheduler);
}
inline bool fail(const std::string& text) {
    block.error = text + " (block " + std::to_string(blockIdx.x) + ")";
    return false;
}

// Lets everybody in [first, last) go on if all stand at the same line in `state`; false if some do and some don't.
inline bool release(int first, int last, State state, const char* what) {
    int waiting = 0;
    for (int j = first; j < last; ++j) waiting += block.fibers[j].state == state;
    if (waiting == 0) return true;
    for (int j = first; j < last; ++j) {
        const Fiber& fiber = block.fibers[j];
        if (fiber.state != state || fiber.line != block.fibers[first].line)
            return fail(std::string(what) + " at line " + std::to_string(block.fibers[first].line) + " that thread " +
                        std::to_string(j) + (fiber.state == done ? " has left" : " does not reach"));
    }
    for (int j = first; j < last; ++j) block.fibers[j].state = running;
    return true;
}

inline bool run_block(int threads) {
    block.threads = threads;
    for (int j = 0; j < threads; ++j) {
        Fiber& fiber = block.fibers[j];
        if (!fiber.stack) fiber.stack.reset(new char[stack_bytes]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = stack_bytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, enter, 0);
        fiber.state = running;
    }
    for (;;) {
        bool ran = false;
        for (int j = 0; j < threads; ++j) {
            if (block.fibers[j].state != running) continue;
            ran = true;
            block.current = j;
            threadIdx = dim3(unsigned(j));
            swapcontext(&block.scheduler, &block.fibers[j].context);
        }
        if (!ran) {
            bool all_done = true;
            for (int j = 0; j < threads; ++j) all_done = all_done && block.fibers[j].state == done;
            if (all_done) return true;
            return fail("threads wait for each other");
        }
        bool shuffling = false;
        for (int first = 0; first < threads; first += warp_size) {
            const int last = first + warp_size < threads ? first + warp_size : threads;
            for (int j = first; j < last; ++j) shuffling = shuffling || block.fibers[j].state == at_shuffle;
            if (!release(first, last, at_shuffle, "a shuffle")) return false;
        }
        // While a warp shuffles it may still be on its way to the barrier.
        if (!shuffling && !release(0, threads, at_barrier, "a barrier")) return false;
    }
}

template <class T> T shuffle_down(T value, unsigned far, int line) {
    Fiber& mine = block.fibers[block.current];
    mine.shuffled = value;
    wait(at_shuffle, line);
    const int lane = block.current % warp_size;
    const bool inside = lane + int(far) < warp_size && block.current + int(far) < block.threads;
    const T result = inside ? T(block.fibers[block.current + far].shuffled) : value;
    wait(at_shuffle, line);
    return result;
}

template <class P, class G> struct Launch {
    void (*kernel)(P, G);
    P* p;
    G* g;
    static void call(void* self) {
        const Launch* launch = static_cast<Launch*>(self);
        launch->kernel(*launch->p, *launch->g);
    }
};

// ---- numbers of 16 bits, rounded to nearest even --------------------------------------------------------------------

inline float half_to_float(unsigned short bits) {
    _Float16 y;
    std::memcpy(&y, &bits, 2);
    return float(y);
}
inline unsigned short float_to_half(float y) {
    const _Float16 half = _Float16(y);
    unsigned short bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
inline unsigned short float_to_bfloat16(float y) {
    unsigned bits;
    std::memcpy(&bits, &y, 4);
    if (y != y) return 0x7fff;
    return static_cast<unsigned short>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace emulation

template <class P, class G>
cudaError_t cudaLaunchKernel(void (*kernel)(P, G), dim3 grid, dim3 threads, void** arguments, std::size_t shared, cudaStream_t) {
    using namespace emulation;
    if (grid.x == 0 || threads.x == 0 || int(threads.x) > most_threads || long(shared) > most_shared) return cudaErrorInvalidConfiguration;
    Launch<P, G> launch{kernel, static_cast<P*>(arguments[0]), static_cast<G*>(arguments[1])};
    gridDim = grid;
    blockDim = threads;
    block.call = Launch<P, G>::call;
    block.argument = &launch;
    block.error.clear();
    for (unsigned j = 0; j < grid.x; ++j) {
        blockIdx = dim3(j);
        // As large as asked for and not a byte more, so that an address sanitizer sees what lies beyond.
        void* memory = nullptr;
        if (posix_memalign(&memory, 16, shared ? shared : 1)) return cudaErrorLaunchFailure;
        std::memset(memory, 0xff, shared);  // NaN
        block.shared = static_cast<unsigned char*>(memory);
        const bool good = run_block(int(threads.x));
        std::free(memory);
        if (!good) return cudaErrorLaunchFailure;
    }
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
    if (error == cudaErrorLaunchFailure) return emulation::block.error.c_str();
    return error == cudaErrorInvalidConfiguration ? "invalid configuration" : "invalid value";
}
template <class F> cudaError_t cudaFuncSetAttribute(F, int, int bytes) {
    return bytes <= emulation::most_shared ? cudaSuccess : cudaErrorInvalidValue;
}

#define __syncthreads() emulation::wait(emulation::at_barrier, __LINE__)
#define __shfl_down_sync(mask, value, far) emulation::shuffle_down(value, far, __LINE__)

template <class T> T __ldg(const T* at) { return *at; }
template <class T> T __ldcs(const T* at) {
    emulation::bytes_read += sizeof(T);
    return *at;
}
template <class T> void __stcs(T* at, T value) {
    emulation::bytes_written += sizeof(T);
    *at = value;
}
inline float __uint_as_float(unsigned bits) {
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
// Arrives at once; the destination of a copy must not be read before wait_async, which the hardware alone can show.
template <int bytes> void copy_async(void* to, const void* from) {
    emulation::bytes_read += bytes;
    std::memcpy(to, from, bytes);
}
inline void commit_async() {}
template <int pending> void wait_async() {}

// [2] bytes read and written since the last call.
extern "C" inline __attribute__((used, visibility("default"))) void fastsnn_emulation_bytes(long long* out) {
    out[0] = emulation::bytes_read;
    out[1] = emulation::bytes_written;
    emulation::bytes_read = emulation::bytes_written = 0;
}
