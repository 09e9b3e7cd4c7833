// Runs every kernel on small exact-size buffers; built with sanitizers by tests/test_cpp.py, never part of the extension.
#include <algorithm>
#include <cstdio>
#include <random>

#include "../../philox.h"
#include "../isa.h"
#include "../threads.h"

using namespace distilkernels;

int run_kv();  // kv.cpp

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
    std::vector<double> lse(n), tail(n), mu(n), sum(n), t1(n), top(n), second(n), coef(6 * n);
    std::vector<int64_t> finite(n), argmax(n), rank(n * k);
    std::vector<S> gathered(n * k), above(n * k), entries(n * k, S(1));
    const Rows rows{x.data(), outer, inner, vocab, inner * stride, stride};
    const Ids all{k ? ids.data() : nullptr, true, k};

    VocabStats a{dtype, rows, all, nullptr, head, lse.data(), tail.data(), mu.data(), sum.data(), t1.data(), top.data(), second.data(),
                 finite.data(), argmax.data(), rank.data(), gathered.data(), above.data()};
    for_items(a, 2, kernels().vocab_stats);
    // without masses the rank of a single id is counted in the sweep
    std::vector<int64_t> counted(n * k);
    a.rank = counted.data();
    a.mass_above = nullptr;
    for_items(a, 2, kernels().vocab_stats);
    if (counted != rank) {
        std::printf("%s dtype %d V %lld K %lld: ranks differ\n", isa().c_str(), int(dtype), (long long)vocab, (long long)k);
        ++failures;
    }
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

// The tail and the draws are not checked, the selection and the ids' range are; all are run on rows with ties, −inf and a NaN.
template <class T, class S>
void run_capture(DType dtype, int64_t n, int64_t vocab, int64_t pad, int64_t k, Head head, bool coarse) {
    std::normal_distribution<double> normal(0, 3);
    // the last row has no padding behind it
    std::vector<T> x((n - 1) * (vocab + pad) + vocab);
    for (T& v : x) narrow(coarse ? std::round(normal(generator)) : normal(generator), v);
    const Rows rows{x.data(), 1, n, vocab, 0, vocab + pad};
    if (n > 1) {
        narrow(kNaN, rows.row<T>(0)[head.columns / 2]);
        for (int64_t c = 0; c < vocab; ++c)
            if (c % 7) narrow(-kInf, rows.row<T>(1)[c]);
    }
    std::vector<S> values(n * k);
    std::vector<int32_t> ids(n * k);
    std::vector<double> lse(n), tail(n);
    std::vector<int64_t> seeds(n, 5), positions(n, -1);
    for_items(TopkSelect{dtype, rows, head, k, values.data(), ids.data(), lse.data(), tail.data()}, 2, kernels().topk_select);
    const double sign = head.scale < 0 ? -1 : head.scale > 0;
    for (int64_t r = n > 1; r < n; ++r) {
        std::vector<int32_t> expected(head.columns);
        for (int32_t c = 0; c < head.columns; ++c) expected[c] = c;
        const auto at = [&](int32_t c) { return sign == 0 ? 0 : sign * double(widen(rows.row<T>(r)[c])); };
        std::stable_sort(expected.begin(), expected.end(), [&](int32_t i, int32_t j) { return at(i) > at(j); });
        if (!std::equal(ids.begin() + r * k, ids.begin() + (r + 1) * k, expected.begin())) {
            std::printf("%s dtype %d V %lld K %lld row %lld: wrong ids\n", isa().c_str(), int(dtype), (long long)vocab, (long long)k, (long long)r);
            ++failures;
        }
    }
    for (double tau : {1.0, 0.6}) {
        for_items(DrawRows{dtype, rows, head, tau, seeds.data(), positions.data(), k, ids.data(), values.data(), lse.data(), tail.data()}, 2,
                  kernels().draw_rows);
        for (int64_t i = 0; i < n * k; ++i) {
            const bool nothing = !std::isfinite(lse[i / k]);
            if (nothing ? ids[i] != -1 : ids[i] < 0 || ids[i] >= head.columns || !(values[i] > -kInf)) {
                std::printf("%s dtype %d V %lld: drew %d\n", isa().c_str(), int(dtype), (long long)vocab, int(ids[i]));
                ++failures;
            }
        }
    }
}

