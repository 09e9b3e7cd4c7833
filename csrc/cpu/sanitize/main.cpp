// Runs every kernel on small exact-size buffers; built with sanitizers by tests/test_cpp.py, never part of the extension.
#include <cstdio>
#include <random>

#include "../isa.h"
#include "../threads.h"

using namespace distilkernels;

namespace {

std::mt19937 generator(0);
int failures = 0;

template <class T, class S>
void run(DType dtype, int64_t outer, int64_t inner, int64_t vocab, int64_t pad, int64_t k, Head head, double tolerance) {
    const int64_t n = outer * inner, stride = vocab + pad;
    std::normal_distribution<double> normal(0, 4);
    std::vector<T> x(n * stride), fresh(n * vocab);
    for (T& v : x) narrow(normal(generator), v);
    if (n > 1) narrow(-kInf, x[0]);
    std::vector<int64_t> ids(n * k);
    for (int64_t i = 0; i < n * k; ++i) ids[i] = int64_t(generator() % (vocab + 2)) - 1;
    std::vector<double> lse(n), tail(n), mu(n), sum(n), t1(n), top(n), coef(6 * n);
    std::vector<int64_t> finite(n), argmax(n), rank(n * k);
    std::vector<S> gathered(n * k), above(n * k), entries(n * k, S(1));
    const Rows rows{x.data(), outer, inner, vocab, inner * stride, stride};
    const Ids all{k ? ids.data() : nullptr, true, k};

    VocabStats a{dtype, rows, all, nullptr, head, lse.data(), tail.data(), mu.data(), sum.data(), t1.data(), top.data(),
                 finite.data(), argmax.data(), rank.data(), gathered.data(), above.data()};
    for_items(a, 2, kernels().vocab_stats);
    for (int64_t r = 0; r < n; ++r) {
        double expected = 0;
        for (int64_t v = 0; v < head.columns; ++v) {
            double z = double(widen(rows.row<T>(r)[v])) * head.scale;
            if (head.softcap != 0) z = head.softcap * std::tanh(z / head.softcap);
            expected += std::exp(z / head.temperature);
        }
        const double error = std::abs(lse[r] - std::log(expected));
        if (!(error < tolerance) && expected > 0) {
            std::printf("%s dtype %d V %lld K %lld: lse off by %g\n", isa().c_str(), int(dtype), (long long)vocab, (long long)k, error);
            ++failures;
        }
        for (int i = 0; i < 6; ++i) coef[6 * r + i] = i == 0 || i == 5 ? lse[r] : 0.5;
    }
    VocabStatsBackward b{dtype, rows, all, entries.data(), sizeof(S) == 8, coef.data(), true, head, {fresh.data(), outer, inner, vocab, inner * vocab, vocab}};
    for_items(b, 2, kernels().vocab_stats_backward);
    b.out = rows;
    b.constant_or_t1 = false;
    for_items(b, 2, kernels().vocab_stats_backward);
}

}  // namespace

int main() {
    for (const std::string& name : available_isas()) {
        set_isa(name);
        for (int64_t vocab : {1, 3, 15, 64, 65, 257, 4099}) {
            for (int64_t k : {int64_t(0), int64_t(1), vocab}) {
                for (Head head : {Head{1, 1, 0, vocab}, Head{0.7, 1.5, 0, (vocab + 1) / 2}, Head{2, 1, 5, vocab}}) {
                    run<float, float>(DType::f32, 2, 3, vocab, 1, k, head, 1e-5);
                    run<bf16, float>(DType::bf16, 1, 9, vocab, 0, k, head, 1e-5);
                    run<f16, float>(DType::f16, 3, 1, vocab, 5, k, head, 1e-5);
                    run<double, double>(DType::f64, 1, 1, vocab, 0, k, head, 1e-12);
                }
            }
        }
    }
    std::puts(failures ? "FAILED" : "clean");
    return failures != 0;
}
