// The product of a sparse kernel with an image; see native.py for the equation. Vectors are those of GCC and Clang,
// of a fixed length: the compiler makes of them whatever the processor has.

#include <algorithm>
#include <cstdint>
#include <memory>

constexpr int LANES = 16;
constexpr int LONGEST = 7;  // vectors a tile: with AVX2 they fill 14 of its 16 registers
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4)));

struct Shape {
    int64_t batch, channels, height, width, filters, out_height, out_width;
    int64_t stride_y, stride_x, padding_y, padding_x;
    int64_t phases_y, phases_x, rows, columns, phase;  // of a channel as `spread` lays it out
    int64_t blocks, relu, threads;
};

struct Weights {
    const float *values, *bias;
    const int32_t *offsets, *starts;
};

// output[p] = max(sum, 0) or sum, where sum = acc[p] + residual[p].
static inline void store(const float* acc, const float* residual, float* output, int64_t count, bool relu) {
    for (int64_t p = 0; p < count; p++) {
        const float sum = residual ? acc[p] + residual[p] : acc[p];
        output[p] = relu && sum < 0 ? 0 : sum;
    }
}

// Filters first to last at the pixels [begin, begin + N * LANES). Pixels are counted along the rows of the layout,
// s.columns each, of which the first s.out_width are of the output.
// Channels come in blocks, whose pixels of a tile the nearest cache holds for one filter after another.
template <int N>
static void tile(const float* image, const float* residual, float* output, const Weights& w, const Shape& s,
                 int64_t begin, int64_t first, int64_t last) {
    const int64_t plane = s.out_height * s.out_width;
    const int64_t end = std::min(begin + N * LANES, (s.out_height - 1) * s.columns + s.out_width);
    std::unique_ptr<float[]> partial(s.blocks > 1 ? new float[(last - first) * N * LANES] : nullptr);
    float whole[N * LANES];
    for (int64_t block = 0; block < s.blocks; block++) {
        const int32_t* starts = w.starts + block * s.filters;
        for (int64_t filter = first; filter < last; filter++) {
            float* sums = partial ? partial.get() + (filter - first) * N * LANES : whole;
            Vector acc[N];
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) acc[i] = block ? *(const Vector*)(sums + LANES * i) : Vector{} + w.bias[filter];
            for (int32_t j = starts[filter]; j < starts[filter + 1]; j++) {
                const float* pixels = image + w.offsets[j] + begin;
                const Vector weight = Vector{} + w.values[j];
#pragma GCC unroll 8
                for (int i = 0; i < N; i++) acc[i] += weight * *(const Vector*)(pixels + LANES * i);
            }
            if (block == s.blocks - 1 && s.columns == s.out_width && begin + N * LANES <= end) {
                const int64_t at = filter * plane + begin;
#pragma GCC unroll 8
                for (int i = 0; i < N; i++) {
                    Vector sum = residual ? acc[i] + *(const Vector*)(residual + at + LANES * i) : acc[i];
                    *(Vector*)(output + at + LANES * i) = s.relu ? (sum < 0 ? Vector{} : sum) : sum;
                }
                continue;
            }
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) *(Vector*)(sums + LANES * i) = acc[i];
            if (block < s.blocks - 1) continue;
            for (int64_t p = begin; p < end;) {
                const int64_t x = p % s.columns, count = std::min(s.out_width - x, end - p);
                const int64_t at = filter * plane + p / s.columns * s.out_width + x;
                if (count > 0) store(sums + p - begin, residual ? residual + at : nullptr, output + at, count, s.relu);
                p += count > 0 ? count : s.columns - x;
            }
        }
    }
}

using Tile = void (*)(const float*, const float*, float*, const Weights&, const Shape&, int64_t, int64_t, int64_t);
constexpr Tile TILES[LONGEST + 1] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>, tile<7>};

