// Random plans for the sanitizers: `make sanitize`. Compile with -fno-access-control.
//
//     fuzz FIRST LAST
//
// runs the seeds [FIRST, LAST). Each plan is compared with plain loops. No tensor lies next to another one, and all
// memory holds NaN before the first run: a lane or guard that leaks into a result makes it NaN, and a guard that changes
// is an error. Kernels may read up to two vectors behind a tensor. The rest of the guards is poisoned for
// AddressSanitizer. The seed also decides some calls with forged arguments: they may fail, but not crash.
#include <cstdio>
#include <random>
#include <thread>

#define SPARING_SEPARATE
#include "../../src/sparing/engine/kernels/plan.cpp"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define POISON(from, floats) __asan_poison_memory_region(from, (floats) * sizeof(float))
#define UNPOISON(from, floats) __asan_unpoison_memory_region(from, (floats) * sizeof(float))
#else
#define POISON(from, floats)
#define UNPOISON(from, floats)
#endif

namespace {

int seed = 0;

void check(bool condition, const std::string& what) {
    if (condition) return;
    std::printf("seed %d: %s\n", seed, what.c_str());
    std::exit(1);
}

struct Random {
    std::mt19937 engine;
    int64_t integer(int64_t least, int64_t most) { return std::uniform_int_distribution<int64_t>(least, most)(engine); }
    bool chance(double p) { return std::uniform_real_distribution<double>()(engine) < p; }
    template <class T> const T& one_of(const std::vector<T>& choices) { return choices[integer(0, choices.size() - 1)]; }
    std::vector<float> numbers(int64_t count) {
        std::vector<float> result(count);
        for (float& x : result) x = std::normal_distribution<float>()(engine);
        return result;
    }
};

double activated(double x, int activation) {
    const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
    const auto clamp = [](double x) { return std::min(6.0, std::max(0.0, x)); };
    switch (activation) {
        case RELU: return std::max(0.0, x);
        case RELU6: return clamp(x);
        case GELU: return x * 0.5 * (1 + std::erf(x * std::sqrt(0.5)));
        case GELU_TANH: return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x));
        case SILU: return x * sigmoid(x);
        case SIGMOID: return sigmoid(x);
        case TANH: return std::tanh(x);
        case HARDSWISH: return x * clamp(x + 3) / 6;
        case HARDSIGMOID: return clamp(x + 3) / 6;
        default: return x;
    }
}

// What a tensor must hold.
struct Expected {
    int64_t images, channels, height, width;
    std::vector<double> data = {};
    double error = 0;  // bound for all elements

    Expected(int64_t n, int64_t c, int64_t h, int64_t w) : images(n), channels(c), height(h), width(w) {
        data.resize(n * c * h * w);
    }
    double& at(int64_t n, int64_t c, int64_t y, int64_t x) {
        return data[((n * channels + c) * height + y) * width + x];
    }
    double largest() const {
        double result = 0;
        for (const double x : data) result = std::max(result, std::abs(x));
        return result;
    }
    void activate(int activation) {
        for (double& x : data) x = activated(x, activation);
        error = 1.5 * error + 1e-6 * (1 + largest());
    }
    // Call function(n, c, y, x, element) for each element.
    template <class Function> void each(const Function& function) {
        for (int64_t n = 0; n < images; n++)
            for (int64_t c = 0; c < channels; c++)
                for (int64_t y = 0; y < height; y++)
                    for (int64_t x = 0; x < width; x++) function(n, c, y, x, at(n, c, y, x));
    }
};

// OpenMP, as far as a plan needs it: new threads for each task.
thread_local int number = 0;
const SparingOpenmp OPENMP{
    [](void (*task)(void*), void* argument, unsigned threads, unsigned) {
        std::vector<std::thread> others;
        for (unsigned id = 1; id < threads; id++)
            others.emplace_back([=] {
                number = static_cast<int>(id);
                task(argument);
            });
        task(argument);
        for (std::thread& other : others) other.join();
    },
    [] { return number; },
};

// A plan with what its tensors must hold.
class Network {
  public:
    Network(Random& random, int threads)
        : random_(random), plan_(sparing_plan(threads, random.chance(0.5) ? &OPENMP : nullptr)) {
        check(plan_ != nullptr, "no plan");
        const bool matrix = random.chance(0.3);
        const int64_t size = random.chance(0.1) ? 40 : 12;
        Expected input = matrix ? Expected(1, random.integer(1, 40), 1, random.integer(1, 40))
                                : Expected(random.integer(1, 3), random.integer(1, 20), random.integer(1, size),
                                           random.integer(1, size));
        for (int64_t count = random.integer(1, 2); count > 0; count--) {
            inputs_.push_back(random.numbers(input.data.size()));
            last_.push_back(random.chance(0.5));
            const std::vector<float>& given = inputs_.back();
            input.each([&](int64_t n, int64_t c, int64_t y, int64_t x, double& element) {
                element = given[index(input, n, c, y, x, last_.back())];
            });
            done(sparing_input(plan_, add(input), last_.back()));
        }
        for (int64_t count = random.integer(1, 6); count > 0; count--) operation();
        outputs_.push_back(static_cast<int>(tensors_.size()) - 1);
        if (random.chance(0.3)) outputs_.push_back(static_cast<int>(random.integer(0, tensors_.size() - 1)));
        for (const int number : outputs_) {
            last_.push_back(random.chance(0.5));
            done(sparing_output(plan_, number, last_.back()));
            results_.emplace_back(tensors_[number].data.size());
        }
        done(sparing_finish(plan_));
        check(sparing_finish(plan_) < 0, "a plan was finished twice");
    }
    ~Network() { sparing_free(plan_); }

