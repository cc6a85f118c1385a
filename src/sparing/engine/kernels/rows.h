// Sparse matrix times a few rows, such as the classifier of one image, or one token:
//
//     out[r, f] = activation(bias[f] + residual[r, f] + sum over the nonzero weights j of filter f of w[j] x[r, column[j]])
//
// With fewer rows than lanes, vectors of positions are nearly empty and x does not fit into the first cache. Here each
// row of x is copied to a contiguous vector, and multiplied number by number, several sums at a time.
#pragma once

#include "activation.h"
#include "convolution.h"

namespace sparing {

constexpr int FEW = 4;  // rows

// Sum the products of one filter with ROWS rows, `step` floats apart.
template <int ROWS>
INLINE void dot(const float* weights, const uint16_t* columns, int64_t count, const float* x, int64_t step, float* sums) {
    constexpr int SETS = 8 / ROWS;  // a multiplication waits for the last one of the same sum
    float sum[SETS][ROWS] = {};
    int64_t j = 0;
    for (; j + SETS <= count; j += SETS)
        UNROLL
        for (int s = 0; s < SETS; s++)
            UNROLL
            for (int r = 0; r < ROWS; r++) sum[s][r] += weights[j + s] * x[columns[j + s] + r * step];
    for (; j < count; j++)
        UNROLL
        for (int r = 0; r < ROWS; r++) sum[0][r] += weights[j] * x[columns[j] + r * step];
    for (int r = 0; r < ROWS; r++) {
        sums[r] = 0;
        for (int s = 0; s < SETS; s++) sums[r] += sum[s][r];
    }
}

class Rows : public Operation {
  public:
    Rows(int in, int out, int residual, Csr weight, std::vector<float> bias, int activation)
        : weight_(std::move(weight)), columns_(weight_.columns.begin(), weight_.columns.end()), bias_(std::move(bias)),
          activation_(activation) {
        reads = residual < 0 ? std::vector<int>{in} : std::vector<int>{in, residual};
        writes = {out};
        overwrites = residual == in ? -1 : residual;  // all filters read the input
        weight_.columns = {};
        weight_.values.push_back(0);  // an empty vector has no address
        columns_.push_back(0);
    }

    const char* name() const override { return "rows"; }

    void prepare(const std::vector<Tensor>& tensors, int threads) override {
        const Layout& in = tensors[reads[0]].layout;
        step_ = (in.channels + LANES - 1) / LANES * LANES;
        scratch_ = step_ * FEW;  // three rows are computed as four
        // Equal numbers of weights.
        parts_ = {0};
        for (int64_t part = 1; part < threads; part++) {
            const auto found = std::lower_bound(
                weight_.starts.begin(), weight_.starts.end() - 1, weight_.starts.back() * part / threads
            );
            parts_.push_back(std::max<int64_t>(parts_.back(), found - weight_.starts.begin()));
        }
        parts_.push_back(weight_.rows());
    }

    int64_t scratch() const override { return scratch_; }
    int64_t items() const override { return static_cast<int64_t>(parts_.size()) - 1; }

    void run(int64_t item, const std::vector<Tensor>& tensors, float* scratch) override {
        const Tensor &in = tensors[reads[0]], &out = tensors[writes[0]];
        for (int64_t channel = 0; channel < in.layout.channels; channel++)
            for (int64_t row = 0; row < in.layout.width; row++)
                scratch[row * step_ + channel] = in.data[channel * in.layout.row() + row];
        const auto compute = in.layout.width == 1 ? &Rows::filters<1> : in.layout.width == 2 ? &Rows::filters<2> : &Rows::filters<4>;
        const float* residual = reads.size() > 1 ? tensors[reads[1]].data : nullptr;
        (this->*compute)(parts_[item], parts_[item + 1], scratch, residual, out);
    }

  private:
    template <int ROWS>
    void filters(int64_t begin, int64_t end, const float* x, const float* residual, const Tensor& out) const {
        for (int64_t filter = begin; filter < end; filter++) {
            const int64_t start = weight_.starts[filter];
            alignas(64) float sums[LANES] = {};
            dot<ROWS>(&weight_.values[start], &columns_[start], weight_.starts[filter + 1] - start, x, step_, sums);
            Vector value = load(sums) + broadcast(bias_[filter]);
            if (residual) value += load(residual + filter * out.layout.row());
            store(out.data + filter * out.layout.row(), activate(value, activation_));
        }
    }

    Csr weight_;
    std::vector<uint16_t> columns_;
    std::vector<float> bias_;
    int activation_;
    int64_t step_ = 0, scratch_ = 0;
    std::vector<int64_t> parts_;
};

}  // namespace sparing
