// Attention of a window of queries to every key; primitives/window_importance.py is the definition. Included inside each ISA's
// namespace.
//
// Lanes are rows of queries, so that a key's products with all of them are side by side: maxima and sums over keys are then vertical,
// and those over heads are unaligned loads, heads being W lanes apart. Lanes past the last hold what follows and are never summed.
// Only keys and queries that count are touched. Exponentials of one chunk of queries stay in memory, each relative to the maximum
// that its tile knew, until their sums are known: a second product would cost ten times the reading.

struct ImportanceOfHead {
    const WindowImportance& a;
    ImportanceSpace s;
    int64_t b, kv_head, keys, queries;  // counts of those that count
    int64_t width, lanes;               // queries in the chunk; lanes of probabilities
    float share;                        // of a probability in the result
};

// How keys of T meet queries: as they are where that is exact, else both in float.
template <class T>
struct WordsOf {
    using type = Singles<Float>;
    static constexpr int64_t each = 1;  // entries a word
};
#if defined(DISTILKERNELS_NATIVE_BF16)
template <>
struct WordsOf<bf16> {
    using type = Pairs;
    static constexpr int64_t each = 2;
};
#endif

// The chunk's queries [first, first + width) of every head in the group, packed; zeros behind them.
template <class T>
inline void pack_queries(const ImportanceOfHead& h, int64_t first) {
    using Words = typename WordsOf<T>::type;
    constexpr int64_t each = WordsOf<T>::each;
    const int64_t groups = h.a.groups(), columns = up_to(groups * h.width, Float::width), depth = h.a.keys.width, words = up_to(depth, each) / each;
    auto* packed = reinterpret_cast<typename Words::Word*>(h.s.packed);
    for (int64_t c = 0; c < columns; ++c) {
        const bool real = c < groups * h.width;
        const int64_t w = real ? h.s.query[first + c % h.width] : 0;
        const T* q = real ? h.a.queries.row<const T>(h.b, h.kv_head * groups + c / h.width, w) : nullptr;
        for (int64_t d = 0; d < words; ++d) {
            typename Words::Entry word[each] = {};
            for (int64_t i = 0; i < each && real && d * each + i < depth; ++i) narrow(widen(q[d * each + i]), word[i]);
            std::memcpy(packed + packed_at<Float>(c, d, columns, words), word, sizeof(word));
        }
    }
}

// Logits of keys [begin, begin + count), at most a tile, in `products`; −inf where a query does not see a key.
template <class T>
inline void logits_of_tile(const ImportanceOfHead& h, int64_t first, int64_t begin, int64_t count) {
    using Words = typename WordsOf<T>::type;
    using Entry = typename Words::Entry;
    constexpr int64_t each = WordsOf<T>::each;
    const int64_t groups = h.a.groups(), depth = h.a.keys.width;
    const Entry* rows[ImportanceSpace::kTile];
    for (int64_t i = 0; i < up_to(count, kRowsAtOnce); ++i) {
        if (i >= count) {
            rows[i] = rows[0];
            continue;
        }
        const T* key = h.a.keys.row<const T>(h.b, h.kv_head, h.s.position[begin + i]);
        float* copy = h.s.widened + i * padded(depth);
        if constexpr (std::is_same<T, Entry>::value) {
            rows[i] = key;
            if (depth % each == 0) continue;
            auto* whole = reinterpret_cast<Entry*>(copy);
            std::memcpy(whole, key, depth * sizeof(Entry));
            whole[depth] = Entry();
            rows[i] = whole;
        } else {
            widen_row<Float>(key, depth, 1, copy);
            rows[i] = copy;
        }
    }
    products<Float, Words>(reinterpret_cast<const typename Words::Word*>(h.s.packed), up_to(groups * h.width, Float::width), rows,
                           up_to(count, kRowsAtOnce), up_to(depth, each) / each, float(h.a.scale), h.s.products, h.s.row_stride);
    if (!h.a.causal) return;
    const int64_t window = int64_t(h.a.counted.stop[h.b]) - h.a.queries.length;  // the position of query 0
    for (int64_t i = count; i-- > 0 && h.s.position[begin + i] > window;)
        for (int64_t w = 0; w < h.width && h.s.query[first + w] < h.s.position[begin + i] - window; ++w)
            for (int64_t g = 0; g < groups; ++g) h.s.products[i * h.s.row_stride + g * h.width + w] = -std::numeric_limits<float>::infinity();
}

// The larger, NaN where one is: `all` is the second operand, which max gives back where either is NaN.
template <class V>
inline typename V::F max_or_nan(typename V::F all, typename V::F x) {
    return V::select(V::nan(x), x, V::max(x, all));
}

