// Depthwise convolution and pooling: operations on a window that slides over one channel.
//
// Kernel element (ky, kx) of output pixel (y, x) reads input pixel (y * stride + ky * dilation - padding,
// x * stride + kx * dilation - padding). The input of a channel is copied to planes, one for each remainder of the row
// and of the column modulo the stride, without padding to the left and right. The rows of all planes have the same
// pitch, so the element reads
//
//     plane[p + row_shift * pitch + column_shift]
//
// for the output positions p = y * pitch + x: one load for a whole vector, also across the ends of rows. Rows above and
// below the image are filled. A column to the left or right of the image belongs to another row, so a mask replaces it.
//
// The pitch is that of the output if the rows of the planes are not longer. Otherwise the results have a larger pitch,
// too, and are copied to the output.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "activation.h"
#include "items.h"
#include "operation.h"
#include "shuffle.h"

namespace sparing {

class WindowOperation : public Operation {
  public:
    void prepare(const std::vector<Tensor>& tensors, int) override {
        divide(tensors, least_bands);
        const SparingWindow& w = window_;
        pitch_ = std::max(to_.pitch, (from_.width + w.stride_x - 1) / w.stride_x);

        const Axis y = axis(w.kernel_y, w.stride_y, w.padding_y, w.dilation_y);
        const Axis x = axis(w.kernel_x, w.stride_x, w.padding_x, w.dilation_x);
        first_row_ = y.smallest;
        more_rows_ = y.largest - y.smallest;
        // sum_centered reads one vector more at both ends.
        front_ = LANES + round_up(std::max<int64_t>(0, -x.smallest));
        back_ = 3 * LANES + std::max<int64_t>(0, x.largest);

        const int64_t rows = std::min(to_.height, band_ * to_.row() / to_.pitch + 2);
        plane_ = round_up(front_ + (rows + more_rows_) * pitch_ + back_);
        result_ = direct() ? 0 : round_up(rows * pitch_);
        // The work of a channel, in floats: the copy, and 8 kernel elements are about as much as another copy.
        const int64_t work = w.stride_y * w.stride_x * plane_ + band_ * to_.row() * w.kernel_y * w.kernel_x / 8;
        items_ = Items(to_.images * bands_, to_.channels, work);

        offsets_.clear();
        for (int64_t kx = 0; kx < w.kernel_x; kx++)
            for (int64_t ky = 0; ky < w.kernel_y; ky++)
                offsets_.push_back((y.phases[ky] * w.stride_x + x.phases[kx]) * plane_ + front_ +
                                   (y.shifts[ky] - first_row_) * pitch_ + x.shifts[kx]);
        masks_.clear();
        lanes_.clear();
        for (int64_t kx = 0; kx < w.kernel_x; kx++) {
            lanes_.push_back(mask(kx * w.dilation_x - w.padding_x));
            masks_.push_back(lanes_.back().empty() ? nullptr : lanes_.back().data());
        }
        columns_.clear();
        for (int64_t i = 0; i < std::max(to_.total_vectors(), result_ / LANES); i++)
            columns_.push_back(static_cast<int32_t>(i * LANES % pitch_));
    }

    // Divide the output into bands, at least `least` of an image if it has as many tiles.
    void divide(const std::vector<Tensor>& tensors, int64_t least) {
        from_ = tensors[in_].layout;
        to_ = tensors[out_].layout;
        // Work on as many tiles as fill half of a level 1 cache, but on several rows, since bands share input rows.
        const int64_t positions = std::max<int64_t>(4096, 8 * to_.pitch);
        bands_ = std::max(least, (to_.tiles() * to_.row() + positions - 1) / positions);
        band_ = (to_.tiles() + bands_ - 1) / bands_;
        bands_ = (to_.tiles() + band_ - 1) / band_;
    }

    int64_t items() const override { return items_.count(); }

    int64_t scratch() const override {
        const double floats = static_cast<double>(window_.stride_y * window_.stride_x) * static_cast<double>(plane_);
        require(floats < 1e12, std::string(name()) + ": the stride or the image is too large");
        return window_.stride_y * window_.stride_x * plane_ + result_ + LANES;
    }

