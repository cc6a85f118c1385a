// What a plan executes: operations on tensors, each divided into independent items of work.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine.h"
#include "layout.h"

namespace sparing {

struct Tensor {
    Layout layout;
    float* data = nullptr;  // aligned to 64 bytes; set when the plan is finished
    int64_t begin = 0;      // index of the first float at `data`: a part of a tensor begins later (bands.h)
    float* at(int64_t index) const { return data + (index - begin); }
    float* tile(int64_t index) const { return at(layout.tile_offset(index)); }
};

class Operation {
  public:
    std::vector<int> reads, writes;  // numbers of tensors
    // An input of the shape of the output, in whose memory the output may lie if nothing else needs it any more, or -1.
    int overwrites = -1;

    virtual ~Operation() = default;
    virtual const char* name() const = 0;
    // The window with which the first input is read, if it is.
    virtual const SparingWindow* window() const { return nullptr; }
    // Estimate of the processor cycles for an output of this layout.
    virtual double cost(const Layout& /*in*/, const Layout& /*out*/) { return 0; }
    // Called once, when the layout of every tensor is fixed and before the memory is. `threads` will run the items.
    virtual void prepare(const std::vector<Tensor>&, int /*threads*/) {}
    // Floats of scratch memory that an item needs; it is aligned to 64 bytes, and its content is undefined.
    virtual int64_t scratch() const { return 0; }
    virtual int64_t items() const = 0;
    virtual void run(int64_t item, const std::vector<Tensor>& tensors, float* scratch) = 0;
};

// Throw std::invalid_argument unless a condition holds.
inline void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

}  // namespace sparing