// e^{l − ref} of a tile's logits in `exps`, ref the maximum so far (or the given lse), left in `tile_ref`; sums go on.
inline void exponentials_of_tile(const ImportanceOfHead& h, int64_t count, float* exps, float* tile_ref) {
    using V = Float;
    using F = V::F;
    const float* logits = h.s.products;
    int64_t stride = h.s.row_stride;
    if (h.a.group_reduce == GroupReduce::max_logits) {
        for (int64_t i = 0; i < count; ++i)
            for (int64_t w = 0; w < h.width; w += V::width) {
                F top = V::load(logits + i * stride + w);
                for (int64_t g = 1; g < h.a.groups(); ++g) top = max_or_nan<V>(top, V::load(logits + i * stride + g * h.width + w));
                V::store(exps + i * h.s.lane_stride + w, top);
            }
        logits = exps;
        stride = h.s.lane_stride;
    }
    for (int64_t l = 0; l < h.lanes; l += V::width) {
        const F before = V::load(h.s.ref + l);
        F ref = before;
        if (!h.a.lse)
            for (int64_t i = 0; i < count; ++i) ref = V::max(ref, V::load(logits + i * stride + l));
        V::store(h.s.ref + l, ref);
        V::store(tile_ref + l, ref);
        // no key was seen so far: every exponential is 0, not that of −inf + inf
        const F finite = V::select(V::gt(V::set(-std::numeric_limits<float>::max()), ref), V::set(0), ref);
        F sum = V::set(0);
        for (int64_t i = 0; i < count; ++i) {
            F d = V::load(logits + i * stride + l) - finite;
            const F e = exp_clamped(V(), d);
            V::store(exps + i * h.s.lane_stride + l, e);
            sum = sum + e;
        }
        if (h.a.lse) continue;
        F rescale = V::select(V::gt(ref, before), before - finite, V::set(0));
        rescale = exp_clamped(V(), rescale);
        // Kahan's sum: there are hundreds of tiles
        const F old = V::load(h.s.sum + l) * rescale, more = sum - V::load(h.s.lost + l) * rescale, total = old + more;
        V::store(h.s.lost + l, (total - old) - more);
        V::store(h.s.sum + l, total);
    }
}

// Adds a tile's probabilities e·factor, reduced over the group and the window, to the results of its keys.
template <GroupReduce group, bool largest>
inline void reduce_tile(const ImportanceOfHead& h, int64_t begin, int64_t count, const float* exps, const float* factor) {
    using V = Float;
    using F = V::F;
    const int64_t groups = h.a.groups(), results = group == GroupReduce::none ? groups : 1;
    const int64_t heads = group == GroupReduce::max_probs || group == GroupReduce::mean_probs ? groups : 1;
    float* out = h.a.out + (h.b * h.a.keys.heads + h.kv_head) * results * h.a.keys.length;
    float order[V::width];
    for (int i = 0; i < V::width; ++i) order[i] = float(i);
    const F lane = V::load(order);
    for (int64_t i = 0; i < count; ++i) {
        const float* e = exps + i * h.s.lane_stride;
        for (int64_t r = 0; r < results; ++r) {
            F all = V::set(0);
            for (int64_t w = 0; w < h.width; w += V::width) {
                const int64_t at = r * h.width + w;
                F p = V::load(e + at) * V::load(factor + at);
                for (int64_t g = 1; g < heads; ++g) {
                    const F other = V::load(e + at + g * h.width) * V::load(factor + at + g * h.width);
                    p = group == GroupReduce::mean_probs ? p + other : max_or_nan<V>(p, other);
                }
                if (h.width - w < V::width) p = V::keep(V::gt(V::set(float(h.width - w)), lane), p);
                all = largest ? max_or_nan<V>(all, p) : all + p;
            }
            float& to = out[r * h.a.keys.length + h.s.position[begin + i]];
            if (!largest) to += float(V::sum(all)) * h.share;
            else if (V::bits(V::nan(all))) to = std::numeric_limits<float>::quiet_NaN();
            else if (!std::isnan(to)) to = std::max(to, V::top(all) * h.share);
        }
    }
}

inline void reduce_tile(const ImportanceOfHead& h, int64_t begin, int64_t count, const float* exps, const float* factor) {
    const auto by_window = [&](auto group) {
        constexpr GroupReduce reduce = decltype(group)::value;
        if (h.a.window_reduce == WindowReduce::max) reduce_tile<reduce, true>(h, begin, count, exps, factor);
        else reduce_tile<reduce, false>(h, begin, count, exps, factor);
    };
    switch (h.a.group_reduce) {
        case GroupReduce::max_logits: return by_window(std::integral_constant<GroupReduce, GroupReduce::max_logits>());
        case GroupReduce::max_probs: return by_window(std::integral_constant<GroupReduce, GroupReduce::max_probs>());
        case GroupReduce::mean_probs: return by_window(std::integral_constant<GroupReduce, GroupReduce::mean_probs>());
        case GroupReduce::none: return by_window(std::integral_constant<GroupReduce, GroupReduce::none>());
    }
}