    void run(int64_t item, const std::vector<Tensor>& tensors, float* scratch) override {
        items_.for_each_tile(item, [&](int64_t index, int64_t first, int64_t end) {
            run_band(index / bands_, band(index % bands_), first, end, tensors, scratch);
        });
    }

    // Tiles [tile, end) of an image, which lie in rows [y, y + rows) of the output and need rows [top, bottom) of the input.
    struct Band {
        int64_t tile, end, y, rows, top, bottom;
    };

    int64_t bands() const { return bands_; }

    Band band(int64_t index) const {
        const SparingWindow& w = window_;
        Band band;
        band.tile = index * band_;
        band.end = std::min(band.tile + band_, to_.tiles());
        band.y = band.tile * to_.row() / to_.pitch;
        band.rows = std::min((band.end * to_.row() - 1) / to_.pitch + 1, to_.height) - band.y;
        const int64_t top = band.y * w.stride_y - w.padding_y;
        band.top = std::clamp<int64_t>(top, 0, from_.height);
        band.bottom = std::clamp<int64_t>(
            top + (band.rows - 1) * w.stride_y + (w.kernel_y - 1) * w.dilation_y + 1, band.top, from_.height
        );
        return band;
    }

    // Compute channels [first, end) of a band.
    void run_band(
        int64_t image, const Band& band, int64_t first, int64_t end, const std::vector<Tensor>& tensors, float* scratch
    ) const {
        for (int64_t channel = first; channel < end; channel++) {
            const int64_t from = image * from_.tiles() * from_.tile_size() + channel * from_.row();
            float* to = tensors[out_].tile(image * to_.tiles()) + channel * to_.row();
            gather(tensors[in_], from, band, scratch);
            if (direct()) {
                compute(channel, band, scratch, to);
            } else {
                float* result = scratch + window_.stride_y * window_.stride_x * plane_;
                compute(channel, band, scratch, result);
                scatter(result, band, to);
            }
        }
    }

    int64_t least_bands = 1;  // of an image

  protected:
    // Successive vectors to compute.
    struct Run {
        const float* from;       // in the first plane; offsets_ lead to what a kernel element reads
        const int32_t* columns;  // of the first lane of each vector, where its masks begin
        int64_t position;        // of the first lane, y * pitch_ + x
        float* to;
        int64_t vectors;
    };

    WindowOperation(int in, int out, const SparingWindow& window, float outside)
        : window_(window), in_(in), out_(out), outside_(outside) {
        reads = {in};
        writes = {out};
    }

    // Compute a band of a channel from the planes: call for_each_run(band, planes, to, ...).
    virtual void compute(int64_t channel, const Band& band, const float* planes, float* to) const = 0;

    template <typename Function>
    INLINE void for_each_run(const Band& band, const float* planes, float* to, const Function& function) const {
        if (!direct()) {
            const int64_t vectors = (band.rows * pitch_ + LANES - 1) / LANES;
            return function(Run{planes, columns_.data(), band.y * pitch_, to, vectors});
        }
        for (int64_t tile = band.tile; tile < band.end; tile++) {
            const int64_t position = tile * to_.row();
            function(Run{planes + position - band.y * pitch_, &columns_[position / LANES], position,
                         to + tile * to_.tile_size(), to_.filled(tile)});
        }
    }

    // Call function(count, i) for vectors [i, i + count), with count as a std::integral_constant.
    template <typename Function> INLINE static void for_each_block(int64_t vectors, const Function& function) {
        int64_t i = 0;
        for (; i + 4 <= vectors; i += 4) function(std::integral_constant<int, 4>(), i);
        switch (vectors - i) {
            case 3: return function(std::integral_constant<int, 3>(), i);
            case 2: return function(std::integral_constant<int, 2>(), i);
            case 1: return function(std::integral_constant<int, 1>(), i);
        }
    }

