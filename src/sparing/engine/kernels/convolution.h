// Sparse convolution:
//
//     out[f, p] = activation(bias[f] + residual[f, p] + sum over the nonzero weights j of filter f of w[j] x[o[j] + p])
//
// p is an output position; o[j] is where weight j starts to read (gather.h), or, for a 1x1 convolution of stride 1, its
// channel in the input tile itself. A Linear layer is such a convolution, whose positions are tokens.
//
// Loops, outermost first: tile of up to MOST vectors of positions; block of input channels, small enough for the cache;
// filter; nonzero weight; vector. The sums of a filter stay in registers for all weights of a block, which is one
// `Visit`, and in the output between blocks. Every multiplication loads its own vector of x, so the cache that holds x
// decides the speed.
//
// If neighboring filters have their nonzero weights at the same places, HEIGHT filters are computed at once, and a
// vector that is loaded is multiplied HEIGHT times. A dense layer is the extreme case. `prepare` decides it from the
// weights, and the blocks by the costs below.
#pragma once

#include <array>
#include <cmath>
#include <map>
#include <tuple>
#include <utility>

#include "activation.h"
#include "gather.h"
#include "operation.h"

namespace sparing {

constexpr int MOST = LANES == 16 ? 8 : 14;  // vectors of a tile: their sums fit into the registers

#define UNROLL _Pragma("GCC unroll 16")  // sums stay in registers only if all loops over them are unrolled

// The work of HEIGHT filters in one block of channels.
struct Visit {
    uint32_t count;    // nonzero weights of each filter
    uint16_t filter;   // the first filter
    bool first, last;  // start from the bias; apply the activation
};

struct Stream {
    const Visit *begin, *end;
    const float* weights;     // [count][HEIGHT] for each visit
    const uint16_t* offsets;  // [count] for each visit, in floats
};

struct Target {
    float* out;              // the first filter of the tile
    const float* residual;   // or null
    int64_t row;             // floats from one filter to the next
    const float* bias;
    int activation;
};

// Apply an activation to `vectors` vectors of each of `rows` rows. Not inlined: it would be repeated in every kernel.
[[gnu::noinline]] inline void activate_rows(float* data, int64_t step, int rows, int vectors, int activation) {
    with_activation(activation, [&](auto chosen) {
        for (int row = 0; row < rows; row++)
            for (int n = 0; n < vectors; n++) {
                float* to = data + row * step + n * LANES;
                store(to, activate<decltype(chosen)::value>(load(to)));
            }
    });
}

// Compute N vectors of positions.
template <int HEIGHT, int N>
void multiply(const Stream& stream, const float* x, const Target& target) {
    // A multiplication waits for the last one of the same sum. Short rows of vectors get several sums of each.
    constexpr int SETS = HEIGHT * N >= 5 ? 1 : HEIGHT * N >= 3 ? 2 : HEIGHT * N == 2 ? 4 : 8;
    const float* weights = stream.weights;
    const uint16_t* offsets = stream.offsets;
    for (const Visit* visit = stream.begin; visit < stream.end; visit++) {
        Vector sum[SETS][HEIGHT][N];
        float* out = target.out + visit->filter * target.row;
        if (visit->first) {
            UNROLL
            for (int h = 0; h < HEIGHT; h++) {
                const Vector bias = broadcast(target.bias[visit->filter + h]);
                UNROLL
                for (int n = 0; n < N; n++) sum[0][h][n] = bias;
            }
            if (target.residual) {
                const float* residual = target.residual + visit->filter * target.row;
                UNROLL
                for (int h = 0; h < HEIGHT; h++)
                    UNROLL
                    for (int n = 0; n < N; n++) sum[0][h][n] += load(residual + h * target.row + n * LANES);
            }
        } else {
            UNROLL
            for (int h = 0; h < HEIGHT; h++)
                UNROLL
                for (int n = 0; n < N; n++) sum[0][h][n] = load(out + h * target.row + n * LANES);
        }
        UNROLL
        for (int s = 1; s < SETS; s++)
            UNROLL
            for (int h = 0; h < HEIGHT; h++)
                UNROLL
                for (int n = 0; n < N; n++) sum[s][h][n] = Vector{};

        const auto add = [&](int s) __attribute__((always_inline)) {
            const float* from = x + *offsets++;
            Vector weight[HEIGHT];
            UNROLL
            for (int h = 0; h < HEIGHT; h++) weight[h] = broadcast(*weights++);
            UNROLL
            for (int n = 0; n < N; n++) {
                const Vector value = load(from + n * LANES);
                UNROLL
                for (int h = 0; h < HEIGHT; h++) sum[s][h][n] += weight[h] * value;
            }
        };
        const uint16_t* const end = offsets + visit->count;
        for (; offsets + SETS <= end;)
            UNROLL
            for (int s = 0; s < SETS; s++) add(s);
        while (offsets < end) add(0);

        UNROLL
        for (int s = 1; s < SETS; s++)
            UNROLL
            for (int h = 0; h < HEIGHT; h++)
                UNROLL
                for (int n = 0; n < N; n++) sum[0][h][n] += sum[s][h][n];
        if (visit->last && target.activation == RELU)
            UNROLL
            for (int h = 0; h < HEIGHT; h++)
                UNROLL
                for (int n = 0; n < N; n++) sum[0][h][n] = larger(Vector{}, sum[0][h][n]);
        UNROLL
        for (int h = 0; h < HEIGHT; h++)
            UNROLL
            for (int n = 0; n < N; n++) store(out + h * target.row + n * LANES, sum[0][h][n]);
        if (visit->last && target.activation > RELU) activate_rows(out, target.row, HEIGHT, N, target.activation);
    }
}

using Multiply = void (*)(const Stream&, const float*, const Target&);

template <int HEIGHT, int... N>
constexpr std::array<Multiply, sizeof...(N)> multiply_table(std::integer_sequence<int, N...>) {
    return {multiply<HEIGHT, N + 1>...};
}

// Vectors of positions whose sums fit into the registers, beside the weights and one vector of x.
constexpr int width_of(int height) { return height == 1 ? MOST : std::max(1, (REGISTERS - height - 1) / height); }

inline Multiply find_multiply(int height, int64_t vectors) {
    static constexpr auto one = multiply_table<1>(std::make_integer_sequence<int, width_of(1)>());
    static constexpr auto four = multiply_table<4>(std::make_integer_sequence<int, width_of(4)>());
    static constexpr auto eight = multiply_table<8>(std::make_integer_sequence<int, width_of(8)>());
    return height == 1 ? one[vectors - 1] : height == 4 ? four[vectors - 1] : eight[vectors - 1];
}

struct Csr {
    std::vector<int32_t> starts, columns;
    std::vector<float> values;
    int64_t rows() const { return static_cast<int64_t>(starts.size()) - 1; }
};

class Convolution : public Operation {
  public:
    // residual: number of a tensor, or -1.
    Convolution(
        int in, int out, int residual, const SparingWindow& window, Csr weight, std::vector<float> bias, int activation
    )
        : window_(window), weight_(std::move(weight)), bias_(std::move(bias)), activation_(activation) {
        reads = residual < 0 ? std::vector<int>{in} : std::vector<int>{in, residual};
        writes = {out};
        overwrites = residual == in ? -1 : residual;  // all filters read the input
        taps_ = window_.kernel_y * window_.kernel_x;
        direct_ = taps_ == 1 && window_.stride_y == 1 && window_.stride_x == 1 && window_.padding_y == 0 &&
                  window_.padding_x == 0;
    }

