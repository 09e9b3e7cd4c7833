// Splits rows (or segments) among threads. None is ever split, so its bits do not depend on the batch or on the thread count.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#endif

#include "types.h"

namespace distilkernels {

// Denormals to zero on this thread while it lives: a spread of 86 nats makes denormal exponentials, at ten times the cost. `inputs`
// too, unless the kernel must tell one denormal from another.
class FlushDenormals {
public:
    explicit FlushDenormals(bool inputs) : saved_(get()) { set(saved_ | (inputs ? kFlush : kFlushResults)); }
    ~FlushDenormals() { set(saved_); }
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;

private:
#if defined(__x86_64__)
    using Word = unsigned;
    static constexpr Word kFlush = 0x8040, kFlushResults = 0x8000;
    static Word get() { return _mm_getcsr(); }
    static void set(Word word) { _mm_setcsr(word); }
#elif defined(__aarch64__)
    using Word = uint64_t;
    static constexpr Word kFlush = 1u << 24, kFlushResults = 0;  // there is no mode for results alone
    static Word get() {
        Word word;
        asm volatile("mrs %0, fpcr" : "=r"(word));
        return word;
    }
    static void set(Word word) { asm volatile("msr fpcr, %0" : : "r"(word)); }
#else
    using Word = unsigned;
    static constexpr Word kFlush = 0, kFlushResults = 0;
    static Word get() { return 0; }
    static void set(Word) {}
#endif
    Word saved_;
};

#if defined(_OPENMP)
// Of an OpenMP pool a forked child inherits the memory but not the threads, and would wait for them in its first region.
inline bool& forked() {
    static bool value = false;
#if defined(__unix__) || defined(__APPLE__)
    static const int registered = pthread_atfork(nullptr, nullptr, [] { forked() = true; });
    (void)registered;
#endif
    return value;
}
#endif

// Kernels that order numbers, or move them, whose denormals count.
template <class Args>
constexpr bool orders = std::is_same<Args, TopkSelect>::value || std::is_same<Args, FilterRows>::value || std::is_base_of<DrawWeights, Args>::value ||
                        std::is_same<Args, RecurrenceUpdate>::value || std::is_same<Args, KvGather>::value;

// Below this many numbers a second thread costs more (about 5 µs to wake) than it saves.
constexpr int64_t kSerialNumbers = 1 << 15;

template <class Args>
void for_items(const Args& args, int threads, void (*kernel)(const Args&, Scratch&, int64_t, int64_t)) {
    const int64_t items = args.items();
#if defined(_OPENMP)
    const int64_t useful = args.numbers() < kSerialNumbers ? 1 : items;
    const int team = forked() ? 1 : int(std::min<int64_t>(threads, useful));
    if (team > 1) {
        std::vector<Scratch> scratch(team, Scratch(args));
#pragma omp parallel num_threads(team)
        {
            const FlushDenormals flush(!orders<Args>);
            const int64_t index = omp_get_thread_num(), size = omp_get_num_threads();
            kernel(args, scratch[index], items * index / size, items * (index + 1) / size);
        }
        return;
    }
#endif
    Scratch scratch(args);
    const FlushDenormals flush(!orders<Args>);
    kernel(args, scratch, 0, items);
}

}  // namespace distilkernels