    SparingWindow window_;
    Layout from_ = {}, to_ = {};
    int64_t pitch_ = 0;
    std::vector<int64_t> offsets_;       // [kernel_x][kernel_y]: what an element reads for the first output position
    std::vector<const int32_t*> masks_;  // [kernel_x][column]: 0 outside the image, otherwise -1; null if not needed

  private:
    // Where the elements of one axis of the kernel read: pixel stride * shift + phase from that of the output on.
    struct Axis {
        std::vector<int64_t> phases, shifts;
        int64_t smallest, largest;  // shift
    };

    static Axis axis(int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
        Axis result;
        for (int64_t k = 0; k < kernel; k++) {
            const int64_t pixel = k * dilation - padding;
            result.phases.push_back((pixel % stride + stride) % stride);
            result.shifts.push_back((pixel - result.phases.back()) / stride);
        }
        result.smallest = result.shifts.front();
        result.largest = result.shifts.back();
        return result;
    }

    static int64_t round_up(int64_t floats) { return (floats + LANES - 1) / LANES * LANES; }

    bool direct() const { return pitch_ == to_.pitch; }

    // Lanes without a pixel of the output are not masked: they may read anything finite.
    std::vector<int32_t> mask(int64_t column) const {
        std::vector<int32_t> result(pitch_ + LANES, -1);
        bool needed = false;
        for (int64_t i = 0; i < pitch_ + LANES; i++) {
            const int64_t x = i % pitch_, pixel = x * window_.stride_x + column;
            if (x >= to_.width || (pixel >= 0 && pixel < from_.width)) continue;
            result[i] = 0;
            needed = true;
        }
        return needed ? result : std::vector<int32_t>();
    }

    // Copy the input of a band to the planes, from a channel whose first tile begins at index `from`. Each copy writes
    // whole vectors, and the next one corrects what it wrote too far.
    void gather(const Tensor& in, int64_t from, const Band& band, float* planes) const {
        const SparingWindow& w = window_;
        const int64_t first = band.y + first_row_, rows = band.rows + more_rows_;
        if (w.stride_y == 1 && w.stride_x == 1 && pitch_ == from_.pitch) return gather_all(in, from, first, rows, planes);
        for (int64_t phase_y = 0; phase_y < w.stride_y; phase_y++) {
            float* plane = planes + phase_y * w.stride_x * plane_ + front_;
            for (int64_t i = 0; i < rows; i++, plane += pitch_) {
                const int64_t y = (first + i) * w.stride_y + phase_y;
                if (y >= band.top && y < band.bottom)
                    gather_row(in, from, y, plane);
                else
                    for (int64_t phase = 0; phase < w.stride_x; phase++)
                        std::fill_n(plane + phase * plane_, pitch_, outside_);
            }
            for (int64_t phase = 0; phase < w.stride_x; phase++) {
                std::fill_n(plane + phase * plane_, back_, 0.0f);
                std::fill_n(planes + (phase_y * w.stride_x + phase) * plane_, front_, 0.0f);
            }
        }
    }

    // Copy all rows at once.
    void gather_all(const Tensor& in, int64_t from, int64_t first, int64_t rows, float* planes) const {
        const int64_t above = std::clamp<int64_t>(-first, 0, rows);
        const int64_t below = std::clamp<int64_t>(first + rows - from_.height, 0, rows - above);
        const int64_t inside = rows - above - below;
        std::fill_n(planes, front_, 0.0f);
        float* plane = planes + front_;
        std::fill_n(plane, above * pitch_, outside_);
        plane += above * pitch_;
        if (inside > 0) {
            const int64_t begin = (first + above) * pitch_;
            const int64_t count = std::min(inside * pitch_, from_.positions() - begin);  // the last row has no gap
            for_each_piece(from_, begin, count, [&](int64_t offset, int64_t done, int64_t floats) {
                for (int64_t i = 0; i < floats; i += LANES) store(plane + done + i, load(in.at(from + offset + i)));
            });
            std::fill(plane + count, plane + inside * pitch_, 0.0f);
            plane += inside * pitch_;
        }
        std::fill_n(plane, below * pitch_, outside_);
        std::fill_n(plane + below * pitch_, back_, 0.0f);
    }

