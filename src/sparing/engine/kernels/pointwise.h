// Operations on each position for itself: affine maps, sums and products, copies, layer normalization; and the mean
// over the positions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "activation.h"
#include "items.h"
#include "operation.h"
#include "shuffle.h"

namespace sparing {

// out = activation(in * scale + bias), per channel. An empty scale means 1, an empty bias 0.
class Affine : public Operation {
  public:
    Affine(int in, int out, std::vector<float> scale, std::vector<float> bias, int activation)
        : in_(in), out_(out), scale_(std::move(scale)), bias_(std::move(bias)), activation_(activation) {
        reads = {in};
        writes = {out};
    }

    const char* name() const override { return "affine"; }

    void prepare(const std::vector<Tensor>& tensors, int) override {
        const Layout& to = tensors[out_].layout;
        if (scale_.empty()) scale_.assign(to.channels, 1.0f);
        if (bias_.empty()) bias_.assign(to.channels, 0.0f);
        items_ = Items(to.images * to.tiles(), to.channels, to.row());
    }

    int64_t items() const override { return items_.count(); }

    void run(int64_t item, const std::vector<Tensor>& tensors, float*) override {
        with_activation(activation_, [&](auto activation) {
            items_.for_each_tile(item, [&](int64_t tile, int64_t first, int64_t end) {
                apply<activation>(tensors, tile, first, end);
            });
        });
    }

  private:
    template <int ACTIVATION> void apply(const std::vector<Tensor>& tensors, int64_t tile, int64_t first, int64_t end) {
        const Layout& layout = tensors[out_].layout;
        const int64_t row = layout.row(), filled = layout.filled(tile % layout.tiles()) * LANES;
        const float* in = tensors[in_].tile(tile);
        float* out = tensors[out_].tile(tile);
        for (int64_t channel = first; channel < end; channel++) {
            const Vector scale = broadcast(scale_[channel]), bias = broadcast(bias_[channel]);
            const int64_t begin = channel * row;
            for (int64_t i = begin; i < begin + filled; i += LANES)
                store(out + i, activate<ACTIVATION>(load(in + i) * scale + bias));
        }
    }

    int in_, out_;
    std::vector<float> scale_, bias_;
    int activation_;
    Items items_;
};

// out = activation(a + b) or activation(a * b). b has the shape of a, or is a matrix [N, C] for the images and channels
// of a.
class Binary : public Operation {
  public:
    Binary(int a, int b, int out, int kind, int activation)
        : a_(a), b_(b), out_(out), kind_(kind), activation_(activation) {
        reads = {a, b};
        writes = {out};
    }

    const char* name() const override { return kind_ == ADD ? "add" : "multiply"; }

    void prepare(const std::vector<Tensor>& tensors, int) override {
        const Layout &a = tensors[a_].layout, &b = tensors[b_].layout, &to = tensors[out_].layout;
        per_channel_ = !same_shape(a, b);
        items_ = Items(to.images * to.tiles(), to.channels, to.row());
    }

    int64_t items() const override { return items_.count(); }

    void run(int64_t item, const std::vector<Tensor>& tensors, float*) override {
        with_activation(activation_, [&](auto activation) {
            items_.for_each_tile(item, [&](int64_t tile, int64_t first, int64_t end) {
                if (kind_ == ADD)
                    apply<activation, ADD>(tensors, tile, first, end);
                else
                    apply<activation, MULTIPLY>(tensors, tile, first, end);
            });
        });
    }

  private:
    template <int ACTIVATION, int KIND>
    void apply(const std::vector<Tensor>& tensors, int64_t tile, int64_t first, int64_t end) {
        const auto combine = [](Vector a, Vector b) { return activate<ACTIVATION>(KIND == ADD ? a + b : a * b); };
        const Layout &layout = tensors[out_].layout, &other = tensors[b_].layout;
        const int64_t row = layout.row(), image = tile / layout.tiles();
        const int64_t filled = layout.filled(tile % layout.tiles()) * LANES;
        const float *a = tensors[a_].tile(tile), *b = tensors[b_].data;
        float* out = tensors[out_].tile(tile);
        if (!per_channel_) b += layout.tile_offset(tile);
        for (int64_t channel = first; channel < end; channel++) {
            const int64_t begin = channel * row;
            if (per_channel_) {
                const Vector value = broadcast(b[other.offset(0, channel, 0, image)]);
                for (int64_t i = begin; i < begin + filled; i += LANES)
                    store(out + i, combine(load(a + i), value));
            } else {
                for (int64_t i = begin; i < begin + filled; i += LANES)
                    store(out + i, combine(load(a + i), load(b + i)));
            }
        }
    }