    void run() {
        std::vector<const float*> from;
        std::vector<float*> to;
        for (auto& input : inputs_) from.push_back(input.data());
        for (auto& result : results_) to.push_back(result.data());
        const auto regions = guards();
        for (auto& [begin, floats] : regions) std::fill_n(begin, floats, NAN);
        for (auto& tensor : plan_->tensors_)
            if (tensor.data) std::fill_n(tensor.data, tensor.layout.size(), NAN);
        for (auto& memory : plan_->scratch_) std::fill_n(memory.get(), scratch(), NAN);
        for (int run = 0; run < 2; run++) {
            for (auto& result : results_) std::fill(result.begin(), result.end(), NAN);
            for (auto& [begin, floats] : regions) POISON(begin + 2 * LANES, floats - 2 * LANES);
            done(sparing_run(plan_, from.data(), to.data()));
            for (auto& [begin, floats] : regions) UNPOISON(begin + 2 * LANES, floats - 2 * LANES);
            for (auto& [begin, floats] : regions)
                for (int64_t i = 0; i < floats; i++) check(std::isnan(begin[i]), "a guard has changed");
            compare();
        }
    }

  private:
    static size_t index(const Expected& t, int64_t n, int64_t c, int64_t y, int64_t x, bool channels_last) {
        return channels_last ? ((n * t.height + y) * t.width + x) * t.channels + c
                             : ((n * t.channels + c) * t.height + y) * t.width + x;
    }

    void done(int64_t result) { check(result >= 0, sparing_error()); }

    int add(const Expected& tensor) {
        tensors_.push_back(tensor);
        const int number = sparing_tensor(plan_, tensor.images, tensor.channels, tensor.height, tensor.width);
        check(number == static_cast<int>(tensors_.size()) - 1, sparing_error());
        return number;
    }

    int64_t scratch() const {
        int64_t floats = 0;
        for (auto& operation : plan_->operations_) floats = std::max(floats, operation->scratch());
        return floats;
    }

    // Memory behind each tensor and behind the scratch memory.
    std::vector<std::pair<float*, int64_t>> guards() const {
        std::vector<std::pair<float*, int64_t>> result;
        for (auto& tensor : plan_->tensors_)
            if (tensor.data) result.push_back({tensor.data + tensor.layout.size(), GUARD});
        for (auto& memory : plan_->scratch_) result.push_back({memory.get() + scratch(), GUARD});
        return result;
    }

    void compare() {
        for (size_t i = 0; i < outputs_.size(); i++) {
            Expected& expected = tensors_[outputs_[i]];
            expected.each([&](int64_t n, int64_t c, int64_t y, int64_t x, double& element) {
                const double found = results_[i][index(expected, n, c, y, x, last_[inputs_.size() + i])];
                check(std::abs(found - element) <= expected.error + 1e-30,
                      "tensor " + std::to_string(outputs_[i]) + " has " + std::to_string(found) + " instead of " +
                          std::to_string(element));
            });
        }
    }

    SparingWindow window(const Expected& in, bool same, bool pool) {
        SparingWindow w;
        for (auto [kernel, stride, padding, dilation, size] :
             {std::make_tuple(&w.kernel_y, &w.stride_y, &w.padding_y, &w.dilation_y, in.height),
              std::make_tuple(&w.kernel_x, &w.stride_x, &w.padding_x, &w.dilation_x, in.width)}) {
            *kernel = same ? random_.one_of<int64_t>({1, 3, 5}) : random_.one_of<int64_t>({1, 2, 3, 3, 4, 5, 7});
            *stride = same ? 1 : random_.one_of<int64_t>({1, 1, 2, 2, 3, 4});
            *dilation = random_.chance(0.8) ? 1 : random_.integer(2, 3);
            const int64_t reach = (*kernel - 1) * *dilation, least = std::max<int64_t>(0, (reach + 2 - size) / 2);
            *padding = same ? reach / 2 : pool ? std::min(*kernel / 2, reach / 2) : least + random_.integer(0, 2);
            if (size + 2 * *padding < reach + 1) *kernel = *dilation = 1, *padding = 0;
        }
        return w;
    }

    static int64_t outputs(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
        return (size + 2 * padding - (kernel - 1) * dilation - 1) / stride + 1;
    }