    // Distribute an input row to the planes of its columns.
    void gather_row(const Tensor& in, int64_t from, int64_t y, float* plane) const {
        const int64_t stride = window_.stride_x;
        for_each_piece(from_, y * from_.pitch, from_.width, [&](int64_t offset, int64_t x, int64_t count) {
            const float* piece = in.at(from + offset);
            if (stride == 1) {
                for (int64_t i = 0; i < count; i += LANES) store(plane + x + i, load(piece + i));
            } else if (stride == 2) {
                float* even = plane + x % 2 * plane_ + x / 2;
                float* odd = plane + (x + 1) % 2 * plane_ + (x + 1) / 2;
                for (int64_t i = 0; i < count; i += 2 * LANES) {
                    const Vector a = load(piece + i), b = load(piece + i + LANES);
                    store(even + i / 2, shuffle<EverySecond<0>>(a, b));
                    store(odd + i / 2, shuffle<EverySecond<1>>(a, b));
                }
            } else {
                for (int64_t i = 0; i < count; i++) plane[(x + i) % stride * plane_ + (x + i) / stride] = piece[i];
            }
        });
        for (int64_t phase = 0; phase < stride; phase++) {
            const int64_t count = (from_.width - phase + stride - 1) / stride;
            for (int64_t i = count; i < pitch_; i++) plane[phase * plane_ + i] = 0.0f;
        }
    }

    // Copy rows of results to the tiles of a band.
    void scatter(const float* result, const Band& band, float* to) const {
        const int64_t begin = band.tile * to_.row();
        const int64_t end = std::min(band.end * to_.row(), to_.total_vectors() * LANES);
        for (int64_t y = band.y; y < band.y + band.rows; y++) {
            const int64_t first = std::max(begin, y * to_.pitch), last = std::min(end, (y + 1) * to_.pitch);
            const float* row = result + (y - band.y) * pitch_ + first - y * to_.pitch;
            for_each_piece(to_, first, last - first, [&](int64_t offset, int64_t done, int64_t count) {
                std::copy_n(row + done, count, to + offset);
            });
        }
        const int64_t behind = std::max(begin, (band.y + band.rows) * to_.pitch);
        for_each_piece(to_, behind, end - behind, [&](int64_t offset, int64_t, int64_t count) {
            std::fill_n(to + offset, count, 0.0f);
        });
    }

    int in_, out_;
    float outside_;
    int64_t first_row_ = 0, more_rows_ = 0;  // output row y reads plane rows y + first_row_ and more_rows_ after it
    int64_t front_ = 0, back_ = 0;           // floats before and behind the rows of a plane
    int64_t plane_ = 0, result_ = 0;         // sizes
    int64_t bands_ = 0, band_ = 0;           // bands of an image, tiles of a band
    std::vector<int32_t> columns_;           // of the first lane of each vector
    std::vector<std::vector<int32_t>> lanes_;  // the masks
    Items items_;
};

// Sums of the window, weighted for each channel: weight [channels, kernel_y, kernel_x], bias [channels].
class Depthwise : public WindowOperation {
  public:
    Depthwise(int in, int out, const SparingWindow& window, std::vector<float> weight, std::vector<float> bias,
              int activation)
        : WindowOperation(in, out, window, 0.0f),
          weight_(std::move(weight)),
          bias_(std::move(bias)),
          activation_(activation) {}

    const char* name() const override { return "depthwise convolution"; }

    void prepare(const std::vector<Tensor>& tensors, int threads) override {
        WindowOperation::prepare(tensors, threads);
        // The same order as that of the offsets.
        std::vector<float> sorted;
        for (int64_t channel = 0; channel < to_.channels; channel++)
            for (int64_t kx = 0; kx < window_.kernel_x; kx++)
                for (int64_t ky = 0; ky < window_.kernel_y; ky++)
                    sorted.push_back(weight_[(channel * window_.kernel_y + ky) * window_.kernel_x + kx]);
        weight_ = sorted;
    }