// A channel with its padding, dealt out by the remainders of row and column modulo the stride: every weight then
// reads neighbouring pixels for neighbouring outputs.
static void spread(const float* channel, float* layout, const Shape& s) {
    const int64_t used = s.rows * s.columns;
    if (s.stride_y * s.stride_x == 1 && s.rows == s.height && s.columns == s.width && s.padding_y + s.padding_x == 0) {
        std::fill(std::copy(channel, channel + used, layout), layout + s.phase, 0.0f);
        return;
    }
    for (int64_t py = 0; py < s.phases_y; py++)
        for (int64_t px = 0; px < s.phases_x; px++) {
            for (int64_t row = 0; row < s.rows; row++, layout += s.columns) {
                const int64_t y = row * s.stride_y + py - s.padding_y, x = px - s.padding_x;
                const bool inside = y >= 0 && y < s.height;
                // The columns whose pixel x + column * stride lies in the image.
                const int64_t from = std::min(s.columns, x < 0 ? (-x + s.stride_x - 1) / s.stride_x : 0);
                const int64_t to = std::min(s.columns, x < s.width ? (s.width - x + s.stride_x - 1) / s.stride_x : 0);
                const float* pixels = channel + y * s.width + x;
                if (!inside || from >= to) {
                    std::fill(layout, layout + s.columns, 0.0f);
                    continue;
                }
                std::fill(layout, layout + from, 0.0f);
                if (s.stride_x == 1)
                    std::copy(pixels + from, pixels + to, layout + from);
                else
                    for (int64_t column = from; column < to; column++) layout[column] = pixels[column * s.stride_x];
                std::fill(layout + to, layout + s.columns, 0.0f);
            }
            std::fill(layout, layout + s.phase - used, 0.0f);
            layout += s.phase - used;
        }
}

struct alignas(4 * LANES) Line {
    float lanes[LANES];
};

extern "C" void sparse_conv2d(const float* input, const float* residual, float* output, const Weights* weights,
                              const Shape* shape) {
    Shape s = *shape;
    const int64_t channels = s.batch * s.channels, size = s.phases_y * s.phases_x * s.phase;
    if (s.columns == s.out_width && s.rows == s.out_height) {  // as one long row
        s.columns = s.out_width *= s.out_height;
        s.out_height = 1;
    }
    const int64_t grid = (s.out_height - 1) * s.columns + s.out_width, plane = s.out_height * s.out_width;
    const int64_t vectors = (grid + LANES - 1) / LANES, tiles = (vectors + LONGEST - 1) / LONGEST;
    const int64_t parts = std::min(s.threads, s.filters);
    // An image that lies as the layout would have it is read where it is. Else there is room behind the layout, since
    // tiles read whole vectors.
    const bool direct = size == s.height * s.width && s.padding_y + s.padding_x == 0;
    const int64_t lines = direct ? 0 : (channels * size + s.columns) / LANES + 2;
    std::unique_ptr<Line[]> layout(new Line[lines]);
    for (int64_t line = channels * size / LANES; line < lines; line++) layout[line] = Line{};
    const float* images = direct ? input : layout[0].lanes;
#pragma omp parallel num_threads(s.threads)
    {
        if (!direct) {
#pragma omp for
            for (int64_t c = 0; c < channels; c++)
                spread(input + c * s.height * s.width, layout[0].lanes + c * size, *shape);
        }
#pragma omp for collapse(3)
        for (int64_t n = 0; n < s.batch; n++)
            for (int64_t t = 0; t < tiles; t++)
                for (int64_t part = 0; part < parts; part++) {
                    const int64_t begin = t * vectors / tiles, end = (t + 1) * vectors / tiles;  // as even as can be
                    TILES[end - begin](images + n * s.channels * size,
                                       residual ? residual + n * s.filters * plane : nullptr,
                                       output + n * s.filters * plane, *weights, s, begin * LANES,
                                       part * s.filters / parts, (part + 1) * s.filters / parts);
                }
    }
}