    // Call function(element of `in` or null, ky, kx) for each kernel element of an output pixel.
    template <class Function>
    static void each_tap(const SparingWindow& w, Expected& in, int64_t n, int64_t c, int64_t y, int64_t x,
                         const Function& function) {
        for (int64_t ky = 0; ky < w.kernel_y; ky++)
            for (int64_t kx = 0; kx < w.kernel_x; kx++) {
                const int64_t row = y * w.stride_y + ky * w.dilation_y - w.padding_y;
                const int64_t column = x * w.stride_x + kx * w.dilation_x - w.padding_x;
                const bool inside = row >= 0 && row < in.height && column >= 0 && column < in.width;
                function(inside ? &in.at(n, c, row, column) : nullptr, ky, kx);
            }
    }

    void operation() {
        const int from = static_cast<int>(random_.integer(0, tensors_.size() - 1));
        Expected in = tensors_[from];
        const int activation = static_cast<int>(random_.integer(IDENTITY, HARDSIGMOID));
        const bool matrix = in.images == 1 && in.height == 1;
        std::vector<int> alike, positions;  // tensors of the same shape, or the same but for the channels
        for (size_t i = 0; i < tensors_.size(); i++) {
            const Expected& t = tensors_[i];
            if (t.images != in.images || t.height != in.height || t.width != in.width) continue;
            positions.push_back(static_cast<int>(i));
            if (t.channels == in.channels) alike.push_back(static_cast<int>(i));
        }
        switch (random_.integer(matrix ? 2 : 0, 9)) {
            case 0: {  // mean, and a gate
                Expected mean(1, in.channels, 1, in.images);
                in.each([&](int64_t n, int64_t c, int64_t, int64_t, double& x) {
                    mean.at(0, c, 0, n) += x / static_cast<double>(in.height * in.width);
                });
                mean.error = in.error + 1e-6 * in.largest();
                const int gate = add(mean);
                done(sparing_mean(plan_, from, gate));
                return binary(from, gate, activation);
            }
            case 1: {
                const SparingWindow w = window(in, false, true);
                const int kind = static_cast<int>(random_.integer(MAXIMUM, AVERAGE_WITHOUT_PADDING));
                return slide(from, w, kind, {}, {}, IDENTITY);
            }
            case 2: {
                const SparingWindow w = window(in, random_.chance(0.3), false);
                const auto weight = random_.numbers(in.channels * w.kernel_y * w.kernel_x);
                return slide(from, w, -1, weight, random_.numbers(in.channels), activation);
            }
            case 3: {
                const auto scale = random_.numbers(in.channels), bias = random_.numbers(in.channels);
                const bool scaled = random_.chance(0.7), biased = random_.chance(0.7);
                Expected out = in;
                out.each([&](int64_t, int64_t c, int64_t, int64_t, double& x) {
                    x = x * (scaled ? scale[c] : 1.0f) + (biased ? bias[c] : 0.0f);
                });
                out.error = 5 * in.error + 1e-6 * (5 * in.largest() + 5);
                out.activate(activation);
                const int to = add(out);
                done(sparing_affine(plan_, from, to, scaled ? scale.data() : nullptr, biased ? bias.data() : nullptr,
                                    activation));
                return;
            }
            case 4: return binary(from, random_.one_of(alike), activation);
            case 5: {
                const int other = random_.one_of(positions);
                Expected b = tensors_[other];
                const int64_t first = random_.integer(0, b.channels - 1), count = random_.integer(1, b.channels - first);
                Expected out(in.images, in.channels + count, in.height, in.width);
                out.each([&](int64_t n, int64_t c, int64_t y, int64_t x, double& element) {
                    element = c < count ? b.at(n, first + c, y, x) : in.at(n, c - count, y, x);
                });
                out.error = std::max(in.error, b.error);
                const int to = add(out);
                done(sparing_copy(plan_, from, 0, to, count, in.channels));
                done(sparing_copy(plan_, other, first, to, 0, count));
                return;
            }
            case 6: {
                const auto weight = random_.numbers(in.channels), bias = random_.numbers(in.channels);
                const double channels = static_cast<double>(in.channels), epsilon = 0.01;
                const bool centered = random_.chance(0.5);
                Expected out = in, mean(in.images, 1, in.height, in.width), square = mean;
                if (centered)
                    in.each([&](int64_t n, int64_t, int64_t y, int64_t x, double& v) { mean.at(n, 0, y, x) += v / channels; });
                in.each([&](int64_t n, int64_t, int64_t y, int64_t x, double& v) {
                    const double difference = v - mean.at(n, 0, y, x);
                    square.at(n, 0, y, x) += difference * difference / channels;
                });
                out.each([&](int64_t n, int64_t c, int64_t y, int64_t x, double& v) {
                    v = (v - mean.at(n, 0, y, x)) / std::sqrt(square.at(n, 0, y, x) + epsilon) * weight[c] + bias[c];
                });
                out.error = (30 * in.error + 1e-5 * in.largest()) * (1 + out.largest()) * 5;
                const int to = add(out);
                done(sparing_layer_norm(plan_, from, to, weight.data(), bias.data(), static_cast<float>(epsilon), centered));
                return;
            }
            case 7:
                if (matrix) return attention(from);
                [[fallthrough]];
            default: return convolution(from, activation, positions);
        }
    }