  protected:
    void compute(int64_t channel, const Band& band, const float* planes, float* to) const override {
        const SparingWindow& w = window_;
        const bool centered = w.kernel_y == w.kernel_x && w.padding_x == w.kernel_x / 2 && w.dilation_x == 1;
        if (centered && w.kernel_x == 3 && w.stride_x == 1)
            sum_centered<3, 1>(channel, band, planes, to);
        else if (centered && w.kernel_x == 3 && w.stride_x == 2)
            sum_centered<3, 2>(channel, band, planes, to);
        else if (centered && w.kernel_x == 5 && w.stride_x == 1)
            sum_centered<5, 1>(channel, band, planes, to);
        else if (centered && w.kernel_x == 5 && w.stride_x == 2)
            sum_centered<5, 2>(channel, band, planes, to);
        else if (centered && w.kernel_x == 7 && w.stride_x == 1)
            sum_centered<7, 1>(channel, band, planes, to);
        else
            sum(channel, band, planes, to);
        // Apart from the sums, which need all registers.
        if (activation_ == IDENTITY) return;
        with_activation(activation_, [&](auto activation) {
            for_each_run(band, planes, to, [&](const Run& run) {
                for (float* at = run.to; at < run.to + run.vectors * LANES; at += LANES)
                    store(at, activate<activation>(load(at)));
            });
        });
    }

  private:
    // Kernel columns of K x K elements with stride S and padding K / 2, as they are in `axis`.
    template <int K, int S> struct Centered {
        static constexpr int phase(int kx) { return (kx - K / 2 + K * S) % S; }
        static constexpr int shift(int kx) { return (kx - K / 2 - phase(kx)) / S; }
    };

    // For each kernel column, the weighted sums of a vector before its column shift.
    template <int K, int S>
    INLINE static void sum_columns(
        const float* from, const int64_t (&rows)[S][K], const Vector (&weights)[K][K], Vector (&sums)[K]
    ) {
        for (int kx = 0; kx < K; kx++) sums[kx] = Vector{};
#pragma GCC unroll 8
        for (int ky = 0; ky < K; ky++)
#pragma GCC unroll 8
            for (int kx = 0; kx < K; kx++)
                sums[kx] += weights[ky][kx] * load(from + rows[Centered<K, S>::phase(kx)][ky]);
    }

    // Shift the sums of kernel column KX, from the vectors before, at and after the output, and add them to the total.
    template <int K, int S, int KX>
    INLINE static void add_column(
        const Vector (&before)[K], const Vector (&here)[K], const Vector (&after)[K], const int32_t* mask, int32_t x,
        Vector& total
    ) {
        constexpr int shift = Centered<K, S>::shift(KX);
        Vector sum = here[KX];
        if constexpr (shift < 0) sum = shuffle<Successive<LANES + shift>>(before[KX], here[KX]);
        if constexpr (shift > 0) sum = shuffle<Successive<shift>>(here[KX], after[KX]);
        if (mask) sum = masked(sum, mask + x);
        total += sum;
    }
    template <int K, int S, int... KX>
    INLINE static void add_columns(
        const Vector (&before)[K], const Vector (&here)[K], const Vector (&after)[K], const int32_t* const* masks,
        int32_t x, Vector& total, std::integer_sequence<int, KX...>
    ) {
        (add_column<K, S, KX>(before, here, after, masks[KX], x, total), ...);
    }

