// How a tensor lies in memory: [image][tile][channel][vectors * LANES].
//
// The pixels of an image are numbered by position = y * pitch + x, where pitch >= width. A tile holds `vectors` vectors
// of successive positions, of all channels one after another, so that what a kernel reads lies close together. Lanes
// between the width and the pitch, and behind the last position, hold finite values without meaning.
//
// A matrix of N rows (tokens, or images of one pixel) and C columns is one image of C channels, height 1 and width N.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace sparing {

struct Layout {
    int64_t images, channels, height, width;
    int64_t pitch = 0;    // positions from one row to the next
    int64_t vectors = 0;  // of a tile

    int64_t positions() const { return (height - 1) * pitch + width; }
    int64_t total_vectors() const { return (positions() + LANES - 1) / LANES; }
    int64_t tiles() const { return (total_vectors() + vectors - 1) / vectors; }  // of an image
    int64_t row() const { return vectors * LANES; }  // floats of one channel of a tile
    int64_t tile_size() const { return channels * row(); }
    int64_t size() const { return images * tiles() * tile_size(); }
    // Vectors of a tile that hold positions; the last tile of an image may have fewer.
    int64_t filled(int64_t tile) const { return std::min(vectors, total_vectors() - tile * vectors); }
    // Index of the first float of a tile; `tile` counts through all images.
    int64_t tile_offset(int64_t tile) const { return tile * tile_size(); }
    // Index of a pixel.
    int64_t offset(int64_t image, int64_t channel, int64_t y, int64_t x) const {
        const int64_t position = y * pitch + x;
        return (image * tiles() + position / row()) * tile_size() + channel * row() + position % row();
    }
};

}  // namespace sparing