// Both KLs of rows on exact-size buffers, the teacher's of another dtype and width.
template <class T, class U>
void run_pair(DType dtype, DType teacher_dtype, int64_t n, int64_t vocab, int64_t pad, Head head, Second second, double tolerance) {
    const int64_t stride = vocab + pad, wide = head.columns + pad;
    std::normal_distribution<double> normal(0, 3);
    std::vector<T> x(n * stride), fresh(n * vocab);
    std::vector<U> y(n * wide);
    for (T& v : x) narrow(normal(generator), v);
    for (U& v : y) narrow(normal(generator), v);
    std::vector<double> out(n * kPairStats), coef(n * kPairCoefficients, 0.5), weights(n, 0.3);
    const Rows rows{x.data(), 1, n, vocab, n * stride, stride}, teacher{y.data(), 1, n, head.columns, n * wide, wide};
    const Head theirs{head.temperature, 1, 0, head.columns};
    for_items(PairStats{dtype, teacher_dtype, rows, teacher, head, theirs, true, second, weights.data(), out.data()}, 2, kernels().pair_stats);
    for (int64_t r = 0; r < n; ++r) {
        std::vector<double> z, t;
        double q = 0, p = 0, kl = 0;
        for (int64_t v = 0; v < head.columns; ++v) {
            double at = double(widen(rows.row<T>(r)[v])) * head.scale;
            if (head.softcap != 0) at = head.softcap * std::tanh(at / head.softcap);
            z.push_back(at / head.temperature);
            t.push_back(double(widen(teacher.row<U>(r)[v])) / head.temperature);
            q += std::exp(z.back());
            p += std::exp(t.back());
        }
        for (int64_t v = 0; v < head.columns; ++v) kl += std::exp(t[v]) / p * (t[v] - z[v] + std::log(q / p));
        const double* s = out.data() + kPairStats * r;
        const double error = std::abs(s[2] - s[1] + s[0] - kl);
        if (!(error < tolerance * (1 + kl))) {
            std::printf("%s dtypes %d %d V %lld: forward KL off by %g\n", isa().c_str(), int(dtype), int(teacher_dtype), (long long)vocab, error);
            ++failures;
        }
        std::copy_n(s, 2, coef.begin() + kPairCoefficients * r);
        coef[kPairCoefficients * r + 7] = s[6];
    }
    PairStatsBackward b{dtype, teacher_dtype, rows, teacher, coef.data(), true, second, head, theirs, {fresh.data(), 1, n, vocab, n * vocab, vocab}};
    for_items(b, 2, kernels().pair_stats_backward);
    b.out = rows;
    b.with_t1 = false;
    for_items(b, 2, kernels().pair_stats_backward);
}

template <class O, class T, class S>
void run_gather_dot(DType operand, DType rows, int64_t n, int64_t vocab, int64_t width, int64_t pad, int64_t k, double tolerance) {
    std::normal_distribution<double> normal;
    // the last row has no padding behind it
    std::vector<O> h(n ? (n - 1) * (width + pad) + width : 0);
    std::vector<T> w((vocab - 1) * (width + pad) + width), dw(vocab * width);
    for (O& v : h) narrow(normal(generator), v);
    for (T& v : w) narrow(normal(generator), v);
    std::vector<int64_t> ids(n * k), order(n * k), targets(n * k);
    for (int64_t i = 0; i < n * k; ++i) {
        ids[i] = int64_t(generator() % (vocab + 2)) - 1;
        order[i] = i;
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return ids[i] < ids[j]; });
    for (int64_t i = 0; i < n * k; ++i) targets[i] = ids[order[i]];
    std::vector<S> z(n * k), grad(n * k, S(1)), dh(n * width);
    const Matrix hidden{operand, h.data(), n, width, width + pad}, weight{rows, w.data(), vocab, width, width + pad};
    const Ids all{ids.data(), true, k};
    for_items(GatherDot{hidden, weight, all, z.data()}, 2, kernels().gather_dot);
    for_items(GatherDotHiddenGrad{operand, grad.data(), weight, all, n, dh.data()}, 2, kernels().gather_dot_hidden_grad);
    for_items(GatherDotWeightGrad{grad.data(), k, hidden, order.data(), targets.data(), n * k, {rows, dw.data(), vocab, width, width}}, 2,
              kernels().gather_dot_weight_grad);
    for (int64_t at = 0; at < n * k; ++at) {
        double expected = 0;
        for (int64_t c = 0; c < width && ids[at] >= 0 && ids[at] < vocab; ++c) {
            O entry;
            narrow(widen(weight.row<T>(ids[at])[c]), entry);
            expected += double(widen(hidden.row<O>(at / k)[c])) * double(widen(entry));
        }
        if (!(std::abs(double(z[at]) - expected) < tolerance * (1 + width))) {
            std::printf("%s dtypes %d %d H %lld: product %g, not %g\n", isa().c_str(), int(operand), int(rows), (long long)width, double(z[at]), expected);
            ++failures;
        }
    }
}

}  // namespace

