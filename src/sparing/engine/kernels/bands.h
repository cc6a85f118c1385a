// A convolution, and the depthwise convolution or pooling that alone reads its output, computed together.
//
// The output of an early convolution is larger than the second-level cache, so writing and reading it takes about as long
// as the second operation itself. An item of this operation is a band of rows of the second one. The rows of the
// convolution that the band needs go to the scratch memory, where they stay in the cache; the whole tensor is never in
// memory. Rows that two bands need are computed twice: few with a stride of 2, too many with most strides of 1.
#pragma once

#include <memory>

#include "convolution.h"
#include "memory.h"
#include "window.h"

namespace sparing {

class Bands : public Operation {
  public:
    // first: a Convolution; second: a WindowOperation.
    Bands(std::unique_ptr<Operation> first, std::unique_ptr<Operation> second)
        : first_(static_cast<Convolution*>(first.release())),
          second_(static_cast<WindowOperation*>(second.release())),
          name_(std::string(first_->name()) + ", " + second_->name()) {
        between_ = first_->writes[0];
        reads = first_->reads;
        writes = second_->writes;
    }

    const char* name() const override { return name_.c_str(); }

    // The least number of bands of an image that stay in the cache, or 1 if the operations take less time apart. With
    // about as many tiles per band as bands, the search ends: smaller bands would compute more rows twice.
    static int64_t count(Convolution& first, WindowOperation& second, const std::vector<Tensor>& tensors, int threads) {
        constexpr double cache = 80 << 10, traffic = 1;  // floats; cycles to write and read one of them outside
        if (first.reads.size() > 1) return 1;  // a residual may lie in the memory of the output
        if (SEPARATE) return tensors[second.writes[0]].layout.height;
        const Layout &in = tensors[first.reads[0]].layout, &between = tensors[first.writes[0]].layout;
        const double size = static_cast<double>(between.size());
        if (size < 6 * cache) return 1;  // much of it stays in the cache anyway
        for (int64_t bands = threads;; bands += threads) {
            second.divide(tensors, bands);
            int64_t most = 0, tiles = 0;
            for (int64_t index = 0; index < second.bands(); index++) {
                const Range range = needed(second.band(index), between);
                most = std::max(most, range.end - range.begin);
                tiles += range.end - range.begin;
            }
            if (static_cast<double>(most * between.tile_size()) > cache && second.bands() >= bands) continue;
            const double twice = static_cast<double>(tiles - between.tiles()) / static_cast<double>(between.tiles());
            return twice * first.cost(in, between) < traffic * size ? bands : 1;
        }
    }

    void prepare(const std::vector<Tensor>& tensors, int threads) override {
        first_->prepare(tensors, 1);  // an item is a tile with all filters
        second_->prepare(tensors, threads);
        const Layout& between = tensors[between_].layout;
        for (int64_t index = 0; index < second_->bands(); index++) {
            const Range range = needed(second_->band(index), between);
            size_ = std::max(size_, (range.end - range.begin) * between.tile_size());
        }
        size_ = (size_ + 2 * LANES + 15) / 16 * 16;  // kernels read up to two vectors too many
        images_ = between.images;
    }

    int64_t scratch() const override { return size_ + std::max(first_->scratch(), second_->scratch()); }
    int64_t items() const override { return images_ * second_->bands(); }

    void run(int64_t item, const std::vector<Tensor>& tensors, float* scratch) override {
        const int64_t image = item / second_->bands();
        const WindowOperation::Band band = second_->band(item % second_->bands());
        std::vector<Tensor> part = tensors;
        Tensor& between = part[between_];
        const Range range = needed(band, between.layout);
        const int64_t before = image * between.layout.tiles();
        between.data = scratch;
        between.begin = between.layout.tile_offset(before + range.begin);
        for (int64_t tile = range.begin; tile < range.end; tile++) first_->run(before + tile, part, scratch + size_);
        second_->run_band(image, band, 0, between.layout.channels, part, scratch + size_);
    }

  private:
    struct Range {
        int64_t begin, end;
    };

    // The tiles of the convolution that a band reads.
    static Range needed(const WindowOperation::Band& band, const Layout& between) {
        const int64_t last = std::min(band.bottom * between.pitch, between.positions());
        if (band.top * between.pitch >= last) return {0, 0};
        return {band.top * between.pitch / between.row(), (last - 1) / between.row() + 1};
    }

    std::unique_ptr<Convolution> first_;
    std::unique_ptr<WindowOperation> second_;
    std::string name_;
    int between_;
    int64_t images_ = 0, size_ = 0;
};

}  // namespace sparing
