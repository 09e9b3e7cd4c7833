// The kernels on caches on small exact-size buffers; see main.cpp. Returns how many results were wrong.
#include <cstdio>
#include <random>

#include "../isa.h"
#include "../threads.h"

using namespace distilkernels;

namespace {

std::mt19937 random_bits(1);

// Rows of one head after the other, with a gap between rows and none behind the last.
template <class T>
struct Held {
    std::vector<T> data;
    Cache cache;

    Held(DType dtype, int64_t batch, int64_t heads, int64_t length, int64_t width, int64_t gap) {
        const int64_t stride = width + gap, rows = batch * heads * length;
        data.resize((rows - 1) * stride + width);
        std::normal_distribution<double> normal;
        for (T& x : data) narrow(normal(random_bits), x);
        cache = {dtype, data.data(), batch, heads, length, width, heads * length * stride, length * stride, stride};
    }
};

int wrong(bool bad, const char* what, int64_t length, int64_t width) {
    if (bad) std::printf("%s %s T %lld D %lld\n", isa().c_str(), what, (long long)length, (long long)width);
    return bad;
}

template <class T>
int run_scores(DType dtype, int64_t length, int64_t width, int64_t groups, int64_t window) {
    int failures = 0;
    const int64_t batch = 2, heads = 2;
    Held<T> keys(dtype, batch, heads, length, width, 3), queries(dtype, batch, heads * groups, window, width, 0);
    std::vector<int32_t> start{0, int32_t(length / 3)}, stop{int32_t(length), int32_t(length)}, last(batch * heads * length);
    std::vector<uint8_t> mask(batch * length, 1), query_mask(batch * window, 1);
    for (int64_t t = 0; t + 1 < length; t += 5) mask[t] = 0;
    query_mask[0] = window < 2;
    const Counted counted{start.data(), stop.data(), mask.data()};
    std::vector<float> similarity(batch * heads * length), cosine(batch * heads * length), lse(batch * heads * groups * window, 3.0f);
    const KeyRedundancy redundancy{keys.cache, counted, 0.4, similarity.data(), last.data(), cosine.data()};
    for_items(redundancy, 2, kernels().key_redundancy);
    for (int64_t i = 0; i < batch * heads * length; ++i) {
        const int64_t b = i / (heads * length), t = i % length;
        const bool counts = mask[b * length + t] && t >= start[b];
        const bool bad = counts ? last[i] < 0 || last[i] >= length || !(std::abs(cosine[i]) < 1.001) : last[i] != -1 || similarity[i] != 0;
        failures += wrong(bad, "neighbour", length, width);
    }
    for (int reduce = 0; reduce < 4; ++reduce) {
        for (int over = 0; over < 3; ++over) {
            for (const float* given : {static_cast<const float*>(nullptr), static_cast<const float*>(lse.data())}) {
                if (given && reduce == 0) continue;
                std::vector<float> out(batch * heads * (reduce == 3 ? groups : 1) * length, -1.0f);
                WindowImportance a{queries.cache, keys.cache, counted, query_mask.data(), 0.3, GroupReduce(reduce), WindowReduce(over), over == 1,
                                   given, out.data(), redundancy};
                a.sums.last = nullptr;
                for_items(a, 2, kernels().window_importance);
                double sum = 0;
                for (float x : out) {
                    failures += wrong(!(x >= 0), "importance", length, width);
                    sum += x;
                }
                // means over queries of probabilities add up to one
                const double rows = double(out.size()) / double(length);
                if (reduce != 1 && over == 0 && !given) failures += wrong(!(std::abs(sum - rows) < 1e-4 * rows), "probabilities", length, width);
            }
        }
    }
    return failures;
}

template <class T>
int run_gather(DType dtype, int64_t length, int64_t width, bool interleaved) {
    int failures = 0;
    const int64_t slots = length / 2 + 1, pairs = width / 2;
    Held<T> keys(dtype, 1, 2, length, width, 1), values(dtype, 1, 2, length, width + 2, 0);
    Held<T> out_keys(dtype, 1, 2, slots, width, 0), out_values(dtype, 1, 2, slots, width + 2, 0);
    std::vector<int32_t> indices(2 * slots, -1), source(2 * slots), target(2 * slots, int32_t(length) - 1);
    for (int64_t i = 0; i < 2 * slots; ++i)
        if (2 * (i % slots) < length) source[i] = indices[i] = int32_t(2 * (i % slots));
    std::vector<float> cos(length * pairs, 0.6f), sin(length * pairs, 0.8f);
    KvGather a{keys.cache, values.cache, indices.data(), {cos.data(), sin.data(), source.data(), target.data(), length, 2 * pairs, interleaved},
               out_keys.cache, out_values.cache};
    for_items(a, 2, kernels().kv_gather);
    for (int64_t m = 0; m < slots; ++m) {
        // from one position to another of the same angle
        const int32_t index = indices[slots + m];
        const double want = index < 0 ? 0 : double(widen(keys.cache.template row<T>(0, 1, index)[0]));
        const double got = double(widen(out_keys.cache.template row<T>(0, 1, m)[0]));
        failures += wrong(!(std::abs(got - want) < 0.02 * (1 + std::abs(want))), "gathered key", length, width);
    }
    a.rotation = {};
    a.out_keys = keys.cache;
    a.out_values = values.cache;
    a.out_keys.length = a.out_values.length = std::min(slots, length);
    std::vector<int32_t> ascending(2 * length, -1);
    for (int64_t i = 0; i < 2 * a.out_keys.length; ++i) ascending[i] = 2 * int32_t(i % a.out_keys.length) < length ? 2 * int32_t(i % a.out_keys.length) : -1;
    a.indices = ascending.data();
    for_items(a, 2, kernels().kv_gather);
    return failures;
}

template <class S, class T>
int run_align(DType student, DType teacher, int64_t slots, int64_t width) {
    int failures = 0;
    Held<S> s(student, 2, 1, slots, width, 5);
    Held<T> t(teacher, 2, 1, slots, width, 0);
    std::vector<uint8_t> mask(2 * slots, 1);
    mask[0] = 0;
    for (int loss = 0; loss < 4; ++loss) {
        for (int normalize = 0; normalize < 3; ++normalize) {
            std::vector<S> masked(2 * slots * width), nothing(2 * slots * width);
            const double coef[2] = {0.5, 0};
            double sums[2];
            const KvAlign a{{{s.cache, t.cache, mask.data(), {slots, slots, 1}, masked.data()}, {s.cache, t.cache, nullptr, {0, 0, 0}, nothing.data()}},
                            Loss(loss), 0.7, Normalize(normalize), coef, sums};
            for_items(a, 2, kernels().kv_align);
            failures += wrong(normalize == 0 && !(sums[0] >= -1e-6 && sums[1] >= sums[0] - 1e-4), "distance", slots, width);
            for (const S& g : nothing) failures += wrong(widen(g) != 0, "gradient of nothing", slots, width);
        }
    }
    return failures;
}

template <class T>
int run_recurrence(DType dtype, int64_t length) {
    Held<T> attention(dtype, 1, 4, 3, length, 1);
    std::vector<int32_t> last(2 * length, 0), interval(2 * length, 0);
    const RecurrenceUpdate a{attention.cache, 2, 7, -100, last.data(), interval.data(), {2 * length, length}, {2 * length, length}};
    for_items(a, 2, kernels().recurrence_update);
    int failures = 0;
    for (int64_t i = 0; i < 2 * length; ++i) failures += wrong(last[i] != 9 || interval[i] != 7, "recurrence", length, 0);
    return failures;
}

}  // namespace

int run_kv() {
    int failures = 0;
    for (const auto& [length, width] : {std::pair<int64_t, int64_t>{1, 1}, {7, 5}, {50, 16}, {131, 20}, {200, 33}}) {
        failures += run_scores<float>(DType::f32, length, width, 3, 5) + run_scores<bf16>(DType::bf16, length, width, 1, 17) +
                    run_scores<f16>(DType::f16, length, width, 2, 1);
        failures += run_gather<float>(DType::f32, length, width, true) + run_gather<bf16>(DType::bf16, length, width, false) +
                    run_gather<double>(DType::f64, length, width, false);
        failures += run_align<float, float>(DType::f32, DType::f32, length, width) + run_align<bf16, f16>(DType::bf16, DType::f16, length, width);
        failures += run_recurrence<float>(DType::f32, length) + run_recurrence<f16>(DType::f16, length) + run_recurrence<double>(DType::f64, length);
    }
    return failures;
}