int main() {
    // a published vector of the generator
    const PhiloxWords words = philox(0x299F31D0A4093822, {0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344});
    if (words.x != 0xd16cfe09 || words.y != 0x94fdcceb || words.z != 0x5001e420 || words.w != 0x24126ea1) {
        std::puts("Philox differs from its known answer");
        ++failures;
    }
    for (const std::string& name : available_isas()) {
        set_isa(name);
        failures += run_kv();
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
        for (int64_t vocab : {1, 15, 64, 257, 4099}) {
            for (int64_t k : {int64_t(1), (vocab + 2) / 3, std::min<int64_t>(vocab, 1024)}) {
                for (bool coarse : {false, true}) {
                    run_capture<float, float>(DType::f32, 4, vocab, 3, k, {1, 1, 0, vocab}, coarse);
                    run_capture<bf16, float>(DType::bf16, 3, vocab, 0, k, {0.7, -1.5, 0, vocab}, coarse);
                    run_capture<f16, float>(DType::f16, 3, vocab, 1, std::min(k, (vocab + 1) / 2), {2, 1, 5, (vocab + 1) / 2}, coarse);
                    run_capture<double, double>(DType::f64, 1, vocab, 0, k, {1, 1, 0, vocab}, coarse);
                }
            }
        }
        for (int64_t vocab : {1, 3, 33, 64, 2049, 4099}) {
            for (Head head : {Head{1, 1, 0, vocab}, Head{0.7, 1.5, 0, (vocab + 1) / 2}, Head{2, 1, 5, vocab}}) {
                for (Second second : {Second::none, Second::mixture, Second::power, Second::distance, Second::balance}) {
                    run_pair<float, bf16>(DType::f32, DType::bf16, 3, vocab, 1, head, second, 1e-5);
                    run_pair<bf16, float>(DType::bf16, DType::f32, 2, vocab, 0, head, second, 1e-5);
                    run_pair<f16, f16>(DType::f16, DType::f16, 1, vocab, 5, head, second, 1e-5);
                    run_pair<double, double>(DType::f64, DType::f64, 2, vocab, 0, head, second, 1e-11);
                }
            }
        }
        for (int64_t width : {1, 7, 64, 67, 131}) {
            for (int64_t k : {0, 1, 5}) {
                run_gather_dot<float, float, float>(DType::f32, DType::f32, 70, 4, width, 3, k, 1e-6);
                run_gather_dot<bf16, bf16, float>(DType::bf16, DType::bf16, 3, 50, width, 0, k, 1e-6);
                run_gather_dot<bf16, float, float>(DType::bf16, DType::f32, 3, 50, width, 1, k, 1e-6);
                run_gather_dot<f16, double, float>(DType::f16, DType::f64, 1, 3, width, 0, k, 1e-6);
                run_gather_dot<double, f16, double>(DType::f64, DType::f16, 2, 3, width, 1, k, 1e-13);
            }
        }
    }
    std::puts(failures ? "FAILED" : "clean");
    return failures != 0;
}