    const char* name() const override { return "convolution"; }
    const SparingWindow* window() const override { return &window_; }

    double cost(const Layout& in, const Layout& out) override {
        double best = INFINITY;
        if (direct_)
            choose(in.channels, out.vectors, Gather(), in.row(), best);
        else
            for (const bool shared : {true, false})
                if (!shared || out.pitch >= pitch_for(window_, in.width, out.width)) {
                    const Gather gather(window_, in, out, shared);
                    choose(in.channels, out.vectors, gather, gather.channel_size(), best);
                }
        require(
            best < INFINITY,
            "a convolution with kernel " + std::to_string(window_.kernel_y) + "x" + std::to_string(window_.kernel_x) +
                " and dilation " + std::to_string(window_.dilation_y) + "x" + std::to_string(window_.dilation_x) +
                " on images of width " + std::to_string(in.width) + " is too large for the engine"
        );
        return best * static_cast<double>(out.images) * static_cast<double>(out.total_vectors()) /
               static_cast<double>(out.vectors);
    }

    void prepare(const std::vector<Tensor>& tensors, int threads) override {
        const Layout &in = tensors[reads[0]].layout, &out = tensors[writes[0]].layout;
        cost(in, out);  // chooses the blocks for the final layouts
        // Few tiles are shared by several threads, each with a part of the filters.
        tiles_ = out.images * out.tiles();
        groups_ = threads > 1 && tiles_ < 8 * threads && tiles_ % threads != 0 ? threads : 1;
        blocks_ = (in.channels + block_ - 1) / block_;
        pack();
        weight_ = Csr();
        patterns_.clear();
    }