    int a_, b_, out_, kind_, activation_;
    bool per_channel_ = false;
    Items items_;
};

// Copy channels [in_first, in_first + channels) of in to out, from its channel out_first on.
class Copy : public Operation {
  public:
    Copy(int in, int64_t in_first, int out, int64_t out_first, int64_t channels)
        : in_(in), out_(out), in_first_(in_first), out_first_(out_first), channels_(channels) {
        reads = {in};
        writes = {out};
    }

    const char* name() const override { return "copy"; }

    void prepare(const std::vector<Tensor>& tensors, int) override {
        const Layout& to = tensors[out_].layout;
        items_ = Items(to.images * to.tiles(), channels_, to.row());
    }

    int64_t items() const override { return items_.count(); }

    void run(int64_t item, const std::vector<Tensor>& tensors, float*) override {
        const int64_t row = tensors[out_].layout.row();
        items_.for_each_tile(item, [&](int64_t tile, int64_t first, int64_t end) {
            const float* in = tensors[in_].tile(tile) + (in_first_ + first) * row;
            float* out = tensors[out_].tile(tile) + (out_first_ + first) * row;
            std::memcpy(out, in, (end - first) * row * sizeof(float));
        });
    }

  private:
    int in_, out_;
    int64_t in_first_, out_first_, channels_;
    Items items_;
};

// Average of each channel of each image: [N, C, H, W] to a matrix [N, C].
class Mean : public Operation {
  public:
    Mean(int in, int out) : in_(in), out_(out) {
        reads = {in};
        writes = {out};
    }

    const char* name() const override { return "mean"; }

    void prepare(const std::vector<Tensor>& tensors, int) override {
        const Layout &from = tensors[in_].layout, &to = tensors[out_].layout;
        mask_.assign(from.total_vectors() * LANES, 0);
        for (int64_t y = 0; y < from.height; y++)
            std::fill_n(mask_.begin() + y * from.pitch, from.width, -1);
        // A vector holds the means of LANES images.
        items_ = Items(to.total_vectors(), to.channels, std::min<int64_t>(to.width, LANES) * from.positions());
    }

    int64_t items() const override { return items_.count(); }

    void run(int64_t item, const std::vector<Tensor>& tensors, float*) override {
        const Layout &from = tensors[in_].layout, &to = tensors[out_].layout;
        const float pixels = from.height * from.width;
        items_.for_each_tile(item, [&](int64_t vector, int64_t first, int64_t end) {
            const int64_t image = vector * LANES, images = std::min<int64_t>(LANES, from.images - image);
            for (int64_t channel = first; channel < end; channel++) {
                float* means = tensors[out_].data + to.offset(0, channel, 0, image);
                store(means, Vector{});
                for (int64_t i = 0; i < images; i++) means[i] = sum(tensors[in_], image + i, channel) / pixels;
            }
        });
    }

  private:
    float sum(const Tensor& tensor, int64_t image, int64_t channel) const {
        const Layout& layout = tensor.layout;
        const int64_t row = layout.row();
        Vector sums = {}, more = {};  // two, since each addition waits for the one before
        for (int64_t tile = 0; tile < layout.tiles(); tile++) {
            const float* from = tensor.tile(image * layout.tiles() + tile) + channel * row;
            const int32_t* mask = &mask_[tile * row];
            const int64_t filled = layout.filled(tile) * LANES;
            int64_t i = 0;
            for (; i + 2 * LANES <= filled; i += 2 * LANES) {
                sums += masked(load(from + i), mask + i);
                more += masked(load(from + i + LANES), mask + i + LANES);
            }
            if (i < filled) sums += masked(load(from + i), mask + i);
        }
        return sum_lanes(sums + more);
    }

