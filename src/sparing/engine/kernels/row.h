// Sparse matrix times one row, such as the classifier of one image, or one token:
//
//     out[f] = activation(bias[f] + residual[f] + sum over the nonzero weights j of filter f of w[j] x[column[j]])
//
// With one row, vectors of positions are nearly empty, and x does not fit into the first cache. Here x is copied to a
// contiguous vector, and multiplied number by number, several sums at a time. From two rows on, vectors are faster.
#pragma once

#include "convolution.h"

namespace sparing {

constexpr int SUMS = 8;  // of a filter: a multiplication waits for the last one of the same sum

// `count` is a multiple of SUMS.
INLINE float dot(const float* weights, const uint16_t* columns, int64_t count, const float* x) {
    float sum[SUMS] = {};
    for (int64_t j = 0; j < count; j += SUMS)
        UNROLL
        for (int s = 0; s < SUMS; s++) sum[s] += weights[j + s] * x[columns[j + s]];
    UNROLL
    for (int half = SUMS / 2; half > 0; half /= 2)
        UNROLL
        for (int s = 0; s < half; s++) sum[s] += sum[s + half];
    return sum[0];
}

class Row : public Operation {
  public:
    // residual: number of a tensor, or -1.
    Row(int in, int out, int residual, const Csr& weight, std::vector<float> bias, int activation)
        : bias_(std::move(bias)), activation_(activation) {
        reads = residual < 0 ? std::vector<int>{in} : std::vector<int>{in, residual};
        writes = {out};
        overwrites = residual == in ? -1 : residual;  // all filters read the input
        // Zeros fill the last sums of a filter.
        starts_ = {0};
        for (int64_t filter = 0; filter < weight.rows(); filter++) {
            const int32_t from = weight.starts[filter], to = weight.starts[filter + 1];
            values_.insert(values_.end(), weight.values.begin() + from, weight.values.begin() + to);
            columns_.insert(columns_.end(), weight.columns.begin() + from, weight.columns.begin() + to);
            const size_t full = (values_.size() + SUMS - 1) / SUMS * SUMS;
            values_.resize(full, 0.0f);
            columns_.resize(full, 0);
            starts_.push_back(static_cast<int64_t>(full));
        }
    }

    const char* name() const override { return "row"; }

    void prepare(const std::vector<Tensor>& tensors, int threads) override {
        scratch_ = tensors[reads[0]].layout.channels;
        // Equal numbers of weights.
        parts_ = {0};
        for (int64_t part = 1; part < threads; part++) {
            const auto found = std::lower_bound(starts_.begin(), starts_.end() - 1, starts_.back() * part / threads);
            parts_.push_back(std::max<int64_t>(parts_.back(), found - starts_.begin()));
        }
        parts_.push_back(static_cast<int64_t>(starts_.size()) - 1);
    }

    int64_t scratch() const override { return scratch_; }
    int64_t items() const override { return static_cast<int64_t>(parts_.size()) - 1; }

    void run(int64_t item, const std::vector<Tensor>& tensors, float* scratch) override {
        const Tensor &in = tensors[reads[0]], &out = tensors[writes[0]];
        const float* residual = reads.size() > 1 ? tensors[reads[1]].data : nullptr;
        const int64_t begin = parts_[item], end = parts_[item + 1], step = out.layout.row();
        for (int64_t channel = 0; channel < in.layout.channels; channel++)
            scratch[channel] = in.data[channel * in.layout.row()];
        for (int64_t filter = begin; filter < end; filter++) {
            const int64_t start = starts_[filter];
            float sum = dot(values_.data() + start, columns_.data() + start, starts_[filter + 1] - start, scratch);
            sum += bias_[filter] + (residual ? residual[filter * step] : 0.0f);
            out.data[filter * step] = activation_ == RELU && sum < 0 ? 0.0f : sum;
        }
        if (activation_ > RELU)
            activate_rows(out.data + begin * step, step, static_cast<int>(end - begin), 1, activation_);
    }

  private:
    std::vector<int64_t> starts_;
    std::vector<float> values_;
    std::vector<uint16_t> columns_;
    std::vector<float> bias_;
    int activation_;
    int64_t scratch_ = 0;
    std::vector<int64_t> parts_;
};

}  // namespace sparing