// What each tile's exponentials are multiplied by to be probabilities, in place of their references.
inline void factors_of_tiles(const ImportanceOfHead& h, int64_t tiles) {
    using V = Float;
    for (int64_t l = 0; l < h.lanes; l += V::width) {
        const auto sum = V::load(h.s.sum + l), ref = V::load(h.s.ref + l);
        // 0 where nothing was seen; NaN stays
        const auto some = V::select(V::gt(V::set(std::numeric_limits<float>::min()), sum), V::set(0), V::set(1) / sum);
        for (int64_t t = 0; t < tiles; ++t) {
            float* at = h.s.tile_ref + t * h.s.lane_stride + l;
            const auto own = V::load(at);
            auto d = V::select(V::gt(ref, own), own - ref, V::set(0));
            V::store(at, exp_clamped(V(), d) * some);
        }
    }
}

template <class T>
inline void importance_of_chunk(ImportanceOfHead& h, int64_t first) {
    constexpr int64_t tile = ImportanceSpace::kTile;
    const int64_t groups = h.a.groups();
    pack_queries<T>(h, first);
    std::fill_n(h.s.ref, h.s.lane_stride, -std::numeric_limits<float>::infinity());
    for (float* v : {h.s.sum, h.s.lost}) std::fill_n(v, h.s.lane_stride, 0.0f);
    if (h.a.lse) {
        std::fill_n(h.s.sum, h.s.lane_stride, 1.0f);
        for (int64_t l = 0; l < h.lanes; ++l) {
            const float lse = h.a.lse[(h.b * h.a.queries.heads + h.kv_head * groups + l / h.width) * h.a.queries.length + h.s.query[first + l % h.width]];
            const bool some = lse != -std::numeric_limits<float>::infinity();  // the query has keys
            h.s.ref[l] = some ? lse : std::numeric_limits<float>::max();
            if (!some) h.s.sum[l] = 0;
        }
    }
    for (int64_t begin = 0, t = 0; begin < h.keys; begin += tile, ++t) {
        const int64_t count = std::min(tile, h.keys - begin), slot = h.a.lse ? 0 : t;
        float *exps = h.s.exps + slot * tile * h.s.lane_stride, *ref = h.s.tile_ref + slot * h.s.lane_stride;
        logits_of_tile<T>(h, first, begin, count);
        exponentials_of_tile(h, count, exps, ref);
        if (h.a.lse) reduce_tile(h, begin, count, exps, h.s.sum);
    }
    if (h.a.lse) return;
    factors_of_tiles(h, (h.keys + tile - 1) / tile);
    for (int64_t begin = 0, t = 0; begin < h.keys; begin += tile, ++t)
        reduce_tile(h, begin, std::min(tile, h.keys - begin), h.s.exps + t * tile * h.s.lane_stride, h.s.tile_ref + t * h.s.lane_stride);
}

inline void window_importance(const WindowImportance& a, Scratch& scratch, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
        ImportanceOfHead h{a, ImportanceSpace(a, scratch.space.data()), item / a.keys.heads, item % a.keys.heads, 0, 0, 0, 0, 1};
        h.keys = a.counted.list(h.b, a.keys.length, h.s.position);
        for (int64_t w = 0; w < a.queries.length; ++w)
            if (!a.query_mask || a.query_mask[h.b * a.queries.length + w]) h.s.query[h.queries++] = int32_t(w);
        const int64_t results = a.group_reduce == GroupReduce::none ? a.groups() : 1;
        std::fill_n(a.out + item * results * a.keys.length, results * a.keys.length, 0.0f);
        if (a.window_reduce == WindowReduce::mean) h.share /= float(std::max<int64_t>(1, h.queries));
        if (a.group_reduce == GroupReduce::mean_probs) h.share /= float(a.groups());
        for (int64_t first = 0; first < h.queries && h.keys; first += a.chunk()) {
            h.width = std::min(a.chunk(), h.queries - first);
            h.lanes = a.group_reduce == GroupReduce::max_logits ? h.width : h.width * a.groups();
            visit_narrow(a.keys.dtype, [&](auto t) { importance_of_chunk<decltype(t)>(h, first); });
        }
        if (a.sums.similarity) key_redundancy(a.sums, scratch, item, item + 1);  // while the head is in cache
    }
}
