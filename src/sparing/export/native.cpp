// Sparse convolution; see native.py for the equation. Uses the vector extension of GCC and Clang with a fixed length,
// which the compiler maps to the vector instructions of the processor.

#include <algorithm>
#include <cstdint>
#include <memory>

constexpr int LANES = 16;
constexpr int LONGEST = 7;  // maximum vectors per tile: with AVX2 they use 14 of the 16 registers
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4)));

struct Shape {
    int64_t batch, channels, height, width, filters, out_height, out_width;
    int64_t stride_y, stride_x, padding_y, padding_x, dilation_x;
    int64_t copies, phases, rows, phase;  // layout of one channel made by `spread`; `phase` is the floats per phase
    int64_t blocks, relu, threads;
};

struct Weights {
    const float *values, *bias;
    const int32_t *offsets, *starts;
};

static inline Vector load(const float* at) { return *(const Vector*)at; }
static inline void store(float* at, Vector vector) { *(Vector*)at = vector; }

// Compute filters [first, last) at the pixels [begin, begin + N * LANES), clipped to the image. The loop runs over
// blocks of channels so that the pixels of a tile stay in the cache for all filters.
template <int N>
static void tile(const float* image, const float* residual, float* output, const Weights& w, const Shape& s,
                 int64_t begin, int64_t first, int64_t last) {
    const int64_t plane = s.out_height * s.out_width, count = std::min<int64_t>(N * LANES, plane - begin);
    std::unique_ptr<float[]> partial(s.blocks > 1 ? new float[(last - first) * N * LANES] : nullptr);
    for (int64_t block = 0; block < s.blocks; block++) {
        const int32_t* starts = w.starts + block * s.filters;
        for (int64_t filter = first; filter < last; filter++) {
            float* sums = partial ? partial.get() + (filter - first) * N * LANES : nullptr;
            Vector acc[N];
#pragma GCC unroll 8
            for (int i = 0; i < N; i++) acc[i] = block ? load(sums + LANES * i) : Vector{} + w.bias[filter];
            for (int32_t j = starts[filter]; j < starts[filter + 1]; j++) {
                const float* pixels = image + w.offsets[j] + begin;
                const Vector weight = Vector{} + w.values[j];
#pragma GCC unroll 8
                for (int i = 0; i < N; i++) acc[i] += weight * load(pixels + LANES * i);
            }
            if (block < s.blocks - 1) {
#pragma GCC unroll 8
                for (int i = 0; i < N; i++) store(sums + LANES * i, acc[i]);
                continue;
            }
            const float* more = residual ? residual + filter * plane + begin : nullptr;
            float* out = output + filter * plane + begin;
            if (count == N * LANES) {
#pragma GCC unroll 8
                for (int i = 0; i < N; i++) {
                    const Vector sum = more ? acc[i] + load(more + LANES * i) : acc[i];
                    store(out + LANES * i, s.relu ? (sum < 0 ? Vector{} : sum) : sum);
                }
            } else {
                float rest[N * LANES];
#pragma GCC unroll 8
                for (int i = 0; i < N; i++) store(rest + LANES * i, acc[i]);
                for (int64_t p = 0; p < count; p++) {
                    const float sum = more ? rest[p] + more[p] : rest[p];
                    out[p] = s.relu && sum < 0 ? 0 : sum;
                }
            }
        }
    }
}

using Tile = void (*)(const float*, const float*, float*, const Weights&, const Shape&, int64_t, int64_t, int64_t);
constexpr Tile TILES[LONGEST + 1] = {nullptr, tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>, tile<7>};

// Copy a channel with its padding so that every weight reads neighboring pixels for neighboring outputs. There is one
// copy per kernel column, shifted by that column. In each copy the rows are grouped by row index modulo the stride.
static void spread(const float* channel, float* layout, const Shape& s) {
    const int64_t columns = s.out_width, used = s.rows * columns;
    if (s.stride_y * s.stride_x * s.copies == 1 && s.rows == s.height && columns == s.width &&
        s.padding_y + s.padding_x == 0) {
        std::fill(std::copy(channel, channel + used, layout), layout + s.phase, 0.0f);
        return;
    }
    for (int64_t copy = 0; copy < s.copies; copy++) {
        const int64_t x = copy * s.dilation_x - s.padding_x;
        // Columns [from, to): pixel x + column * stride is inside the image.
        const int64_t from = std::min(columns, x < 0 ? (-x + s.stride_x - 1) / s.stride_x : 0);
        const int64_t to = std::max(
            from, std::min(columns, x < s.width ? (s.width - x + s.stride_x - 1) / s.stride_x : 0));
        for (int64_t phase = 0; phase < s.phases; phase++) {
            for (int64_t row = 0; row < s.rows; row++, layout += columns) {
                const int64_t y = row * s.stride_y + phase - s.padding_y;
                if (y < 0 || y >= s.height) {
                    std::fill(layout, layout + columns, 0.0f);
                    continue;
                }
                const float* pixels = channel + y * s.width + x;
                std::fill(layout, layout + from, 0.0f);
                if (s.stride_x == 1)
                    std::copy(pixels + from, pixels + to, layout + from);
                else
                    for (int64_t column = from; column < to; column++) layout[column] = pixels[column * s.stride_x];
                std::fill(layout + to, layout + columns, 0.0f);
            }
            std::fill(layout, layout + s.phase - used, 0.0f);
            layout += s.phase - used;
        }
    }
}

struct alignas(4 * LANES) Line {
    float lanes[LANES];
};

extern "C" void sparse_conv2d(const float* input, const float* residual, float* output, const Weights* weights,
                              const Shape* shape) {
    const Shape& s = *shape;
    const int64_t channels = s.batch * s.channels, size = s.copies * s.phases * s.phase;
    const int64_t plane = s.out_height * s.out_width, vectors = (plane + LANES - 1) / LANES;
    const int64_t tiles = (vectors + LONGEST - 1) / LONGEST, parts = std::min(s.threads, s.filters);
    // Read the image without a copy if it already has the required layout. Otherwise allocate extra space at the end of
    // the layout, because tiles read whole vectors.
    const bool direct = size == s.height * s.width && size == plane;
    const int64_t lines = direct ? 0 : channels * size / LANES + 2;
    std::unique_ptr<Line[]> layout(new Line[lines]);
    for (int64_t line = channels * size / LANES; line < lines; line++) layout[line] = Line{};
    const float* images = direct ? input : layout[0].lanes;
#pragma omp parallel num_threads(s.threads)
    {
        if (!direct) {
#pragma omp for
            for (int64_t c = 0; c < channels; c++)
                spread(input + c * s.height * s.width, layout[0].lanes + c * size, s);
        }
#pragma omp for collapse(3)
        for (int64_t n = 0; n < s.batch; n++)
            for (int64_t t = 0; t < tiles; t++)
                for (int64_t part = 0; part < parts; part++) {
                    // Tiles of nearly equal size.
                    const int64_t begin = t * vectors / tiles, end = (t + 1) * vectors / tiles;
                    TILES[end - begin](images + n * s.channels * size,
                                       residual ? residual + n * s.filters * plane : nullptr,
                                       output + n * s.filters * plane, *weights, s, begin * LANES,
                                       part * s.filters / parts, (part + 1) * s.filters / parts);
                }
    }
}