    int64_t scratch() const override { return direct_ ? 0 : block_ * channel_size_; }
    int64_t items() const override { return tiles_ * groups_; }

    void run(int64_t item, const std::vector<Tensor>& tensors, float* scratch) override {
        const Tensor &in = tensors[reads[0]], &out = tensors[writes[0]];
        const int64_t index = item / groups_, group = item % groups_;
        const int64_t image = index / out.layout.tiles(), tile = index % out.layout.tiles();
        const int64_t filled = out.layout.filled(tile), step = width_of(height_);
        const float* residual = reads.size() > 1 ? tensors[reads[1]].tile(index) : nullptr;
        for (int64_t block = 0; block < blocks_; block++) {
            const int64_t first = block * block_;
            const float* x = scratch;
            if (direct_)
                x = in.tile(index) + first * channel_size_;
            else
                gather_.run(
                    tile, in.tile(image * in.layout.tiles()) + first * in.layout.row(), in.layout.row(),
                    std::min(block_, in.layout.channels - first), scratch
                );
            const Part& part = parts_[block * groups_ + group];
            const Stream stream{
                &visits_[part.visit], &visits_[part.visit] + part.visits, &values_[part.value], &offsets_[part.offset],
            };
            for (int64_t n = 0; n < filled; n += step) {
                const int64_t skip = n * LANES;
                const Target target{
                    out.tile(index) + skip, residual ? residual + skip : nullptr, out.layout.row(), bias_.data(), activation_,
                };
                find_multiply(height_, std::min(step, filled - n))(stream, x + skip, target);
            }
        }
    }

  private:
    struct Part {
        size_t visit, visits, value, offset;
    };

    // Choose the height, the channels of a block and the copies by their costs for a tile, in processor cycles. A
    // multiplication takes one cycle if x is in the first cache, and more if it is not, or crosses a cache line. Reading
    // a weight, beginning and ending a visit, and the copies come on top.
    void choose(int64_t channels, int64_t vectors, const Gather& gather, int64_t channel_size, double& best) {
        const double n = static_cast<double>(vectors);
        const double copies = direct_ ? 0.0 : gather.cost() * static_cast<double>(channels);
        const double crossing = direct_ ? 0.0 : 0.45 * gather.misaligned();
        for (const int height : {1, 4, 8}) {
            // Zeros between the nonzero weights of neighbors are multiplied, too.
            if (weight_.rows() % height != 0) continue;
            const int64_t columns = static_cast<int64_t>(pattern(height).columns.size());
            if (height > 1 && (columns == 0 || 2 * weight_.starts.back() < height * columns)) continue;
            int64_t tried = 0;
            for (const int64_t kilobytes : {24, 40, 56, 80, 112, 256}) {
                const int64_t most = std::min(kilobytes * 1024 / 4, int64_t{UINT16_MAX}) / channel_size;
                if (most == 0) continue;
                const int64_t blocks = (channels + most - 1) / most, block = (channels + blocks - 1) / blocks;
                if (block == tried) continue;
                tried = block;
                const int64_t bytes = 4 * block * channel_size;
                const double load = bytes <= 28 << 10 ? 1.0 : bytes <= 64 << 10 ? 1.2 : bytes <= 128 << 10 ? 1.35 : 1.6;
                const double vector = height == 1 ? load + crossing : 1.05 * height + load - 1;
                const double cost = copies + static_cast<double>(columns) * (vector * n + 1.3) +
                                    static_cast<double>(count_visits(height, block) * height) * (2.5 * n + 8.0 / height);
                if (cost < best) {
                    best = cost;
                    height_ = height;
                    block_ = block;
                    gather_ = gather;
                    channel_size_ = channel_size;
                }
            }
        }
    }

    // Columns that are not zero in any of `height` neighboring filters: the pattern of their visits.
    struct Pattern {
        std::vector<int32_t> starts, columns;
    };

    const Pattern& pattern(int height) {
        Pattern& merged = patterns_[height];
        if (!merged.starts.empty()) return merged;
        if (height == 1) return merged = {weight_.starts, weight_.columns};
        merged.starts = {0};
        std::vector<int32_t> columns;
        for (int64_t filter = 0; filter < weight_.rows(); filter += height) {
            columns.assign(
                weight_.columns.begin() + weight_.starts[filter], weight_.columns.begin() + weight_.starts[filter + height]
            );
            std::sort(columns.begin(), columns.end());
            const auto end = std::unique(columns.begin(), columns.end());
            merged.columns.insert(merged.columns.end(), columns.begin(), end);
            merged.starts.push_back(static_cast<int32_t>(merged.columns.size()));
        }
        return merged;
    }

