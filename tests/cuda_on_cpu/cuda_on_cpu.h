// Runs a CUDA kernel of one source file on a CPU, one block after another, to hold it to the truth where there is no GPU.
//
// Every thread is a fiber. A fiber runs until it meets others (a barrier, a shuffle, a vote) or, now and then, an atomic.
// Which warp goes ahead and which of its fibers runs first is drawn from a seed, so that a missing barrier shows as wrong
// results. Shared memory is filled with noise before each block. Barriers that not all threads reach, collectives whose
// lanes differ and misaligned vector loads end the process with a message.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("cuda_shared")))

extern "C" unsigned char __start_cuda_shared[], __stop_cuda_shared[];

struct dim3 {
    unsigned x = 0, y = 0, z = 0;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

namespace cuda_on_cpu {

enum class Op { None, Sync, Xor, Up, Ballot, Match, Block, BlockOr };
enum class State { Ready, Waiting, Done };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    State state = State::Ready;
    Op op = Op::None;
    uint32_t mask = 0;
    uint64_t value = 0, result = 0;
    int distance = 0;
};

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 1 << 18;
#else
constexpr size_t kStack = 1 << 16;
#endif

struct Machine {
    std::vector<Fiber> fibers;
    ucontext_t scheduler;
    uint64_t random = 0;
    unsigned current = 0;
    dim3 block;
    const std::function<void()>* body = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_size = 0;
};

inline Machine machine;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "cuda_on_cpu: %s (block %u, thread %u)\n", what, machine.block.x, machine.current);
    std::_Exit(3);
}

inline uint64_t draw() {
    uint64_t x = machine.random += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

inline Fiber& here() { return machine.fibers[machine.current]; }

// Address sanitizer has to know whose stack is in use.
inline void switch_to(ucontext_t* from, ucontext_t* to, const void* stack, size_t size, bool last) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(last ? nullptr : &fake, stack, size);
    swapcontext(from, to);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    (void)stack, (void)size, (void)last;
    swapcontext(from, to);
#endif
}

inline void yield() { switch_to(&here().context, &machine.scheduler, machine.scheduler_stack, machine.scheduler_size, here().state == State::Done); }

inline void enter() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_size);
#endif
    (*machine.body)();
    here().state = State::Done;
    yield();
}

inline uint64_t meet(Op op, uint32_t mask, uint64_t value, int distance = 0) {
    Fiber& me = here();
    me.state = State::Waiting, me.op = op, me.mask = mask, me.value = value, me.distance = distance;
    yield();
    return me.result;
}

// Lets the lanes that `mask` names go on, if all of them wait in the same operation.
inline bool resolve_warp(unsigned first, uint32_t mask) {
    Fiber* warp = &machine.fibers[first];
    const Fiber* leader = nullptr;
    for (unsigned l = 0; l < 32; ++l) {
        if (!(mask >> l & 1)) continue;
        const Fiber& f = warp[l];
        if (f.state != State::Waiting || f.mask != mask || f.op == Op::Block || f.op == Op::BlockOr) return false;
        if (!leader) leader = &f;
        if (f.op != leader->op || f.distance != leader->distance) return false;
    }
    uint32_t vote = 0;
    for (unsigned l = 0; l < 32; ++l) vote |= (mask >> l & 1 && warp[l].value ? 1u : 0u) << l;
    for (unsigned l = 0; l < 32; ++l) {
        if (!(mask >> l & 1)) continue;
        Fiber& f = warp[l];
        if (f.op == Op::Ballot) f.result = vote;
        if (f.op == Op::Xor || f.op == Op::Up) {
            const int source = f.op == Op::Xor ? (int)l ^ f.distance : (int)l - f.distance;
            const unsigned from = source < 0 ? l : (unsigned)source;
            if (!(mask >> from & 1)) fail("a shuffle reads a lane that is not in its mask");
            f.result = warp[from].value;
        }
        if (f.op == Op::Match) {
            f.result = 0;
            for (unsigned o = 0; o < 32; ++o) f.result |= (uint64_t)(mask >> o & 1 && warp[o].value == f.value) << o;
        }
    }
    for (unsigned l = 0; l < 32; ++l)
        if (mask >> l & 1) warp[l].state = State::Ready;
    return true;
}

inline bool resolve_block() {
    uint64_t any = 0;
    const Op op = machine.fibers[0].op;
    for (const Fiber& f : machine.fibers) {
        if (f.state != State::Waiting || f.op != op || (op != Op::Block && op != Op::BlockOr)) return false;
        any |= f.value;
    }
    for (Fiber& f : machine.fibers) f.state = State::Ready, f.result = any;
    return true;
}

