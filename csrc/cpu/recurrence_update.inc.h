// LazyEviction's two integers a token; primitives/recurrence_update.py is the definition. Included inside each ISA's namespace.

template <class T>
inline void update_head(const RecurrenceUpdate& a, int64_t b, int64_t h) {
    constexpr int64_t together = 64;
    const int64_t groups = a.attention.heads / a.heads, tokens = a.attention.width;
    int32_t* last_seen = a.last_seen + b * a.last_strides[0] + h * a.last_strides[1];
    int32_t* max_interval = a.max_interval + b * a.interval_strides[0] + h * a.interval_strides[1];
    const auto alpha = decltype(widen(T()))(a.alpha);
    for (int64_t t = 0; t < tokens; t += together) {
        const int64_t n = std::min(together, tokens - t);
        for (int64_t w = 0; w < a.attention.length; ++w) {
            uint8_t seen[together] = {};
            for (int64_t g = 0; g < groups; ++g) {
                const T* row = a.attention.row<const T>(b, h * groups + g, w) + t;
                for (int64_t i = 0; i < n; ++i) seen[i] |= widen(row[i]) > alpha;
            }
            const int32_t step = int32_t(a.first_step + w);
            for (int64_t i = 0; i < n; ++i) {
                const int32_t gap = std::max(max_interval[t + i], step - last_seen[t + i]);
                max_interval[t + i] = seen[i] ? gap : max_interval[t + i];
                last_seen[t + i] = seen[i] ? step : last_seen[t + i];
            }
        }
    }
}

inline void recurrence_update(const RecurrenceUpdate& a, Scratch&, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item)
        visit_dtype(a.attention.dtype, [&](auto, auto t) { update_head<decltype(t)>(a, item / a.heads, item % a.heads); });
}