    void attention(int from) {
        std::vector<int64_t> divisors;
        for (int64_t n = 1; n <= tensors_[from].width; n++)
            if (tensors_[from].width % n == 0) divisors.push_back(n);
        const int64_t samples = random_.one_of(divisors), rows = tensors_[from].width, queries = rows / samples;
        std::vector<int> others, values, masks{-1};
        for (size_t i = 0; i < tensors_.size(); i++)
            if (tensors_[i].images == 1 && tensors_[i].height == 1 && tensors_[i].width % samples == 0)
                others.push_back(static_cast<int>(i));
        const int key = random_.one_of(others);
        for (const int i : others)
            if (tensors_[i].width == tensors_[key].width) values.push_back(i);
        const int value = random_.one_of(values);
        const int64_t keys = tensors_[key].width / samples;
        const int operands[] = {from, key, value};
        const int64_t least = std::min(tensors_[from].channels, tensors_[key].channels);
        const int64_t heads = random_.integer(1, std::min<int64_t>({4, least, tensors_[value].channels}));
        const int64_t shared = heads % 2 == 0 && random_.chance(0.5) ? 2 : random_.one_of<int64_t>({1, heads});
        const int64_t channels = random_.integer(1, least / heads);
        const int64_t size = random_.integer(1, tensors_[value].channels / heads);
        const int64_t mask_heads = random_.one_of<int64_t>({1, heads}), mask_queries = random_.one_of<int64_t>({1, queries});
        for (const int i : others)
            if (tensors_[i].channels == keys && tensors_[i].width == samples * mask_heads * mask_queries) masks.push_back(i);
        const int mask = random_.one_of(masks);
        int64_t first[3], stride[3];
        for (int i = 0; i < 3; i++) {
            const int64_t room = tensors_[operands[i]].channels - (i == 2 ? size : channels);
            const int64_t others = i == 0 ? heads - 1 : heads / shared - 1;
            stride[i] = random_.integer(1, std::max<int64_t>(1, room / std::max<int64_t>(1, others)));
            first[i] = random_.integer(0, room - others * stride[i]);
        }
        const bool causal = random_.chance(0.5), tokens_first = random_.chance(0.5);
        const float scale = random_.one_of<float>({1.0f, 0.3f, -0.5f});
        const bool rotary = queries == keys && channels % 2 == 0 && random_.chance(0.7);
        std::vector<float> cosine, sine;
        for (const float angle : random_.numbers(rotary ? keys * channels : 0)) {
            cosine.push_back(std::cos(angle));
            sine.push_back(std::sin(angle));
        }
        // Channel c of a head that begins at a channel.
        const auto turned = [&](int tensor, int64_t begin, int64_t c, int64_t row, int64_t token) {
            const auto at = [&](int64_t channel) { return double(tensors_[tensor].at(0, begin + channel, 0, row)); };
            const int64_t half = channels / 2, i = token * channels + c;
            return rotary ? at(c) * cosine[i] + (c < half ? -at(c + half) : at(c - half)) * sine[i] : at(c);
        };
        const auto row = [&](int64_t sample, int64_t token, int64_t tokens) {
            return tokens_first ? token * samples + sample : sample * tokens + token;
        };
        Expected out(1, heads * size, 1, rows);
        for (int64_t sample = 0; sample < samples; sample++)
            for (int64_t head = 0; head < heads; head++)
                for (int64_t i = 0; i < queries; i++) {
                    std::vector<double> weights(causal ? std::min(keys, i + 1) : keys);
                    double most = -INFINITY, sum = 0;
                    for (size_t j = 0; j < weights.size(); j++) {
                        double score = 0;
                        for (int64_t c = 0; c < channels; c++)
                            score += turned(from, first[0] + head * stride[0], c, row(sample, i, queries), i) *
                                     turned(key, first[1] + head / shared * stride[1], c, row(sample, j, keys), j);
                        weights[j] = score * scale;
                        if (mask >= 0)
                            weights[j] += tensors_[mask].at(
                                0, j, 0, (sample * mask_heads + head % mask_heads) * mask_queries + i % mask_queries
                            );
                        most = std::max(most, weights[j]);
                    }
                    for (double& weight : weights) sum += weight = std::exp(weight - most);
                    for (int64_t c = 0; c < size; c++)
                        for (size_t j = 0; j < weights.size(); j++)
                            out.at(0, head * size + c, 0, row(sample, i, queries)) +=
                                weights[j] / sum *
                                tensors_[value].at(0, first[2] + head / shared * stride[2] + c, 0, row(sample, j, keys));
                }
        const Expected &q = tensors_[from], &k = tensors_[key], &v = tensors_[value];
        const double factor = std::abs(scale) * static_cast<double>(channels) * (rotary ? 2.1 : 1.0);  // (sin + cos)^2 <= 2
        double wrong = factor * (q.largest() * k.error + q.error * (k.largest() + k.error)) +
                       2e-6 * factor * q.largest() * k.largest();
        if (mask >= 0) wrong += tensors_[mask].error + 1e-6 * tensors_[mask].largest();
        if (wrong > 1) return;  // rounding errors could decide which key is the most similar
        const double relative = std::expm1(2 * wrong) + 1e-5;
        out.error = (1 + relative) * v.error + relative * v.largest();
        const int to = add(out);
        done(sparing_attention(plan_, from, key, value, mask, to, first, stride, heads, channels, queries, keys, scale,
                               causal, tokens_first, mask_heads, mask_queries, shared, rotary ? cosine.data() : nullptr,
                               rotary ? sine.data() : nullptr));
    }

