// CUDA C++ as C++: runs the blocks and threads of a kernel on one thread of the CPU.
//
// A block's threads are fibers. Each runs until it waits or ends; then those are released whose barrier is complete.
// So barriers that only some threads reach, shuffles with threads that ended, and vector accesses that a device would
// refuse are errors, and shared memory holds NaN at a block's start.
#include <math.h>
#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __launch_bounds__(...)
// All of it in one section, to be found again.
#define __shared__ static __attribute__((section("shared_memory")))
// Variables of inline functions could not be in that section.
#define inline static
#define CHECK_ALIGNED(pointer, bytes) \
    if ((unsigned long long)(pointer) % (bytes)) shim::fail("a vector access is not aligned")

extern char __start_shared_memory[] __attribute__((weak));
extern char __stop_shared_memory[] __attribute__((weak));

namespace shim {

struct Index {
    unsigned x, y;
};

enum State { RUNNING, AT_WARP, AT_BLOCK, DONE };

constexpr unsigned THREADS = 256, WARP = 32, STACK = 64 * 1024;

struct Fiber {
    ucontext_t start;
    // Where it waits, once it has started.
    jmp_buf at;
    bool started;
    State state;
    // Of the shuffles so far, whether they are odd.
    unsigned parity;
    unsigned long long exchange[2];
};

static Index block_index, block_size, grid_size, thread_index;
static Fiber fibers[THREADS];
static char* stacks;
static jmp_buf scheduler;
static const char* error;
static void (*run_thread)(const void*);
static const void* parameter;

static void fail(const char* message) {
    if (!error) error = message;
}

static void wait(State state) {
    const Index self = thread_index;
    Fiber& fiber = fibers[self.x];
    fiber.state = state;
    if (!_setjmp(fiber.at)) _longjmp(scheduler, 1);
    thread_index = self;
}

static void begin() {
    const unsigned own = thread_index.x;
    run_thread(parameter);
    fibers[own].state = DONE;
    _longjmp(scheduler, 1);
}

// Gives every thread a stack on which the kernel begins.
static void prepare_block() {
    if (!stacks) stacks = (char*)malloc(THREADS * STACK);
    const size_t shared = __stop_shared_memory - __start_shared_memory;
    if (shared) memset(__start_shared_memory, 0xff, shared);
    for (unsigned i = 0; i < block_size.x; ++i) {
        Fiber& fiber = fibers[i];
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = stacks + i * STACK;
        fiber.start.uc_stack.ss_size = STACK;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, begin, 0);
        fiber.started = false;
        fiber.state = RUNNING;
        fiber.parity = 0;
    }
}

static void resume(unsigned thread) {
    Fiber& fiber = fibers[thread];
    thread_index = {thread, 0};
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.at, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

static bool all_in(unsigned first, unsigned count, State state) {
    for (unsigned i = first; i < first + count; ++i) {
        if (fibers[i].state != state) return false;
    }
    return true;
}

static void release(unsigned first, unsigned count) {
    for (unsigned i = first; i < first + count; ++i) fibers[i].state = RUNNING;
}

// Runs a block; `backwards` takes its threads in the other order, in which a missing barrier shows elsewhere.
static void run_block(bool backwards) {
    const unsigned count = block_size.x;
    prepare_block();
    while (!all_in(0, count, DONE)) {
        for (unsigned i = 0; i < count; ++i) {
            const unsigned thread = backwards ? count - 1 - i : i;
            if (fibers[thread].state == RUNNING) resume(thread);
        }
        bool released = false;
        if (all_in(0, count, AT_BLOCK)) {
            release(0, count);
            released = true;
        }
        for (unsigned warp = 0; warp < count; warp += WARP) {
            if (!all_in(warp, WARP, AT_WARP)) continue;
            release(warp, WARP);
            released = true;
        }
        if (!released && !all_in(0, count, DONE)) return fail("some threads wait for others that do not come");
    }
}

static const char* run(void (*thread)(const void*), const void* problem, unsigned x, unsigned y, bool backwards) {
    run_thread = thread;
    parameter = problem;
    error = nullptr;
    block_size = {THREADS, 1};
    grid_size = {x, y};
    for (unsigned i = 0; i < x * y && !error; ++i) {
        const unsigned block = backwards ? x * y - 1 - i : i;
        block_index = {block % x, block / x};
        run_block(backwards);
    }
    return error;
}

template <class T>
T shuffle_xor(T value, unsigned distance) {
    Fiber& own = fibers[thread_index.x];
    const unsigned parity = own.parity ^= 1, other = thread_index.x ^ distance;
    memcpy(&own.exchange[parity], &value, sizeof(T));
    wait(AT_WARP);
    memcpy(&value, &fibers[other].exchange[parity], sizeof(T));
    return value;
}

template <class To, class From>
To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

}  // namespace shim

#define threadIdx shim::thread_index
#define blockIdx shim::block_index
#define blockDim shim::block_size
#define gridDim shim::grid_size
#define __syncthreads() shim::wait(shim::AT_BLOCK)
#define __shfl_xor_sync(mask, value, distance) shim::shuffle_xor(value, distance)
#define __uint_as_float shim::bits<float, unsigned>
#define __float_as_uint shim::bits<unsigned, float>
#define __longlong_as_double shim::bits<double, long long>

// What a device has an instruction for.
static float half_to_float(unsigned short half) {
    const unsigned sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31u, fraction = half & 1023u;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    const float magnitude = exponent ? ldexpf(float(1024u + fraction), int(exponent) - 25) : ldexpf(float(fraction), -24);
    return sign ? -magnitude : magnitude;
}

static unsigned short float_to_half(float value) {
    const unsigned sign = (__float_as_uint(value) >> 16) & 0x8000u;
    const double magnitude = fabs(double(value));
    if (value != value) return 0x7fff;
    if (magnitude >= 65520.0) return sign | 0x7c00u;
    if (magnitude < ldexp(1.0, -14)) return sign | unsigned(nearbyint(ldexp(magnitude, 24)));
    int exponent;
    const double fraction = frexp(magnitude, &exponent);
    // A fraction that rounds up to 2048 carries into the exponent.
    return sign | (unsigned(exponent + 13) * 1024u + unsigned(nearbyint(ldexp(fraction, 11))));
}

// Makes a kernel callable: run_NAME(parameter, blocks x, blocks y, backwards), which returns what went wrong.
#define EXPORT(name, Parameter)                                                                       \
    static void thread_of_##name(const void* parameter) { name(*(const Parameter*)parameter); }       \
    extern "C" unsigned long long size_of_##name() { return sizeof(Parameter); }                      \
    extern "C" const char* run_##name(const void* parameter, unsigned x, unsigned y, bool backwards) { \
        return shim::run(thread_of_##name, parameter, x, y, backwards);                               \
    }
