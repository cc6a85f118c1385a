// Activation functions on vectors of floats.
//
// NaN stays NaN: `larger(bound, value)` and `smaller(bound, value)` return their second argument if it is NaN.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "engine.h"
#include "simd.h"

namespace sparing {

INLINE Vector clamp(Vector value, float low, float high) {
    return larger(broadcast(low), smaller(broadcast(high), value));
}

// coefficients[0] * x^n + coefficients[1] * x^(n-1) + ...
template <int COUNT> INLINE Vector polynomial(Vector x, const float (&coefficients)[COUNT]) {
    Vector result = broadcast(coefficients[0]);
    for (int i = 1; i < COUNT; i++) result = result * x + coefficients[i];
    return result;
}

// Relative error 1e-7 for x in [-87, 88]; outside, the value at the bound.
//
// exp(x) = 2^n * exp(r) with n = round(x / log 2) and r = x - n * log 2, |r| < 0.35. The polynomial is that of Cephes.
INLINE Vector exponential(Vector x) {
    x = clamp(x, -87.0f, 88.0f);
    // Adding 1.5 * 2^23 + 127 rounds to an integer and leaves n + 127 in the low bits of the float: the exponent of 2^n.
    const float shift = 12583039.0f;
    const Vector shifted = x * 1.44269504088896341f + shift;
    const Vector n = shifted - shift;
    // The first part of log 2 has few bits, so that the product with n is exact.
    const Vector r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    const float coefficients[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                  4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    const Vector power = (polynomial(r, coefficients) * (r * r) + r) + 1.0f;
    // A cast between vector types keeps the bits. The product is NaN if x is.
    return power * (Vector)((Integers)shifted << 23);
}

INLINE Vector sigmoid(Vector x) { return 1.0f / (1.0f + exponential(-x)); }

INLINE Vector tanh(Vector x) {
    // Near 0 the formula with exp would cancel digits, so a polynomial of Cephes takes over.
    const float coefficients[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                                  -3.33332819422e-1f};
    const Vector square = x * x;
    const Vector near = polynomial(square, coefficients) * square * x + x;
    const Vector far = 1.0f - 2.0f / (1.0f + exponential(2.0f * x));
    return square < 0.390625f ? near : far;
}

// Error of a few units in the last place: the rational function that XLA uses.
INLINE Vector erf(Vector x) {
    const float numerator[] = {0.00022905065861350646f, 0.0034082910107109506f, 0.050955695062380861f,
                               0.18520832239976145f, 1.128379143519084f};
    const float denominator[] = {-1.1791602954361697e-7f, 0.000023547966471313185f, 0.0010179625278914885f,
                                 0.014070470171167667f,   0.11098505178285362f,     0.49746925110067538f,
                                 1.0f};
    x = clamp(x, -3.832506856900711f, 3.832506856900711f);  // where erf rounds to 1
    const Vector square = x * x;
    return x * polynomial(square, numerator) / polynomial(square, denominator);
}

INLINE Vector gelu(Vector x) {
    // A rounding error of 1 + erf must not be multiplied by a large negative x. gelu(-5.5) is -1e-7.
    const Vector factor = 0.5f * larger(broadcast(-5.5f), x);
    return factor + factor * erf(x * 0.70710678118654752f);
}

// x * (1 + tanh(u)) / 2 = x * sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3)
INLINE Vector gelu_tanh(Vector x) {
    return x * sigmoid(x * (1.59576912160573071f + 0.07135481627f * (x * x)));
}

INLINE Vector hardsigmoid(Vector x) { return clamp(x + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f); }

template <int ACTIVATION> INLINE Vector activate(Vector value) {
    static_assert(IDENTITY <= ACTIVATION && ACTIVATION <= HARDSIGMOID, "unknown activation");
    if constexpr (ACTIVATION == RELU) return larger(Vector{}, value);
    if constexpr (ACTIVATION == RELU6) return clamp(value, 0.0f, 6.0f);
    if constexpr (ACTIVATION == GELU) return gelu(value);
    if constexpr (ACTIVATION == GELU_TANH) return gelu_tanh(value);
    if constexpr (ACTIVATION == SILU) return value * sigmoid(value);
    if constexpr (ACTIVATION == SIGMOID) return sigmoid(value);
    if constexpr (ACTIVATION == TANH) return tanh(value);
    if constexpr (ACTIVATION == HARDSWISH) return value * hardsigmoid(value);
    if constexpr (ACTIVATION == HARDSIGMOID) return hardsigmoid(value);
    return value;
}

// Call `function` with the activation as a std::integral_constant, so that its loop is compiled for each activation.
template <typename Function> INLINE void with_activation(int activation, const Function& function) {
    switch (activation) {
        case IDENTITY: return function(std::integral_constant<int, IDENTITY>());
        case RELU: return function(std::integral_constant<int, RELU>());
        case RELU6: return function(std::integral_constant<int, RELU6>());
        case GELU: return function(std::integral_constant<int, GELU>());
        case GELU_TANH: return function(std::integral_constant<int, GELU_TANH>());
        case SILU: return function(std::integral_constant<int, SILU>());
        case SIGMOID: return function(std::integral_constant<int, SIGMOID>());
        case TANH: return function(std::integral_constant<int, TANH>());
        case HARDSWISH: return function(std::integral_constant<int, HARDSWISH>());
        case HARDSIGMOID: return function(std::integral_constant<int, HARDSIGMOID>());
        default: throw std::invalid_argument("unknown activation " + std::to_string(activation));
    }
}

INLINE Vector activate(Vector value, int activation) {
    switch (activation) {
        case RELU: return activate<RELU>(value);
        case RELU6: return activate<RELU6>(value);
        case GELU: return activate<GELU>(value);
        case GELU_TANH: return activate<GELU_TANH>(value);
        case SILU: return activate<SILU>(value);
        case SIGMOID: return activate<SIGMOID>(value);
        case TANH: return activate<TANH>(value);
        case HARDSWISH: return activate<HARDSWISH>(value);
        case HARDSIGMOID: return activate<HARDSIGMOID>(value);
        default: return value;
    }
}

}  // namespace sparing