    void binary(int from, int other, int activation) {
        Expected a = tensors_[from], b = tensors_[other], out = a;
        const int kind = static_cast<int>(random_.integer(ADD, MULTIPLY));
        const bool gate = b.images != a.images || b.height != a.height || b.width != a.width;
        out.each([&](int64_t n, int64_t c, int64_t y, int64_t x, double& v) {
            const double number = gate ? b.at(0, c, 0, n) : b.at(n, c, y, x);
            v = kind == ADD ? v + number : v * number;
        });
        out.error = kind == ADD ? a.error + b.error : a.error * (b.largest() + b.error) + b.error * a.largest();
        out.error += 1e-6 * (out.largest() + a.largest());
        out.activate(activation);
        const int to = add(out);
        done(sparing_binary(plan_, from, other, to, kind, activation));
    }

    // Depthwise convolution, or pooling of a kind.
    void slide(int from, const SparingWindow& w, int kind, const std::vector<float>& weight,
               const std::vector<float>& bias, int activation) {
        Expected in = tensors_[from];
        Expected out(in.images, in.channels, outputs(in.height, w.kernel_y, w.stride_y, w.padding_y, w.dilation_y),
                     outputs(in.width, w.kernel_x, w.stride_x, w.padding_x, w.dilation_x));
        const int64_t taps = w.kernel_y * w.kernel_x;
        out.each([&](int64_t n, int64_t c, int64_t y, int64_t x, double& v) {
            v = kind < 0 ? bias[c] : kind == MAXIMUM ? -INFINITY : 0;
            int64_t count = 0;
            each_tap(w, in, n, c, y, x, [&](const double* element, int64_t ky, int64_t kx) {
                if (element == nullptr) return;
                count++;
                if (kind == MAXIMUM)
                    v = std::max(v, *element);
                else
                    v += *element * (kind < 0 ? weight[c * taps + ky * w.kernel_x + kx] : 1.0f);
            });
            if (kind == AVERAGE) v /= static_cast<double>(taps);
            if (kind == AVERAGE_WITHOUT_PADDING && count) v /= static_cast<double>(count);
        });
        if (!std::isfinite(out.largest())) return;  // a window without pixels
        out.error = kind < 0 ? static_cast<double>(5 * taps) * (in.error + 1e-6 * (in.largest() + 1))
                             : in.error + 1e-6 * in.largest();
        out.activate(activation);
        const int to = add(out);
        done(kind < 0 ? sparing_depthwise(plan_, from, to, &w, weight.data(), bias.data(), activation)
                      : sparing_pool(plan_, from, to, &w, kind));
    }

    void convolution(int from, int activation, const std::vector<int>& positions) {
        Expected in = tensors_[from];
        const bool same = random_.chance(0.5);
        const SparingWindow w = random_.chance(0.4) ? SparingWindow{1, 1, 1, 1, 0, 0, 1, 1} : window(in, same, false);
        Expected out(in.images, random_.integer(1, 24), outputs(in.height, w.kernel_y, w.stride_y, w.padding_y, w.dilation_y),
                     outputs(in.width, w.kernel_x, w.stride_x, w.padding_x, w.dilation_x));
        int residual = -1;
        if (out.height == in.height && out.width == in.width && random_.chance(0.6)) {
            residual = random_.one_of(positions);
            out = tensors_[residual];
        } else if (random_.chance(0.4)) {
            out.channels = random_.integer(1, 3) * 8;
            out.data.resize(out.images * out.channels * out.height * out.width);
        }
        const int64_t taps = w.kernel_y * w.kernel_x, width = in.channels * taps;
        const double density = random_.one_of<double>({0.0, 0.05, 0.2, 0.5, 1.0});
        const int64_t block = random_.one_of<int64_t>({1, 1, 4, 8});
        std::vector<float> dense(out.channels * width, 0.0f);
        for (int64_t filter = 0; filter < out.channels; filter += block)
            for (int64_t column = 0; column < width; column++)
                if (random_.chance(density))
                    for (int64_t f = filter; f < std::min(filter + block, out.channels); f++)
                        dense[f * width + column] = random_.numbers(1)[0];
        std::vector<int32_t> starts{0}, columns;
        std::vector<float> values;
        int64_t most = 1;
        for (int64_t filter = 0; filter < out.channels; filter++) {
            for (int64_t column = 0; column < width; column++)
                if (dense[filter * width + column] != 0) {
                    columns.push_back(static_cast<int32_t>(column));
                    values.push_back(dense[filter * width + column]);
                }
            starts.push_back(static_cast<int32_t>(columns.size()));
            most = std::max<int64_t>(most, starts[filter + 1] - starts[filter]);
        }
        const auto bias = random_.numbers(out.channels);
        out.each([&](int64_t n, int64_t f, int64_t y, int64_t x, double& v) {
            v = bias[f] + (residual < 0 ? 0 : v);
            for (int64_t c = 0; c < in.channels; c++)
                each_tap(w, in, n, c, y, x, [&](const double* element, int64_t ky, int64_t kx) {
                    if (element) v += *element * dense[f * width + c * taps + ky * w.kernel_x + kx];
                });
        });
        const double terms = static_cast<double>(most);
        out.error += terms * 5 * in.error + 1e-6 * (terms * 5 * in.largest() + out.largest() + 5);
        out.activate(activation);
        const int to = add(out);
        done(sparing_convolution(plan_, from, to, residual, &w, starts.data(), columns.data(), values.data(), bias.data(),
                                 activation));
    }

