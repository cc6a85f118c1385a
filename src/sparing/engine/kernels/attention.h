// Attention: softmax(scale * query . key + mask) . value, for each head of each sample.
//
// Tokens are positions, and vectors run over the queries: a score is the sum, over the channels of a head, of a number of
// the key times a vector of queries. So softmax needs no exchange between lanes, and both products are the same loop.
#pragma once

#include <cmath>
#include <cstring>

#include "activation.h"
#include "items.h"
#include "operation.h"

namespace sparing {

// Where the heads of the query, key or value are: head h has the channels from first + h * stride on.
struct Heads {
    int tensor;
    int64_t first, stride;
};

struct AttentionShape {
    int64_t heads, channels;  // of a head, in query and key
    int64_t queries, keys;    // of a sample
    float scale;
    bool causal;  // query i sees the keys 0 to i
    bool tokens_first;  // row of token t of sample n: t * samples + n in place of n * tokens + t; not of the mask
    int64_t mask_heads, mask_queries;  // of a sample in the mask: all, or 1 for all of them
    int64_t shared;  // successive heads of the query that share one of key and value
};

class Attention : public Operation {
  public:
    // mask: a matrix [samples * mask_heads * mask_queries, keys] that is added to the scores, or -1.
    // cosine and sine: [tokens, channels] of a rotary embedding of query and key, or empty.
    Attention(
        const Heads& query, const Heads& key, const Heads& value, int mask, int out, const std::vector<float>& cosine,
        const std::vector<float>& sine, const AttentionShape& shape
    )
        : query_(query), key_(key), value_(value), mask_(mask), out_(out), shape_(shape) {
        angles_ = (shape.keys + WIDTH - 1) / WIDTH * WIDTH;
        cosine_ = transposed(cosine);
        sine_ = transposed(sine);
        reads = {query.tensor, key.tensor, value.tensor};
        if (mask >= 0) reads.push_back(mask);
        writes = {out};
    }

    const char* name() const override { return "attention"; }

    void prepare(const std::vector<Tensor>& tensors, int) override {
        const Layout& out = tensors[out_].layout;
        samples_ = out.width / shape_.queries;
        size_ = out.channels / shape_.heads;
        // Not a power of two, so that the channels of a head do not compete for the same places of the cache.
        pitch_ = (shape_.keys + ROWS - 1) / LANES * LANES + LANES + 16;
        value_at_ = shape_.channels * pitch_;
        query_at_ = value_at_ + (size_ + ROWS) * pitch_;
        scores_at_ = query_at_ + std::max(shape_.channels, size_ + ROWS) * WIDTH;
    }

    int64_t scratch() const override { return scores_at_ + shape_.keys * WIDTH; }
    int64_t items() const override { return samples_ * shape_.heads; }

    void run(int64_t item, const std::vector<Tensor>& tensors, float* scratch) override {
        const int64_t sample = item / shape_.heads, head = item % shape_.heads;
        float *keys = scratch, *values = scratch + value_at_, *queries = scratch + query_at_;
        float* scores = scratch + scores_at_;
        const auto first = [&](const Heads& heads) { return heads.first + head / shape_.shared * heads.stride; };
        const int64_t step = shape_.tokens_first ? samples_ : 1;
        const auto row = [&](int64_t token, int64_t tokens) {
            return shape_.tokens_first ? token * samples_ + sample : sample * tokens + token;
        };
        const Rows all{row(0, shape_.keys), step, shape_.keys};
        read(tensors[key_.tensor], first(key_), shape_.channels, all, keys, pitch_);
        read(tensors[value_.tensor], first(value_), size_, all, values, pitch_);
        rotate(keys, pitch_, 0, shape_.keys);
        for (int64_t begin = 0; begin < shape_.queries; begin += WIDTH) {
            const int64_t count = std::min<int64_t>(WIDTH, shape_.queries - begin);
            const Rows rows{row(begin, shape_.queries), step, count};
            const int64_t seen = shape_.causal ? std::min(shape_.keys, begin + count) : shape_.keys;
            read(tensors[query_.tensor], query_.first + head * query_.stride, shape_.channels, rows, queries, WIDTH);
            rotate(queries, WIDTH, begin, WIDTH);
            if (mask_ >= 0) {
                const int64_t of_head = sample * shape_.mask_heads + head % shape_.mask_heads;
                const int64_t step = shape_.mask_queries > 1, first = of_head * shape_.mask_queries + begin * step;
                read(tensors[mask_], 0, seen, {first, step, count}, scores, WIDTH);
            }
            Vector factor[VECTORS];
            score(keys, queries, scores, begin, seen, factor);
            softmax(scores, seen, factor);
            // The queries are not needed any more, and make room for the results.
            for (int64_t channel = 0; channel < size_; channel += ROWS) {
                Vector sums[ROWS][VECTORS];
                multiply(values + channel * pitch_, pitch_, 1, scores, seen, sums);
                for (int row = 0; row < ROWS; row++)
                    for (int v = 0; v < VECTORS; v++)
                        store(queries + (channel + row) * WIDTH + v * LANES, sums[row][v] * factor[v]);
            }
            write(tensors[out_], head * size_, size_, rows, queries);
        }
    }

  private:
    // ROWS * VECTORS sums, VECTORS operands and a broadcast number fill the registers.
    static constexpr int VECTORS = REGISTERS == 32 ? 4 : 3;
    static constexpr int ROWS = REGISTERS == 32 ? 6 : 4;
    static constexpr int64_t WIDTH = VECTORS * LANES;  // queries at once