    // Call visit(block, filter, from, to) for every `height` filters and every block of channels in which they have
    // weights, with the indices of their columns in the pattern.
    template <class Function>
    void for_each_visit(int height, int64_t block, Function visit) {
        const auto& [starts, columns] = pattern(height);
        const int64_t width = block * taps_;
        for (size_t group = 0; group + 1 < starts.size(); group++) {
            const int64_t filter = static_cast<int64_t>(group) * height;
            int32_t from = starts[group];
            if (from == starts[group + 1]) visit(int64_t{0}, filter, from, from);
            while (from < starts[group + 1]) {
                const int64_t index = columns[from] / width;
                const auto next = std::lower_bound(
                    columns.begin() + from, columns.begin() + starts[group + 1], (index + 1) * width
                );
                const int32_t to = static_cast<int32_t>(next - columns.begin());
                visit(index, filter, from, to);
                from = to;
            }
        }
    }

    int64_t count_visits(int height, int64_t block) {
        int64_t visits = 0;
        for_each_visit(height, block, [&](int64_t, int64_t, int32_t, int32_t) { visits++; });
        return visits;
    }

    void pack() {
        struct Entry {
            int64_t block, filter;
            int32_t from, to;  // columns in the pattern
            bool first, last;
            int32_t count() const { return to - from; }
        };
        const std::vector<int32_t>& columns = pattern(height_).columns;
        std::vector<std::vector<Entry>> parts(blocks_ * groups_);
        // The next filter goes to the group with the least work.
        std::vector<int64_t> work(groups_, 0);
        std::vector<Entry> entries;
        for_each_visit(height_, block_, [&](int64_t block, int64_t filter, int32_t from, int32_t to) {
            entries.push_back({block, filter, from, to, false, false});
        });
        for (size_t begin = 0, end = 0; begin < entries.size(); begin = end) {
            const size_t group = std::min_element(work.begin(), work.end()) - work.begin();
            while (end < entries.size() && entries[end].filter == entries[begin].filter) end++;
            entries[begin].first = entries[end - 1].last = true;
            for (size_t i = begin; i < end; i++) {
                work[group] += entries[i].count() + 2;
                parts[entries[i].block * groups_ + group].push_back(entries[i]);
            }
        }
        for (size_t index = 0; index < parts.size(); index++) {
            auto& part = parts[index];
            // Successive visits of equal length let the processor predict where their loops end.
            std::stable_sort(part.begin(), part.end(), [](const Entry& a, const Entry& b) {
                return std::make_tuple(a.first, a.last, a.count()) > std::make_tuple(b.first, b.last, b.count());
            });
            parts_.push_back({visits_.size(), part.size(), values_.size(), offsets_.size()});
            const int64_t base = static_cast<int64_t>(index) / groups_ * block_;
            for (const Entry& entry : part) {
                visits_.push_back({
                    static_cast<uint32_t>(entry.count()), static_cast<uint16_t>(entry.filter), entry.first, entry.last,
                });
                for (int32_t j = entry.from; j < entry.to; j++) {
                    const int32_t column = columns[j];
                    const int64_t channel = column / taps_ - base;
                    offsets_.push_back(static_cast<uint16_t>(
                        channel * channel_size_ + (direct_ ? 0 : gather_.tap(column % taps_))
                    ));
                    for (int64_t filter = entry.filter; filter < entry.filter + height_; filter++)
                        values_.push_back(height_ == 1 ? weight_.values[j] : value(filter, column));
                }
            }
        }
        // Empty vectors have no address.
        visits_.push_back({});
        values_.push_back(0);
        offsets_.push_back(0);
    }

    float value(int64_t filter, int32_t column) const {
        const auto begin = weight_.columns.begin() + weight_.starts[filter];
        const auto end = weight_.columns.begin() + weight_.starts[filter + 1];
        const auto found = std::lower_bound(begin, end, column);
        return found != end && *found == column ? weight_.values[found - weight_.columns.begin()] : 0.0f;
    }

    SparingWindow window_;
    Csr weight_;
    std::map<int, Pattern> patterns_;  // by height
    std::vector<float> bias_;
    int activation_;
    Gather gather_;
    bool direct_ = false;
    int height_ = 1;
    int64_t taps_ = 1, channel_size_ = 0, tiles_ = 0, groups_ = 1, block_ = 1, blocks_ = 1;
    std::vector<Part> parts_;
    std::vector<Visit> visits_;
    std::vector<float> values_;
    std::vector<uint16_t> offsets_;
};

}  // namespace sparing