    Random& random_;
    SparingPlan* plan_;
    std::vector<Expected> tensors_;
    std::vector<std::vector<float>> inputs_, results_;
    std::vector<int> outputs_;
    std::vector<bool> last_;  // of each input and output: channels last
};

// Calls that must fail, and leave the plan usable.
void refuse() {
    SparingPlan* plan = sparing_plan(2, nullptr);
    const auto refused = [](int64_t result, const char* what) { check(result < 0, std::string("accepted: ") + what); };
    for (const int threads : {0, -1, 1 << 20}) check(sparing_plan(threads, nullptr) == nullptr, "threads");
    for (const int64_t size : {int64_t{0}, int64_t{-1}, (int64_t{1} << 24) + 1, INT64_MAX, INT64_MIN}) {
        refused(sparing_tensor(plan, size, 1, 1, 1), "images");
        refused(sparing_tensor(plan, 1, size, 1, 1), "channels");
        refused(sparing_tensor(plan, 1, 1, size, 1), "height");
        refused(sparing_tensor(plan, 1, 1, 1, size), "width");
    }
    refused(sparing_tensor(plan, 1 << 24, 1 << 24, 1 << 24, 1 << 24), "a large tensor");
    const int in = sparing_tensor(plan, 2, 3, 5, 5), out = sparing_tensor(plan, 2, 2, 5, 5);
    const int same = sparing_tensor(plan, 2, 3, 5, 5), matrix = sparing_tensor(plan, 1, 3, 1, 2);
    const SparingWindow w{1, 1, 1, 1, 0, 0, 1, 1};
    const std::vector<float> numbers(64, 1.0f);
    const float* n = numbers.data();
    const auto convolution = [&](int in, int out, int residual, SparingWindow w, std::vector<int32_t> starts,
                                 std::vector<int32_t> columns, int activation = IDENTITY) {
        return sparing_convolution(plan, in, out, residual, &w, starts.data(), columns.data(), n, n, activation);
    };
    refused(convolution(in, out, -1, w, {0, 1, 2}, {0, 1}), "a tensor that is read before it is written");
    for (const int number : {-1, 4, INT32_MAX, INT32_MIN}) {
        refused(sparing_input(plan, number, 0), "an input without tensor");
        refused(sparing_output(plan, number, 0), "an output without tensor");
        refused(convolution(number, out, -1, w, {0, 1, 2}, {0, 1}), "a convolution without input");
        refused(convolution(in, number, -1, w, {0, 1, 2}, {0, 1}), "a convolution without output");
        if (number >= 0) refused(convolution(in, out, number, w, {0, 1, 2}, {0, 1}), "a residual without tensor");
        refused(sparing_depthwise(plan, number, same, &w, n, n, 0), "a depthwise convolution without input");
        refused(sparing_pool(plan, number, same, &w, MAXIMUM), "pooling without input");
        refused(sparing_mean(plan, number, matrix), "a mean without input");
        refused(sparing_affine(plan, in, number, n, n, 0), "affine without output");
        refused(sparing_binary(plan, in, number, same, ADD, 0), "an addition without second input");
        refused(sparing_copy(plan, number, 0, same, 0, 1), "a copy without input");
        refused(sparing_layer_norm(plan, in, number, n, n, 1e-5f, 1), "a layer norm without output");
    }
    check(sparing_input(plan, in, 0) == 0, sparing_error());
    refused(sparing_input(plan, in, 0), "two inputs for one tensor");
    refused(sparing_finish(plan), "a plan without output");
    refused(convolution(in, out, -1, w, {1, 1, 2}, {0, 1}), "a first row that does not start at 0");
    refused(convolution(in, out, -1, w, {0, 5, 2}, {0, 1}), "rows that go back");
    refused(convolution(in, out, -1, w, {0, -1, 2}, {0, 1}), "a row of negative length");
    refused(convolution(in, out, -1, w, {0, 2, 2}, {1, 0}), "columns in descending order");
    refused(convolution(in, out, -1, w, {0, 2, 2}, {1, 1}), "a column twice");
    refused(convolution(in, out, -1, w, {0, 1, 2}, {0, 3}), "a column out of range");
    refused(convolution(in, out, -1, w, {0, 1, 2}, {-1, 0}), "a negative column");
    refused(convolution(in, out, in, w, {0, 1, 2}, {0, 1}), "a residual of another shape");
    refused(convolution(in, in, -1, w, {0, 1, 2, 2}, {0, 1}), "the input as output");
    for (const int choice : {-1, 10, INT32_MAX, INT32_MIN}) {
        refused(convolution(in, out, -1, w, {0, 1, 2}, {0, 1}, choice), "an activation");
        refused(sparing_pool(plan, in, same, &w, choice), "a kind of pooling");
        refused(sparing_binary(plan, in, in, same, choice, 0), "a kind of binary operation");
    }
    for (const SparingWindow& wrong : std::vector<SparingWindow>{
             {3, 3, 1, 1, 0, 0, 1, 1}, {7, 7, 1, 1, 0, 0, 1, 1}, {1, 1, 2, 2, 0, 0, 1, 1}, {1, 1, 1, 1, 1, 1, 1, 1},
             {0, 1, 1, 1, 0, 0, 1, 1}, {1, 1, 0, 1, 0, 0, 1, 1}, {1, 1, 1, 1, -1, 0, 1, 1}, {1, 1, 1, 1, 0, 0, 0, 1},
             {1, 1, 1, 1, 0, 0, 1, INT64_MAX}, {INT64_MAX, 1, 1, 1, INT64_MAX, 0, 1, 1}, {1, 1, 1, INT64_MIN, 0, 0, 1, 1}}) {
        refused(convolution(in, out, -1, wrong, {0, 1, 2}, {0, 1}), "the window of a convolution");
        refused(sparing_depthwise(plan, in, same, &wrong, n, n, 0), "the window of a depthwise convolution");
        refused(sparing_pool(plan, in, same, &wrong, AVERAGE), "the window of a pooling");
    }
    for (const int64_t first : {int64_t{-1}, int64_t{3}, int64_t{1} << 40, INT64_MAX, INT64_MIN}) {
        refused(sparing_copy(plan, in, first, same, 0, 1), "the first channel of a copy");
        refused(sparing_copy(plan, in, 0, same, first, 1), "the first channel written by a copy");
    }
    refused(sparing_copy(plan, in, 0, same, 0, 4), "too many channels of a copy");
    refused(sparing_copy(plan, in, 0, same, 0, 0), "no channels of a copy");
    refused(sparing_mean(plan, in, same), "the shape of a mean");
    refused(sparing_run(plan, nullptr, nullptr), "a run of an unfinished plan");
    refused(sparing_bytes(plan), "the bytes of an unfinished plan");
    check(sparing_operation(plan, -1) == nullptr && sparing_operation(plan, 1) == nullptr, "accepted: an operation");
    refused(static_cast<int64_t>(sparing_seconds(plan, 0)), "the seconds of an unfinished plan");
    check(convolution(in, out, -1, w, {0, 1, 2}, {0, 1}) == 0, sparing_error());
    refused(convolution(in, out, -1, w, {0, 1, 2}, {0, 1}), "a tensor that is written twice");
    refused(sparing_output(plan, same, 0), "an output that is not written");
    check(sparing_output(plan, out, 0) == 0 && sparing_finish(plan) == 0, sparing_error());
    refused(sparing_tensor(plan, 1, 1, 1, 1), "a tensor of a finished plan");
    refused(sparing_copy(plan, in, 0, same, 0, 1), "an operation of a finished plan");
    std::vector<float> input(150, 2.0f), output(100);
    const float* from = input.data();
    float* to = output.data();
    check(sparing_run(plan, &from, &to) == 0 && output[0] == 3.0f, "the plan does not run after refused calls");
    refused(static_cast<int64_t>(sparing_seconds(plan, 9)), "the seconds of an operation that does not exist");
    sparing_free(plan);
}

