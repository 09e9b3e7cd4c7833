// The uniforms of a race, a block of columns at a time; primitives/sample_rows.py is the definition. Included inside each ISA's namespace.

inline float uniform32(uint32_t word) { return std::min((float(word) + 0.5f) * 0x1p-32f, 1 - 0x1p-24f); }

// One draw's. Column v is word v & 3 of counter v >> 2, so a block is one counter for every lane.
class Uniforms {
public:
    Uniforms(uint64_t seed, int64_t position, int64_t offset, int64_t stream)
        : seed_(seed), counter_{0, unsigned(position), unsigned(offset), unsigned(stream)} {
        for (int round = 0; round < 10; ++round) {
            low_[round] = uint32_t(seed) + uint32_t(round) * 0x9E3779B9u;
            high_[round] = uint32_t(seed >> 32) + uint32_t(round) * 0xBB67AE85u;
        }
    }

    float at(int64_t c) const {
        const PhiloxWords w = words(c / 4);
        const unsigned word[] = {w.x, w.y, w.z, w.w};
        return uniform32(word[c & 3]);
    }

    // Of columns [c, c + block), c a multiple of block.
    template <class V>
    void block_at(typename V::F (&u)[4], int64_t c) const {
        if constexpr (V::width == 1) {
            const PhiloxWords w = words(c / 4);
            u[0] = uniform32(w.x), u[1] = uniform32(w.y), u[2] = uniform32(w.z), u[3] = uniform32(w.w);
        } else {
            using U = typename V::U;
            // every four lanes hold the counters that `transpose` makes neighbours of them
            alignas(64) uint32_t lanes[V::width];
            for (int lane = 0; lane < V::width; ++lane) lanes[lane] = uint32_t(lane % 4 * (V::width / 4) + lane / 4);
            const U none = V::load(lanes) * 0;
            U x = V::load(lanes) + uint32_t(c / 4), y = none + counter_.y, z = none + counter_.z, w = none + counter_.w;
#pragma GCC unroll 10
            for (int round = 0; round < 10; ++round) {
                U p_high, p_low, q_high, q_low;
                V::multiply(x, 0xD2511F53u, p_high, p_low);
                V::multiply(z, 0xCD9E8D57u, q_high, q_low);
                x = q_high ^ y ^ low_[round];
                y = q_low;
                z = p_high ^ w ^ high_[round];
                w = p_low;
            }
            const auto half = V::set(0.5f), unit = V::set(0x1p-32f), most = V::set(-(1 - 0x1p-24f));
            u[0] = V::real(x), u[1] = V::real(y), u[2] = V::real(z), u[3] = V::real(w);
            for (auto& numbers : u) numbers = -V::max(-((numbers + half) * unit), most);
            V::transpose(u);
        }
    }

private:
    PhiloxWords words(int64_t counter) const { return philox(seed_, {unsigned(counter), counter_.y, counter_.z, counter_.w}); }

    uint64_t seed_;
    PhiloxWords counter_;
    uint32_t low_[10], high_[10];
};
