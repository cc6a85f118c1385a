// Moving floats between the lanes of vectors.
#pragma once

#include <cstdint>
#include <utility>

#include "simd.h"

namespace sparing {

// Lane i of the result is lane Pattern::from(i) of a, or lane Pattern::from(i) - LANES of b.
template <typename Pattern, int... LANE>
INLINE Vector shuffle(Vector a, Vector b, std::integer_sequence<int, LANE...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, Pattern::from(LANE)...);
#else
    return __builtin_shuffle(a, b, Integers{Pattern::from(LANE)...});
#endif
}
template <typename Pattern> INLINE Vector shuffle(Vector a, Vector b) {
    return shuffle<Pattern>(a, b, std::make_integer_sequence<int, LANES>());
}

// Lanes FIRST, FIRST + 2, FIRST + 4, ... of [a, b].
template <int FIRST> struct EverySecond {
    static constexpr int from(int lane) { return FIRST + 2 * lane; }
};

// Lanes FIRST, FIRST + 1, FIRST + 2, ... of [a, b].
template <int FIRST> struct Successive {
    static constexpr int from(int lane) { return FIRST + lane; }
};

// Blocks of SIZE lanes: the even (odd) ones of a, each followed by the one of b at the same place.
template <int SIZE> struct EvenBlocks {
    static constexpr int from(int lane) { return lane & SIZE ? LANES + (lane ^ SIZE) : lane; }
};
template <int SIZE> struct OddBlocks {
    static constexpr int from(int lane) { return lane & SIZE ? LANES + lane : lane ^ SIZE; }
};

// Exchange neighbouring blocks of SIZE lanes.
template <int SIZE> struct Exchange {
    static constexpr int from(int lane) { return lane ^ SIZE; }
};

// Sum of all lanes.
template <int SIZE = LANES / 2> INLINE float sum_lanes(Vector value) {
    value += shuffle<Exchange<SIZE>>(value, value);
    if constexpr (SIZE == 1)
        return value[0];
    else
        return sum_lanes<SIZE / 2>(value);
}

// Lane j of rows[i] becomes lane i of rows[j]: the off-diagonal blocks of each pair of rows are exchanged, for blocks
// of all powers of two.
template <int SIZE = LANES / 2> INLINE void transpose(Vector (&rows)[LANES]) {
    for (int i = 0; i < LANES; i++) {
        if (i & SIZE) continue;
        const Vector a = rows[i], b = rows[i + SIZE];
        rows[i] = shuffle<EvenBlocks<SIZE>>(a, b);
        rows[i + SIZE] = shuffle<OddBlocks<SIZE>>(a, b);
    }
    if constexpr (SIZE > 1) transpose<SIZE / 2>(rows);
}

}  // namespace sparing