// Attention that must be refused, on [2 samples * 2 tokens, 3 channels].
void refuse_attention() {
    SparingPlan* plan = sparing_plan(1, nullptr);
    const int rows = sparing_tensor(plan, 1, 3, 1, 4), out = sparing_tensor(plan, 1, 4, 1, 4);
    const int images = sparing_tensor(plan, 1, 3, 2, 2), fewer = sparing_tensor(plan, 1, 3, 1, 2);
    for (const int tensor : {rows, images, fewer}) check(sparing_input(plan, tensor, 1) == 0, sparing_error());
    int64_t first[3] = {0, 0, 0}, stride[3] = {1, 1, 1}, mask_heads = 1, mask_queries = 1, shared = 1;
    const float angles[6] = {}, *cosine = nullptr, *sine = nullptr;
    const auto attend = [&](int query, int key, int mask, int64_t heads, int64_t channels, int64_t queries, int64_t keys) {
        return sparing_attention(plan, query, key, key, mask, out, first, stride, heads, channels, queries, keys, 1.0f, 0, 0,
                                 mask_heads, mask_queries, shared, cosine, sine);
    };
    const auto refused = [&](int64_t result, const char* what) { check(result < 0, std::string("accepted: ") + what); };
    for (const int64_t n : {int64_t{0}, int64_t{-1}, int64_t{3}, int64_t{5}, int64_t{1} << 24, INT64_MAX, INT64_MIN}) {
        refused(attend(rows, rows, -1, n, 1, 2, 2), "the heads of attention");
        refused(attend(rows, rows, -1, 2, n, 2, 2), "the channels of a head");
        refused(attend(rows, rows, -1, 2, 1, n, 2), "the queries of attention");
        refused(attend(rows, rows, -1, 2, 1, 2, n), "the keys of attention");
        for (int64_t* size : {&mask_heads, &mask_queries, &shared}) {
            *size = n;
            refused(attend(rows, rows, -1, 2, 1, 2, 2), "the rows of a mask, or the heads that share keys");
            *size = 1;
        }
        for (int i = 0; i < 3; i++) {
            first[i] = n;
            if (n != 0) refused(attend(rows, rows, -1, 2, 1, 2, 2), "the first channel of a head");
            first[i] = 0;
            stride[i] = n;
            refused(attend(rows, rows, -1, 2, 1, 2, 2), "the channels from head to head");
            stride[i] = 1;
        }
    }
    for (const int number : {-1, 99, INT32_MAX, INT32_MIN}) {
        refused(attend(number, rows, -1, 2, 1, 2, 2), "attention without query");
        refused(attend(rows, number, -1, 2, 1, 2, 2), "attention without key");
        if (number >= 0) refused(attend(rows, rows, number, 2, 1, 2, 2), "a mask without tensor");
    }
    for (const int other : {images, fewer}) {
        refused(attend(other, rows, -1, 2, 1, 2, 2), "the shape of a query");
        refused(attend(rows, other, -1, 2, 1, 2, 2), "the shape of a key");
        refused(attend(rows, rows, other, 2, 1, 2, 2), "the shape of a mask");
    }
    cosine = angles;
    refused(attend(rows, rows, -1, 1, 2, 2, 2), "a rotary embedding without sine");
    sine = angles;
    refused(attend(rows, rows, -1, 1, 3, 2, 2), "a rotary embedding of an odd number of channels");
    refused(attend(rows, fewer, -1, 1, 2, 2, 1), "a rotary embedding of other keys");
    cosine = sine = nullptr;
    check(attend(rows, rows, -1, 2, 1, 2, 2) == 0, sparing_error());
    sparing_free(plan);
}

