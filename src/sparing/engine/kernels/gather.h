// Copies of the inputs of a convolution, laid out so that each weight reads one contiguous run of floats.
//
// The output positions p = y * pitch + x of a tile are computed together. Weight (ky, kx) of a channel needs, for output
// pixel (y, x), the input pixel (y * stride + ky * dilation - padding, x * stride + kx * dilation - padding). The copy
// of a channel consists of planes, one per remainder of the row and of the column modulo the stride. A plane has the
// pitch of the output, and zeros where the input is padded. The weight then reads
//
//     plane[p + row_shift * pitch + column_shift]
//
// for all p of the tile. A column shift can read beyond the end of a row; what it finds there, the first columns of the
// next row, must be padding. `pitch_for` is the smallest pitch for which this holds. Where it would be much wider than
// the output, each kernel column gets a plane of its own, and no column shift.
//
// Which floats to copy is the same for all channels and images, and is listed once per tile.
#pragma once

#include <cstring>
#include <vector>

#include "engine.h"
#include "layout.h"
#include "shuffle.h"

namespace sparing {

// Smallest pitch of an output of `width` columns that lets kernel columns share planes.
inline int64_t pitch_for(const SparingWindow& window, int64_t input_width, int64_t width) {
    const int64_t s = window.stride_x;
    int64_t pitch = width;
    for (int64_t kx = 0; kx < window.kernel_x; kx++) {
        // Columns [0, end) are read. Columns [first, last) lie in the image.
        const int64_t phase = kx * window.dilation_x % s, end = width + kx * window.dilation_x / s;
        const auto column_of = [&](int64_t x) { return (std::max<int64_t>(0, x + window.padding_x - phase) + s - 1) / s; };
        const int64_t first = column_of(0), last = column_of(input_width);
        // Columns [pitch, end) find columns [0, end - pitch) of the next row. Both must be padding.
        if (first < std::min(last, end)) pitch = std::max(pitch, std::min(end, std::max(last, end - first)));
    }
    return pitch;
}

class Gather {
  public:
    Gather() = default;

    // `shared`: kernel columns share planes; the pitch of `out` must be at least pitch_for(...).
    Gather(const SparingWindow& window, const Layout& in, const Layout& out, bool shared) {
        const int64_t reach = (window.kernel_y - 1) * window.dilation_y / window.stride_y * out.pitch +
                              (shared ? (window.kernel_x - 1) * window.dilation_x / window.stride_x : 0);
        // A copy of whole vectors writes up to LANES - 1 floats too many.
        const int64_t length = out.row() + reach;
        const int64_t plane_size = (length + LANES - 1) / LANES * LANES + LANES;
        std::vector<Plane> planes;
        for (int64_t ky = 0; ky < window.kernel_y; ky++) {
            for (int64_t kx = 0; kx < window.kernel_x; kx++) {
                const int64_t row = ky * window.dilation_y, column = kx * window.dilation_x;
                const Plane plane{
                    row % window.stride_y - window.padding_y,
                    (shared ? column % window.stride_x : column) - window.padding_x,
                };
                size_t index = 0;
                while (index < planes.size() && (planes[index].y != plane.y || planes[index].x != plane.x)) index++;
                if (index == planes.size()) planes.push_back(plane);
                taps_.push_back(
                    static_cast<int64_t>(index) * plane_size + row / window.stride_y * out.pitch +
                    (shared ? column / window.stride_x : 0)
                );
            }
        }
        channel_size_ = static_cast<int64_t>(planes.size()) * plane_size;
        if (channel_size_ > UINT16_MAX) return;  // too large for the offsets of weights
        for (int64_t tile = 0; tile < out.tiles(); tile++) {
            std::vector<Copy> copies;
            for (size_t index = 0; index < planes.size(); index++)
                list(window, in, out, planes[index], tile * out.row(), length,
                     static_cast<int64_t>(index) * plane_size, copies);
            tiles_.push_back(copies);
        }
    }

    int64_t channel_size() const { return channel_size_; }     // floats of the copy of a channel
    int64_t tap(int64_t index) const { return taps_[index]; }  // where weight ky * kernel_x + kx starts to read

    // Fraction of the weights whose vectors cross a border of half a cache line.
    double misaligned() const {
        const auto count = std::count_if(taps_.begin(), taps_.end(), [](int64_t tap) { return tap % 8 != 0; });
        return static_cast<double>(count) / static_cast<double>(taps_.size());
    }

    // Estimate of the processor cycles of copying one channel for one tile.
    double cost() const {
        double cycles = 0;
        for (const auto& copies : tiles_)
            for (const Copy& copy : copies)
                cycles += 3 + 1.5 * (copy.stride < 2 ? 1 : copy.stride == 2 ? 2 : LANES) * ((copy.count + LANES - 1) / LANES);
        return cycles / static_cast<double>(tiles_.size());
    }

    // Copy `channels` channels for a tile of one image. `from`: the first channel of the first tile of the image.
    void run(int64_t tile, const float* from, int64_t channel_step, int64_t channels, float* to) const {
        const std::vector<Copy>& copies = tiles_[tile];
        for (int64_t channel = 0; channel < channels; channel++, from += channel_step, to += channel_size_) {
            for (const Copy& copy : copies) {
                float* target = to + copy.to;
                const float* source = from + copy.from;
                if (copy.stride == 0)
                    for (int32_t i = 0; i < copy.count; i += LANES) store(target + i, Vector{});
                else if (copy.stride == 1)
                    for (int32_t i = 0; i < copy.count; i += LANES) store(target + i, load(source + i));
                else if (copy.stride == 2)
                    for (int32_t i = 0; i < copy.count; i += LANES) store(target + i, every_second(source + 2 * i));
                else
                    for (int32_t i = 0; i < copy.count; i++) target[i] = source[static_cast<int64_t>(i) * copy.stride];
            }
        }
    }

  private:
    struct Plane {
        int64_t y, x;  // input pixel of its first element, may be negative
    };
    struct Copy {
        int32_t to, count, stride;  // stride 0: zeros
        int64_t from;
    };

    INLINE static Vector every_second(const float* from) {
        return shuffle<EverySecond<0>>(load(from), load(from + LANES));
    }

    // List the copies for positions [start, start + length) of a plane.
    static void list(
        const SparingWindow& window, const Layout& in, const Layout& out, Plane plane, int64_t start, int64_t length,
        int64_t to, std::vector<Copy>& copies
    ) {
        const size_t first = copies.size();
        for (int64_t i = 0; i < length; i++) {
            const int64_t y = (start + i) / out.pitch * window.stride_y + plane.y;
            const int64_t x = (start + i) % out.pitch * window.stride_x + plane.x;
            const bool inside = y >= 0 && y < in.height && x >= 0 && x < in.width;
            const int64_t from = inside ? in.offset(0, 0, y, x) : 0;
            if (copies.size() > first) {  // try to continue the last run
                Copy& last = copies.back();
                if (inside ? last.stride != 0 && from == last.from + last.count * window.stride_x : last.stride == 0) {
                    last.count++;
                    continue;
                }
            }
            copies.push_back({static_cast<int32_t>(to + i), 1, inside ? static_cast<int32_t>(window.stride_x) : 0, from});
        }
    }

    int64_t channel_size_ = 0;
    std::vector<int64_t> taps_;
    std::vector<std::vector<Copy>> tiles_;
};

}  // namespace sparing
