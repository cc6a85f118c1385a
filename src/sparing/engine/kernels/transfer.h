// Conversion between contiguous tensors of torch and the layout of the engine.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "items.h"
#include "operation.h"
#include "shuffle.h"

namespace sparing {

// The pixels of LANES successive positions in a contiguous tensor [images, height, width, channels].
struct Pixels {
    int64_t index[LANES];  // of its first float; -1 where a position is no pixel
    bool complete = true;  // whether each position is a pixel

    Pixels(const Layout& layout, int64_t image, int64_t position) {
        int64_t y = position / layout.pitch, x = position % layout.pitch;
        for (int lane = 0; lane < LANES; lane++) {
            const bool inside = y < layout.height && x < layout.width;
            index[lane] = inside ? ((image * layout.height + y) * layout.width + x) * layout.channels : -1;
            complete = complete && inside;
            if (++x == layout.pitch) {
                x = 0;
                y++;
            }
        }
    }
};

// Read contiguous data, [images, channels, height, width], or [images, height, width, channels] if channels_last.
class Input : public Operation {
  public:
    const float* data = nullptr;  // set before each run

    Input(int tensor, bool channels_last) : tensor_(tensor), channels_last_(channels_last) { writes = {tensor}; }

    const char* name() const override { return "input"; }

    void prepare(const std::vector<Tensor>& tensors, int) override {
        const Layout& layout = tensors[tensor_].layout;
        items_ = Items(layout.images * layout.tiles(), layout.channels, layout.row(), LANES);
    }

    int64_t items() const override { return items_.count(); }

    void run(int64_t item, const std::vector<Tensor>& tensors, float*) override {
        const Layout& layout = tensors[tensor_].layout;
        items_.for_each_tile(item, [&](int64_t tile, int64_t first, int64_t end) {
            const int64_t image = tile / layout.tiles(), position = tile % layout.tiles() * layout.row();
            float* to = tensors[tensor_].tile(tile);
            if (channels_last_) return read_last(layout, image, position, first, end, to);
            for (int64_t channel = first; channel < end; channel++) {
                const float* from = data + (image * layout.channels + channel) * layout.height * layout.width;
                read_first(layout, from, position, to + channel * layout.row());
            }
        });
    }

  private:
    // Read one channel of a tile from an image [height, width].
    static void read_first(const Layout& layout, const float* from, int64_t position, float* to) {
        int64_t y = position / layout.pitch, x = position % layout.pitch;
        for (int64_t done = 0; done < layout.row();) {
            const int64_t left = layout.row() - done;
            int64_t count = 0;
            if (y < layout.height && x < layout.width) {
                // Rows without gaps follow one another.
                const int64_t rows = layout.pitch == layout.width ? layout.height : y + 1;
                count = std::min(left, rows * layout.width - (y * layout.width + x));
                std::memcpy(to + done, from + y * layout.width + x, count * sizeof(float));
            } else {
                count = y < layout.height ? std::min(left, layout.pitch - x) : left;
                std::fill_n(to + done, count, 0.0f);
            }
            done += count;
            y = (position + done) / layout.pitch;
            x = (position + done) % layout.pitch;
        }
    }

    void read_last(
        const Layout& layout, int64_t image, int64_t position, int64_t first, int64_t end, float* to
    ) const {
        for (int64_t i = 0; i < layout.row(); i += LANES) {
            const Pixels pixels(layout, image, position + i);
            for (int64_t channel = first; channel < end; channel += LANES) {
                const int64_t count = std::min<int64_t>(end - channel, LANES);
                Vector rows[LANES];
                if (pixels.complete && count == LANES)
                    for (int lane = 0; lane < LANES; lane++) rows[lane] = load(data + pixels.index[lane] + channel);
                else
                    for (int lane = 0; lane < LANES; lane++)
                        rows[lane] = pixels.index[lane] < 0 ? Vector{}
                                                            : load_some(data + pixels.index[lane] + channel, count);
                transpose(rows);
                for (int lane = 0; lane < LANES; lane++)
                    if (lane < count) store(to + (channel + lane) * layout.row() + i, rows[lane]);
            }
        }
    }

    static Vector load_some(const float* from, int64_t count) {
        float values[LANES] = {};
        std::memcpy(values, from, count * sizeof(float));
        return load(values);
    }

    int tensor_;
    bool channels_last_;
    Items items_;
};

// Write contiguous data, [images, channels, height, width], or [images, height, width, channels] if channels_last.
class Output : public Operation {
  public:
    float* data = nullptr;  // set before each run

    Output(int tensor, bool channels_last) : tensor_(tensor), channels_last_(channels_last) { reads = {tensor}; }

    const char* name() const override { return "output"; }

    void prepare(const std::vector<Tensor>& tensors, int) override {
        const Layout& layout = tensors[tensor_].layout;
        items_ = Items(layout.images * layout.tiles(), layout.channels, layout.row(), LANES);
    }

    int64_t items() const override { return items_.count(); }

    void run(int64_t item, const std::vector<Tensor>& tensors, float*) override {
        const Layout& layout = tensors[tensor_].layout;
        items_.for_each_tile(item, [&](int64_t tile, int64_t first, int64_t end) {
            const int64_t image = tile / layout.tiles(), position = tile % layout.tiles() * layout.row();
            const float* from = tensors[tensor_].tile(tile);
            if (channels_last_) return write_last(layout, image, position, first, end, from);
            for (int64_t channel = first; channel < end; channel++) {
                float* to = data + (image * layout.channels + channel) * layout.height * layout.width;
                write_first(layout, from + channel * layout.row(), position, to);
            }
        });
    }

  private:
    // Write one channel of a tile to an image [height, width].
    static void write_first(const Layout& layout, const float* from, int64_t position, float* to) {
        const int64_t end = std::min(position + layout.row(), layout.positions());
        if (layout.pitch == layout.width) {
            std::memcpy(to + position, from, (end - position) * sizeof(float));
            return;
        }
        for (int64_t at = position; at < end;) {
            const int64_t y = at / layout.pitch, x = at % layout.pitch;
            const int64_t count = std::min(end - at, layout.width - x);
            if (count > 0) std::memcpy(to + y * layout.width + x, from + (at - position), count * sizeof(float));
            at = (y + 1) * layout.pitch;
        }
    }

    void write_last(
        const Layout& layout, int64_t image, int64_t position, int64_t first, int64_t end, const float* from
    ) const {
        for (int64_t i = 0; i < layout.row() && position + i < layout.positions(); i += LANES) {
            const Pixels pixels(layout, image, position + i);
            for (int64_t channel = first; channel < end; channel += LANES) {
                const int64_t count = std::min<int64_t>(end - channel, LANES);
                Vector rows[LANES];
                for (int lane = 0; lane < LANES; lane++)
                    rows[lane] = lane < count ? load(from + (channel + lane) * layout.row() + i) : Vector{};
                transpose(rows);
                if (pixels.complete && count == LANES)
                    for (int lane = 0; lane < LANES; lane++) store(data + pixels.index[lane] + channel, rows[lane]);
                else
                    for (int lane = 0; lane < LANES; lane++)
                        if (pixels.index[lane] >= 0)
                            store_some(data + pixels.index[lane] + channel, rows[lane], count);
            }
        }
    }

    static void store_some(float* to, Vector value, int64_t count) {
        float values[LANES];
        store(values, value);
        std::memcpy(to, values, count * sizeof(float));
    }

    int tensor_;
    bool channels_last_;
    Items items_;
};

}  // namespace sparing