// Windows of any numbers: they are refused, or run.
void forge(Random& random) {
    const auto any = [&](int64_t least) {
        const int64_t choice = random.integer(0, 9);
        const int64_t power = int64_t{1} << random.integer(0, 30);
        return choice < 6 ? random.integer(least, least + 3) : choice < 9 ? power + random.integer(-1, 1) : -power;
    };
    SparingPlan* plan = sparing_plan(1, nullptr);
    SparingWindow w{any(1), any(1), any(1), any(1), any(0), any(0), any(1), any(1)};
    const int64_t height = random.integer(1, 9), width = random.integer(1, 9);
    const auto output = [](int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
        const int64_t result = stride ? (size + 2 * padding - (kernel - 1) * dilation - 1) / stride + 1 : 1;
        return std::clamp<int64_t>(result, 1, 9);
    };
    const int in = sparing_tensor(plan, 1, 4, height, width);
    const int out = sparing_tensor(plan, 1, 4, output(height, w.kernel_y, w.stride_y, w.padding_y, w.dilation_y),
                                   output(width, w.kernel_x, w.stride_x, w.padding_x, w.dilation_x));
    check(in == 0 && out == 1 && sparing_input(plan, in, 0) == 0, sparing_error());
    const bool pool = random.chance(0.5);
    const std::vector<int32_t> starts{0, 1, 1, 1, 1};
    const float numbers[4] = {};
    const int32_t column = 0;
    const int result = pool ? sparing_pool(plan, in, out, &w, static_cast<int>(random.integer(0, 2)))
                            : sparing_convolution(plan, in, out, -1, &w, starts.data(), &column, numbers, numbers, 0);
    if (result == 0 && sparing_output(plan, out, 0) == 0 && sparing_finish(plan) == 0) {
        const std::vector<float> input(4 * height * width);
        const Layout& layout = plan->layout(out);
        std::vector<float> output(4 * layout.height * layout.width);
        const float* from = input.data();
        float* to = output.data();
        check(sparing_run(plan, &from, &to) == 0, sparing_error());
    }
    sparing_free(plan);
}

}  // namespace

int main(int count, char** arguments) {
    check(count == 3, "usage: fuzz FIRST LAST");
    refuse();
    refuse_attention();
    for (seed = std::atoi(arguments[1]); seed < std::atoi(arguments[2]); seed++) {
        Random random{std::mt19937(seed)};
        Network(random, 1 + seed % 3).run();
        forge(random);
    }
}