    int in_, out_;
    std::vector<int32_t> mask_;  // per position of an image: -1 where it is a pixel, otherwise 0
    Items items_;
};

// Normalize each position over its channels: (in - mean) / sqrt(variance + epsilon) * weight + bias. Unless it is
// centered, the mean is taken as 0, as in RMSNorm.
class LayerNorm : public Operation {
  public:
    LayerNorm(int in, int out, std::vector<float> weight, std::vector<float> bias, float epsilon, bool centered)
        : in_(in), out_(out), weight_(std::move(weight)), bias_(std::move(bias)), epsilon_(epsilon), centered_(centered) {
        reads = {in};
        writes = {out};
    }

    const char* name() const override { return "layer norm"; }

    void prepare(const std::vector<Tensor>& tensors, int) override {
        const Layout& to = tensors[out_].layout;
        parts_ = (to.vectors + AT_ONCE - 1) / AT_ONCE;
        items_ = to.images * to.tiles() * parts_;
    }

    int64_t items() const override { return items_; }

    void run(int64_t item, const std::vector<Tensor>& tensors, float*) override {
        const Layout& layout = tensors[out_].layout;
        const int64_t tile = item / parts_, first = item % parts_ * AT_ONCE;
        const int64_t count = std::min<int64_t>(layout.filled(tile % layout.tiles()) - first, AT_ONCE);
        const float* in = tensors[in_].tile(tile) + first * LANES;
        float* out = tensors[out_].tile(tile) + first * LANES;
        if (count == AT_ONCE) return normalize<AT_ONCE>(in, out, layout);
        for (int64_t i = 0; i < count; i++) normalize<1>(in + i * LANES, out + i * LANES, layout);
    }

  private:
    static constexpr int AT_ONCE = 2;  // vectors: two need whole pairs of cache lines, and fit the registers
    static constexpr int64_t CHUNK = 64;  // channels that are summed before they are added to the sum of all: rounding

    // The mean comes first, since the sum of squares alone would cancel where the mean is large. The sum of the
    // differences to it corrects the rounding errors of the mean.
    template <int COUNT> void normalize(const float* in, float* out, const Layout& layout) const {
        const int64_t channels = layout.channels, row = layout.row();
        const float one = 1.0f / channels;
        Vector mean[COUNT], sums[COUNT] = {}, squares[COUNT] = {};
        for (int64_t begin = 0; centered_ && begin < channels; begin += CHUNK) {
            Vector part[COUNT] = {};
            for (int64_t channel = begin; channel < std::min(begin + CHUNK, channels); channel++)
                for (int i = 0; i < COUNT; i++) part[i] += load(in + channel * row + i * LANES);
            for (int i = 0; i < COUNT; i++) sums[i] += part[i];
        }
        for (int i = 0; i < COUNT; i++) {
            mean[i] = sums[i] * one;
            sums[i] = Vector{};
        }
        for (int64_t begin = 0; begin < channels; begin += CHUNK) {
            Vector part[COUNT] = {}, part_squares[COUNT] = {};
            for (int64_t channel = begin; channel < std::min(begin + CHUNK, channels); channel++)
                for (int i = 0; i < COUNT; i++) {
                    const Vector difference = load(in + channel * row + i * LANES) - mean[i];
                    part[i] += difference;
                    part_squares[i] += difference * difference;
                }
            for (int i = 0; i < COUNT; i++) {
                sums[i] += part[i];
                squares[i] += part_squares[i];
            }
        }
        Vector scale[COUNT], shift[COUNT];
        for (int i = 0; i < COUNT; i++) {
            const Vector rest = centered_ ? sums[i] * one : Vector{};
            const Vector variance = larger(Vector{}, squares[i] * one - rest * rest);
            for (int lane = 0; lane < LANES; lane++) scale[i][lane] = 1.0f / std::sqrt(variance[lane] + epsilon_);
            shift[i] = rest * scale[i];
        }
        for (int64_t channel = 0; channel < channels; channel++) {
            const Vector weight = broadcast(weight_[channel]), bias = broadcast(bias_[channel]);
            for (int i = 0; i < COUNT; i++) {
                const int64_t at = channel * row + i * LANES;
                store(out + at, ((load(in + at) - mean[i]) * scale[i] - shift[i]) * weight + bias);
            }
        }
    }

    int in_, out_;
    std::vector<float> weight_, bias_;
    float epsilon_;
    bool centered_;
    int64_t parts_ = 0, items_ = 0;
};

}  // namespace sparing
