// One block of memory for all tensors of a plan. Tensors that are not needed at the same time share their place.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "operation.h"

namespace sparing {

struct Free {
    void operator()(float* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<float[], Free>;

constexpr int64_t MOST_FLOATS = int64_t{1} << 40;

// Return `floats` zeros, aligned to a cache line.
inline Memory allocate(int64_t floats) {
    if (floats > MOST_FLOATS) throw std::bad_alloc();
    void* memory = nullptr;
    const size_t bytes = static_cast<size_t>(floats) * sizeof(float);
    if (posix_memalign(&memory, 4096, bytes) != 0) throw std::bad_alloc();
    std::memset(memory, 0, bytes);
    return Memory(static_cast<float*>(memory));
}

// Kernels read whole vectors, so up to two vectors beyond a tensor.
constexpr int64_t GUARD = 1024;

// For tests: no tensor shares memory with another, or lies next to it.
#ifdef SPARING_SEPARATE
constexpr bool SEPARATE = true;
#else
constexpr bool SEPARATE = false;
#endif

// Place each tensor at the first gap that is large enough while it is needed, from its first to its last operation.
// Return the memory and the number of its floats.
inline std::pair<Memory, int64_t> place(
    std::vector<Tensor>& tensors, const std::vector<std::unique_ptr<Operation>>& operations
) {
    struct Span {
        int64_t first = -1, last = -1, begin = 0, end = 0;
        size_t owner;  // the tensor whose memory it shares
    };
    std::vector<Span> spans(tensors.size());
    for (size_t number = 0; number < tensors.size(); number++) spans[number].owner = number;
    for (size_t index = 0; index < operations.size(); index++) {
        for (const auto* numbers : {&operations[index]->reads, &operations[index]->writes}) {
            for (const int number : *numbers) {
                Span& span = spans[number];
                if (span.first < 0) span.first = static_cast<int64_t>(index);
                span.last = static_cast<int64_t>(index);
            }
        }
    }
    for (size_t index = 0; index < operations.size(); index++) {
        const int input = operations[index]->overwrites;
        if (input < 0 || spans[input].last != static_cast<int64_t>(index)) continue;
        const size_t output = operations[index]->writes[0];
        spans[output].owner = spans[input].owner;
        spans[spans[input].owner].last = spans[output].last;
    }
    int64_t total = GUARD;
    std::vector<size_t> placed;
    for (size_t number = 0; number < tensors.size(); number++) {
        Span& span = spans[number];
        if (span.first < 0 || span.owner != number) continue;
        const Layout& layout = tensors[number].layout;
        const double floats = static_cast<double>(layout.images * layout.tiles()) * static_cast<double>(layout.tile_size());
        if (floats > static_cast<double>(MOST_FLOATS)) throw std::bad_alloc();
        const int64_t size = (layout.size() + 63) / 64 * 64 + (SEPARATE ? GUARD : 0);
        std::vector<std::pair<int64_t, int64_t>> taken;
        for (const size_t other : placed)
            if (SEPARATE || (spans[other].first <= span.last && span.first <= spans[other].last))
                taken.push_back({spans[other].begin, spans[other].end});
        std::sort(taken.begin(), taken.end());
        span.begin = GUARD;
        for (const auto& [begin, end] : taken)
            if (begin < span.begin + size) span.begin = std::max(span.begin, end);
        span.end = span.begin + size;
        total = std::max(total, span.end);
        placed.push_back(number);
    }
    Memory memory = allocate(total + GUARD);
    for (size_t number = 0; number < tensors.size(); number++)
        if (spans[number].first >= 0) tensors[number].data = memory.get() + spans[spans[number].owner].begin;
    return {std::move(memory), total};
}

}  // namespace sparing
