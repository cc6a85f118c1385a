// Vectors of floats, with the vector extensions of GCC and Clang: `a + b`, `a * b`, `a > b ? a : b` work per lane.
//
// A library is compiled for one instruction set: 16 lanes with AVX-512, 8 with AVX2, otherwise 4, for which the
// compiler uses what the processor has.
#pragma once

#include <cstdint>

#if defined(__AVX512F__)
#define SPARING_LANES 16
#define SPARING_REGISTERS 32
#elif defined(__AVX2__)
#define SPARING_LANES 8
#define SPARING_REGISTERS 16
#else
#define SPARING_LANES 4
#define SPARING_REGISTERS 16
#endif

namespace sparing {

constexpr int LANES = SPARING_LANES;
constexpr int REGISTERS = SPARING_REGISTERS;

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef float Unaligned __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define INLINE inline __attribute__((always_inline))

INLINE Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
INLINE Integers load(const int32_t* from) { return (Integers)*reinterpret_cast<const Unaligned*>(from); }
INLINE void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }
INLINE Vector broadcast(float value) { return value - Vector{}; }  // also the way of the compilers: {} is zero
INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }
INLINE Vector larger_or_nan(Vector a, Vector b) { return b != b ? b : larger(b, a); }  // NaN if either is
INLINE Vector smaller(Vector a, Vector b) { return a < b ? a : b; }
// 0 in the lanes whose mask is 0; the other masks are -1.
INLINE Vector masked(Vector value, const int32_t* mask) { return (Vector)((Integers)value & load(mask)); }

}  // namespace sparing
