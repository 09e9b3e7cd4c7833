// Selected keys and values side by side; primitives/kv_gather.py is the definition. Included inside each ISA's namespace.

// cos and sin, of feature pair i, of the angle from one position to another.
template <class S>
struct Turn {
    const float *from_cos, *from_sin, *to_cos, *to_sin;  // `to` null: position 0

    S cos(int64_t i) const { return to_cos ? S(to_cos[i]) * from_cos[i] + S(to_sin[i]) * from_sin[i] : S(from_cos[i]); }
    S sin(int64_t i) const { return to_cos ? S(to_sin[i]) * from_cos[i] - S(to_cos[i]) * from_sin[i] : -S(from_sin[i]); }
};

// One key into its slot, which may be where it is: both features of a pair are read before either is written.
template <class T>
inline void turn_key(const T* x, const Turn<decltype(widen(T()))>& turn, int64_t pairs, bool interleaved, int64_t width, T* to) {
    const int64_t step = interleaved ? 2 : 1, apart = interleaved ? 1 : pairs;
    for (int64_t i = 0; i < pairs; ++i) {
        const auto a = widen(x[i * step]), b = widen(x[i * step + apart]), c = turn.cos(i), s = turn.sin(i);
        narrow(a * c - b * s, to[i * step]);
        narrow(a * s + b * c, to[i * step + apart]);
    }
    std::memmove(to + 2 * pairs, x + 2 * pairs, (width - 2 * pairs) * sizeof(T));
}

inline char* bytes_of_row(const Cache& x, int64_t b, int64_t h, int64_t t) {
    return static_cast<char*>(x.data) + (b * x.batch_stride + h * x.head_stride + t * x.stride) * int64_t(itemsize(x.dtype));
}

// f(slot, row of `from`, row of `to`) for every slot, with the rows to come on their way; a null row is an empty slot.
template <class Move>
inline void move_slots(const KvGather& a, const Cache& from, const Cache& to, int64_t b, int64_t h, Move&& move) {
    const int64_t slots = to.length, bytes = from.width * int64_t(itemsize(from.dtype)), ahead = 1 + 4096 / (bytes + 1);
    const int32_t* indices = a.indices + (b * to.heads + h) * slots;
    const auto at = [&](int64_t m) -> const char* {
        return indices[m] < 0 || indices[m] >= from.length ? nullptr : bytes_of_row(from, b, h, indices[m]);
    };
    for (int64_t m = 0; m < slots; ++m) {
        if (const char* later = m + ahead < slots ? at(m + ahead) : nullptr)
            for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(later + byte);
        move(m, at(m), bytes_of_row(to, b, h, m));
    }
}

inline void copy_slots(const KvGather& a, const Cache& from, const Cache& to, int64_t b, int64_t h) {
    const int64_t bytes = from.width * int64_t(itemsize(from.dtype));
    move_slots(a, from, to, b, h, [&](int64_t, const char* x, char* slot) {
        if (!x) std::memset(slot, 0, bytes);
        else if (x != slot) std::memcpy(slot, x, bytes);
    });
}

inline void turn_slots(const KvGather& a, int64_t b, int64_t h) {
    const Rotation& r = a.rotation;
    const int64_t width = a.keys.width, pairs = r.width / 2, first = (b * a.out_keys.heads + h) * a.out_keys.length;
    visit_dtype(a.keys.dtype, [&](auto, auto t) {
        using T = decltype(t);
        move_slots(a, a.keys, a.out_keys, b, h, [&](int64_t m, const char* x, char* slot) {
            const int32_t source = r.source[first + m], target = r.target ? r.target[first + m] : 0;
            if (!x || source < 0 || source >= r.rows || target < 0 || target >= r.rows) {
                std::memset(slot, 0, width * sizeof(T));
                return;
            }
            const float *cos = r.target ? r.cos + target * pairs : nullptr, *sin = r.target ? r.sin + target * pairs : nullptr;
            turn_key<T>(reinterpret_cast<const T*>(x), {r.cos + source * pairs, r.sin + source * pairs, cos, sin}, pairs, r.interleaved, width,
                        reinterpret_cast<T*>(slot));
        });
    });
}

inline void kv_gather(const KvGather& a, Scratch&, int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / a.out_keys.heads, h = item % a.out_keys.heads;
        if (a.rotation.cos) turn_slots(a, b, h);
        else copy_slots(a, a.keys, a.out_keys, b, h);
        copy_slots(a, a.values, a.out_values, b, h);
    }
}