    // sums[i] = the sum over k < count of a[i * row + k * step] * b[k], where b[k] are VECTORS vectors.
    static INLINE void multiply(
        const float* a, int64_t row, int64_t step, const float* b, int64_t count, Vector (&sums)[ROWS][VECTORS]
    ) {
        for (auto& sum : sums)
            for (Vector& v : sum) v = Vector{};
        for (int64_t k = 0; k < count; k++) {
            Vector x[VECTORS];
            for (int v = 0; v < VECTORS; v++) x[v] = load(b + k * WIDTH + v * LANES);
            for (int i = 0; i < ROWS; i++) {
                const Vector number = broadcast(a[i * row + k * step]);
                for (int v = 0; v < VECTORS; v++) sums[i][v] += number * x[v];
            }
        }
    }

    // From [tokens, channels] to channels at the distance `angles_`.
    std::vector<float> transposed(const std::vector<float>& table) const {
        std::vector<float> result(table.empty() ? 0 : shape_.channels * angles_);
        for (size_t i = 0; i < table.size(); i++)
            result[i % shape_.channels * angles_ + i / shape_.channels] = table[i];
        return result;
    }

    // Rotate the channels of `count` tokens from `token` on, if there is a rotary embedding.
    void rotate(float* x, int64_t pitch, int64_t token, int64_t count) const {
        const int64_t half = shape_.channels / 2;
        for (int64_t channel = 0; channel < half && !cosine_.empty(); channel++) {
            const float *cosine = &cosine_[channel * angles_ + token], *sine = &sine_[channel * angles_ + token];
            float *first = x + channel * pitch, *second = first + half * pitch;
            for (int64_t i = 0; i < count; i += LANES) {
                const Vector a = load(first + i), b = load(second + i);
                store(first + i, a * load(cosine + i) - b * load(sine + i));
                store(second + i, b * load(cosine + half * angles_ + i) + a * load(sine + half * angles_ + i));
            }
        }
    }

    // Write the scores of the first `seen` keys, and the largest score of each query. `scores` holds the mask.
    void score(
        const float* keys, const float* queries, float* scores, int64_t begin, int64_t seen, Vector (&largest)[VECTORS]
    ) const {
        for (Vector& v : largest) v = broadcast(-INFINITY);
        for (int64_t key = 0; key < seen; key += ROWS) {
            Vector sums[ROWS][VECTORS];
            multiply(keys + key, 1, pitch_, queries, shape_.channels, sums);
            for (int row = 0; row < ROWS && key + row < seen; row++)
                for (int v = 0; v < VECTORS; v++) {
                    float* to = scores + (key + row) * WIDTH + v * LANES;
                    Vector sum = sums[row][v] * shape_.scale;
                    if (mask_ >= 0) sum += load(to);
                    if (shape_.causal && key + row > begin + v * LANES) sum = hide(sum, key + row - begin - v * LANES);
                    largest[v] = larger(largest[v], sum);
                    store(to, sum);
                }
        }
    }

    // Negative infinity in the lanes before `first`.
    static Vector hide(Vector value, int64_t first) {
        for (int lane = 0; lane < LANES; lane++)
            if (lane < first) value[lane] = -INFINITY;
        return value;
    }

    // Replace the scores by exp(score - largest), and the largest score of each query by one over the sum; or by zero
    // where the mask hides all keys.
    static void softmax(float* scores, int64_t seen, Vector (&largest)[VECTORS]) {
        for (int v = 0; v < VECTORS; v++) {
            const Integers hidden = largest[v] == broadcast(-INFINITY);
            const Vector shift = hidden ? Vector{} : largest[v];
            Vector sum = {};
            for (int64_t key = 0; key < seen; key++) {
                float* at = scores + key * WIDTH + v * LANES;
                const Vector weight = exponential(load(at) - shift);
                store(at, weight);
                sum += weight;
            }
            largest[v] = hidden ? Vector{} : 1.0f / sum;
        }
    }

    struct Rows {
        int64_t first, step, count;
    };

    // Copy rows of some channels to the distance `pitch`.
    static void read(
        const Tensor& from, int64_t first, int64_t channels, const Rows& rows, float* to, int64_t pitch
    ) {
        for_each_run(from.layout, rows, [&](int64_t offset, int64_t done, int64_t count) {
            for (int64_t channel = 0; channel < channels; channel++)
                std::memcpy(to + channel * pitch + done, from.data + offset + (first + channel) * from.layout.row(),
                            count * sizeof(float));
        });
    }

    static void write(const Tensor& to, int64_t first, int64_t channels, const Rows& rows, const float* from) {
        for_each_run(to.layout, rows, [&](int64_t offset, int64_t done, int64_t count) {
            for (int64_t channel = 0; channel < channels; channel++)
                std::memcpy(to.data + offset + (first + channel) * to.layout.row(), from + channel * WIDTH + done,
                            count * sizeof(float));
        });
    }

    // Call function(offset, done, count) for rows that follow one another in memory, as `for_each_piece`.
    template <typename Function>
    static INLINE void for_each_run(const Layout& layout, const Rows& rows, const Function& function) {
        if (rows.step == 1) return for_each_piece(layout, rows.first, rows.count, function);
        for (int64_t i = 0; i < rows.count; i++) function(layout.offset(0, 0, 0, rows.first + i * rows.step), i, 1);
    }

    Heads query_, key_, value_;
    int mask_, out_;
    AttentionShape shape_;
    int64_t angles_ = 0;
    std::vector<float> cosine_, sine_;
    int64_t samples_ = 0, size_ = 0;  // samples, and channels of a head in value and out
    int64_t pitch_ = 0, value_at_ = 0, query_at_ = 0, scores_at_ = 0;  // of the scratch memory
};

}  // namespace sparing