    // All elements of a kernel row that have the same phase read the same vector: their sums are shifted instead. This
    // replaces most loads, which are slow since they cross cache lines.
    template <int K, int S> void sum_centered(int64_t channel, const Band& band, const float* planes, float* to) const {
        int64_t rows[S][K];
        Vector weights[K][K];
        for (int kx = 0; kx < K; kx++)
            for (int ky = 0; ky < K; ky++) {
                rows[Centered<K, S>::phase(kx)][ky] = offsets_[kx * K + ky] - Centered<K, S>::shift(kx);
                weights[ky][kx] = broadcast(weight_[(channel * K + kx) * K + ky]);
            }
        const Vector bias = broadcast(bias_[channel]);
        const int32_t* masks[K];
        for (int kx = 0; kx < K; kx++) masks[kx] = masks_[kx];
        Vector before[K], here[K], after[K];
        bool first = true;
        for_each_run(band, planes, to, [&](const Run& run) __attribute__((always_inline)) {
            if (first) {
                sum_columns<K, S>(run.from - LANES, rows, weights, before);
                sum_columns<K, S>(run.from, rows, weights, here);
                first = false;
            }
            for (int64_t i = 0; i < run.vectors; i++) {
                sum_columns<K, S>(run.from + (i + 1) * LANES, rows, weights, after);
                Vector total = bias;
                add_columns<K, S>(before, here, after, masks, run.columns[i], total,
                                  std::make_integer_sequence<int, K>());
                store(run.to + i * LANES, total);
                for (int kx = 0; kx < K; kx++) {
                    before[kx] = here[kx];
                    here[kx] = after[kx];
                }
            }
        });
    }

    // Any window.
    void sum(int64_t channel, const Band& band, const float* planes, float* to) const {
        const int64_t kernel_y = window_.kernel_y, kernel_x = window_.kernel_x;
        const float* weight = &weight_[channel * kernel_y * kernel_x];
        const Vector bias = broadcast(bias_[channel]);
        for_each_run(band, planes, to, [&](const Run& run) {
            for_each_block(run.vectors, [&](auto count, int64_t first) __attribute__((always_inline)) {
                constexpr int COUNT = decltype(count)::value;
                const float* from = run.from + first * LANES;
                Vector total[COUNT];
                for (int i = 0; i < COUNT; i++) total[i] = bias;
                for (int64_t kx = 0; kx < kernel_x; kx++) {
                    Vector column[COUNT] = {};
                    for (int64_t tap = kx * kernel_y; tap < (kx + 1) * kernel_y; tap++) {
                        const Vector factor = broadcast(weight[tap]);
                        for (int i = 0; i < COUNT; i++) column[i] += factor * load(from + offsets_[tap] + i * LANES);
                    }
                    if (masks_[kx])
                        for (int i = 0; i < COUNT; i++)
                            column[i] = masked(column[i], masks_[kx] + run.columns[first + i]);
                    for (int i = 0; i < COUNT; i++) total[i] += column[i];
                }
                for (int i = 0; i < COUNT; i++) store(run.to + (first + i) * LANES, total[i]);
            });
        });
    }

    std::vector<float> weight_, bias_;
    int activation_;
};

// Maximum or average of the window.
class Pool : public WindowOperation {
  public:
    Pool(int in, int out, const SparingWindow& window, int kind)
        : WindowOperation(in, out, window, kind == MAXIMUM ? LOWEST : 0.0f), kind_(kind) {}

    const char* name() const override { return kind_ == MAXIMUM ? "max pool" : "average pool"; }

    void prepare(const std::vector<Tensor>& tensors, int threads) override {
        WindowOperation::prepare(tensors, threads);
        if (kind_ == MAXIMUM) return;
        const SparingWindow& w = window_;
        scale_.assign(to_.height * pitch_ + LANES, 0.0f);
        for (int64_t y = 0; y < to_.height; y++) {
            const int64_t rows = elements(y, w.kernel_y, w.stride_y, w.padding_y, w.dilation_y, from_.height);
            for (int64_t x = 0; x < to_.width; x++) {
                const int64_t columns = elements(x, w.kernel_x, w.stride_x, w.padding_x, w.dilation_x, from_.width);
                if (rows * columns > 0) scale_[y * pitch_ + x] = 1.0f / (rows * columns);
            }
        }
    }