__attribute__((no_sanitize_address)) inline void fill_shared_with_noise() {
    for (volatile unsigned char* at = __start_cuda_shared; at != __stop_cuda_shared; ++at) *at = (unsigned char)draw();
}

// Every fiber of a warp that can run does, in an order of the seed's; whether one could.
inline bool run_warp(unsigned first) {
    unsigned order[32];
    for (unsigned l = 0; l < 32; ++l) order[l] = first + l;
    for (unsigned l = 32; l > 1; --l) std::swap(order[l - 1], order[draw() % l]);
    bool ran = false;
    for (unsigned t : order) {
        Fiber& f = machine.fibers[t];
        if (f.state == State::Waiting && f.op != Op::Block && f.op != Op::BlockOr) resolve_warp(first, f.mask);
        if (f.state != State::Ready) continue;
        machine.current = t;
        ran = true;
        switch_to(&machine.scheduler, &f.context, f.stack.get(), kStack, false);
    }
    return ran;
}

inline void run_block(unsigned threads) {
    fill_shared_with_noise();
    for (unsigned t = 0; t < threads; ++t) {
        Fiber& f = machine.fibers[t];
        f.state = State::Ready;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = kStack;
        f.context.uc_link = nullptr;
        makecontext(&f.context, enter, 0);
    }
    // One warp goes ahead of the others as far as it can, or stops on the way for another.
    const unsigned warps = threads / 32;
    unsigned first = (unsigned)(draw() % warps), stuck = 0;
    while (stuck < warps) {
        if (run_warp(first * 32)) {
            stuck = 0;
            if (draw() % 8) continue;
            first = (unsigned)(draw() % warps);
        } else {
            ++stuck;
            first = (first + 1) % warps;
        }
        if (stuck == warps && resolve_block()) stuck = 0;
    }
    for (unsigned t = 0; t < threads; ++t)
        if (machine.fibers[machine.current = t].state != State::Done) fail("threads wait for each other in different places");
}

// Runs `body`, a call of the kernel, for every block and thread. `threads` is a multiple of 32.
inline void launch(unsigned blocks, unsigned threads, uint64_t seed, const std::function<void()>& body) {
    machine.fibers = std::vector<Fiber>(threads);
    for (Fiber& f : machine.fibers) f.stack.reset(new char[kStack]);
    machine.random = seed;
    machine.body = &body;
    for (unsigned b = 0; b < blocks; ++b) {
        machine.block.x = b;
        run_block(threads);
    }
}

template <class T>
uint64_t bits(T value) {
    static_assert(sizeof(T) <= 8);
    uint64_t out = 0;
    std::memcpy(&out, &value, sizeof(T));
    return out;
}

template <class T>
T from_bits(uint64_t value) {
    T out;
    std::memcpy(&out, &value, sizeof(T));
    return out;
}

}  // namespace cuda_on_cpu

#define threadIdx (dim3{cuda_on_cpu::machine.current, 0, 0})
#define blockIdx (cuda_on_cpu::machine.block)

inline void __syncthreads() { cuda_on_cpu::meet(cuda_on_cpu::Op::Block, 0, 0); }
inline int __syncthreads_or(int predicate) { return cuda_on_cpu::meet(cuda_on_cpu::Op::BlockOr, 0, predicate != 0) != 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_on_cpu::meet(cuda_on_cpu::Op::Sync, mask, 0); }
inline unsigned __ballot_sync(unsigned mask, int predicate) { return (unsigned)cuda_on_cpu::meet(cuda_on_cpu::Op::Ballot, mask, predicate != 0); }
inline unsigned __match_any_sync(unsigned mask, unsigned value) { return (unsigned)cuda_on_cpu::meet(cuda_on_cpu::Op::Match, mask, value); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
    return cuda_on_cpu::from_bits<T>(cuda_on_cpu::meet(cuda_on_cpu::Op::Xor, mask, cuda_on_cpu::bits(value), distance));
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
    return cuda_on_cpu::from_bits<T>(cuda_on_cpu::meet(cuda_on_cpu::Op::Up, mask, cuda_on_cpu::bits(value), distance));
}

inline int atomicAdd(int* at, int more) {
    // another thread may come between what precedes an atomic and the atomic
    if (cuda_on_cpu::draw() % 4 == 0) cuda_on_cpu::yield();
    const int before = *at;
    *at += more;
    return before;
}

template <class T>
T __ldg(const T* at) {
    if ((uintptr_t)at % sizeof(T)) cuda_on_cpu::fail("a misaligned load");
    return *at;
}

inline unsigned __float_as_uint(float x) { return cuda_on_cpu::from_bits<unsigned>(cuda_on_cpu::bits(x)); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::from_bits<float>(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return (unsigned)(((uint64_t)high << 32 | low) >> (shift & 31));
}
