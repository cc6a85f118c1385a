// Division of an operation into items of work, and access to positions across tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "layout.h"

namespace sparing {

// Items of a few microseconds. An item is a block of channels of one tile, or several tiles with all their channels.
class Items {
  public:
    Items() = default;
    // size: floats that are read or written for one channel of a tile. Blocks begin at multiples of `multiple`.
    Items(int64_t tiles, int64_t channels, int64_t size, int64_t multiple = 1) : tiles_(tiles), channels_(channels) {
        const int64_t floats = 16384;  // of an item
        const int64_t wanted = std::clamp<int64_t>(floats / std::max<int64_t>(size, 1), 1, channels);
        block_ = (wanted + multiple - 1) / multiple * multiple;
        blocks_ = (channels + block_ - 1) / block_;
        group_ = blocks_ == 1 ? std::max<int64_t>(1, floats / (channels * std::max<int64_t>(size, 1))) : 1;
    }

    int64_t count() const { return (tiles_ + group_ - 1) / group_ * blocks_; }

    // Call function(tile, first, end), with channels [first, end), for each tile of an item.
    template <typename Function> INLINE void for_each_tile(int64_t item, const Function& function) const {
        const int64_t tile = item / blocks_ * group_, first = item % blocks_ * block_;
        for (int64_t i = tile; i < std::min(tile + group_, tiles_); i++)
            function(i, first, std::min(first + block_, channels_));
    }

  private:
    int64_t tiles_ = 0, channels_ = 0, block_ = 1, blocks_ = 1, group_ = 1;
};

// Call function(offset, done, count) for each piece of positions [first, first + count) of an image that lies in one
// tile. offset: index of its first float, for image 0 and channel 0. done: positions in the pieces before it.
template <typename Function>
INLINE void for_each_piece(const Layout& layout, int64_t first, int64_t count, const Function& function) {
    for (int64_t done = 0; done < count;) {
        const int64_t tile = (first + done) / layout.row(), inside = (first + done) % layout.row();
        const int64_t piece = std::min(count - done, layout.row() - inside);
        function(tile * layout.tile_size() + inside, done, piece);
        done += piece;
    }
}

inline std::string shape(const Layout& layout) {
    return "[" + std::to_string(layout.images) + ", " + std::to_string(layout.channels) + ", " +
           std::to_string(layout.height) + ", " + std::to_string(layout.width) + "]";
}

inline bool same_shape(const Layout& a, const Layout& b) {
    return a.images == b.images && a.channels == b.channels && a.height == b.height && a.width == b.width;
}

}  // namespace sparing