  protected:
    void compute(int64_t, const Band& band, const float* planes, float* to) const override {
        if (kind_ != MAXIMUM)
            average(band, planes, to);
        else if (window_.kernel_y == 3 && window_.kernel_x == 3)
            maximum<3, 3>(band, planes, to);
        else if (window_.kernel_y == 2 && window_.kernel_x == 2)
            maximum<2, 2>(band, planes, to);
        else
            maximum<0, 0>(band, planes, to);
    }

  private:
    static constexpr float LOWEST = -std::numeric_limits<float>::infinity();

    // Number of elements of one axis that count for output pixel `to`. Padding counts up to `padding` pixels behind the
    // image, even if ceil_mode lets the window reach further.
    int64_t elements(
        int64_t to, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation, int64_t size
    ) const {
        const int64_t counted = kind_ == AVERAGE ? padding : 0;
        int64_t result = 0;
        for (int64_t k = 0; k < kernel; k++) {
            const int64_t pixel = to * stride + k * dilation - padding;
            result += pixel >= -counted && pixel < size + counted;
        }
        return result;
    }

    // KY and KX are the size of the kernel, or 0 for any size.
    template <int KY, int KX> void maximum(const Band& band, const float* planes, float* to) const {
        const int64_t kernel_y = KY ? KY : window_.kernel_y, kernel_x = KX ? KX : window_.kernel_x;
        const int64_t* offsets = offsets_.data();
        const int32_t* const* masks = masks_.data();
        for_each_run(band, planes, to, [&](const Run& run) {
            for_each_block(run.vectors, [&](auto count, int64_t first) __attribute__((always_inline)) {
                constexpr int COUNT = decltype(count)::value;
                Vector total[COUNT];
                for (int i = 0; i < COUNT; i++) total[i] = broadcast(LOWEST);
                for (int64_t kx = 0; kx < kernel_x; kx++) {
                    Vector column[COUNT];
                    for (int i = 0; i < COUNT; i++) column[i] = broadcast(LOWEST);
                    for (int64_t ky = 0; ky < kernel_y; ky++) {
                        const float* from = run.from + offsets[kx * kernel_y + ky] + first * LANES;
                        for (int i = 0; i < COUNT; i++) column[i] = larger_or_nan(column[i], load(from + i * LANES));
                    }
                    if (masks[kx])
                        for (int i = 0; i < COUNT; i++)
                            column[i] = load(masks[kx] + run.columns[first + i]) ? column[i] : broadcast(LOWEST);
                    for (int i = 0; i < COUNT; i++) total[i] = larger_or_nan(total[i], column[i]);
                }
                for (int i = 0; i < COUNT; i++) store(run.to + (first + i) * LANES, total[i]);
            });
        });
    }

    void average(const Band& band, const float* planes, float* to) const {
        const int64_t* offsets = offsets_.data();
        const int32_t* const* masks = masks_.data();
        for_each_run(band, planes, to, [&](const Run& run) {
            for_each_block(run.vectors, [&](auto count, int64_t first) __attribute__((always_inline)) {
                constexpr int COUNT = decltype(count)::value;
                Vector total[COUNT] = {};
                for (int64_t kx = 0; kx < window_.kernel_x; kx++) {
                    Vector column[COUNT] = {};
                    for (int64_t ky = 0; ky < window_.kernel_y; ky++) {
                        const float* from = run.from + offsets[kx * window_.kernel_y + ky] + first * LANES;
                        for (int i = 0; i < COUNT; i++) column[i] += load(from + i * LANES);
                    }
                    if (masks[kx])
                        for (int i = 0; i < COUNT; i++)
                            column[i] = masked(column[i], masks[kx] + run.columns[first + i]);
                    for (int i = 0; i < COUNT; i++) total[i] += column[i];
                }
                const float* scale = &scale_[run.position + first * LANES];
                for (int i = 0; i < COUNT; i++)
                    store(run.to + (first + i) * LANES, total[i] * load(scale + i * LANES));
            });
        });
    }

    int kind_;
    std::vector<float> scale_;  // 1 / number of elements, for positions y * pitch_ + x
};

}  // namespace sparing
