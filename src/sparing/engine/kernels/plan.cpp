// The C interface of engine.h: check all arguments, then add operations to a plan. The messages are those of
// shapes.py and operations.py.
#include "plan.h"

using namespace sparing;

struct SparingPlan : Plan {
    using Plan::Plan;
};

namespace {

thread_local std::string message;

// Call a function that returns an integer. Exceptions do not cross the interface.
template <class Function>
auto attempt(Function function) -> decltype(function()) {
    try {
        return function();
    } catch (const std::bad_alloc&) {
        message = "not enough memory";
    } catch (const std::exception& error) {
        message = error.what();
    }
    return -1;
}

constexpr int64_t LARGEST = int64_t{1} << 24;  // of a size, so that products of two fit into 64 bits

void check_integer(const char* name, int64_t number, int64_t least = 1, int64_t most = LARGEST) {
    require(
        number >= least && number <= most,
        std::string(name) + " must be an integer in [" + std::to_string(least) + ", " + std::to_string(most) +
            "], got " + std::to_string(number)
    );
}

void check_shape(const char* name, const Layout& got, const Layout& expected) {
    require(same_shape(got, expected), std::string(name) + " must have shape " + shape(expected) + ", got " + shape(got));
}

// `ceil`: the output may be larger by one, as with ceil_mode of pooling. Returns the window, with stride 1 where an
// output of one pixel makes the stride meaningless: the kernels need memory for each pixel of a stride.
SparingWindow check_window(const Layout& in, const Layout& out, SparingWindow w, bool ceil) {
    for (const int64_t size : {w.kernel_y, w.kernel_x}) check_integer("kernel", size);
    for (const int64_t size : {w.stride_y, w.stride_x}) check_integer("stride", size);
    for (const int64_t size : {w.padding_y, w.padding_x}) check_integer("padding", size, 0);
    for (const int64_t size : {w.dilation_y, w.dilation_x}) check_integer("dilation", size);
    const auto output = [](int64_t size, int64_t padding, int64_t kernel, int64_t dilation, int64_t stride) {
        const int64_t rest = size + 2 * padding - (kernel - 1) * dilation - 1;
        return rest < 0 ? 0 : rest / stride + 1;
    };
    const auto fits = [&](int64_t expected, int64_t got) {
        return expected >= 1 && (got == expected || (ceil && got == expected + 1));
    };
    const int64_t height = output(in.height, w.padding_y, w.kernel_y, w.dilation_y, w.stride_y);
    const int64_t width = output(in.width, w.padding_x, w.kernel_x, w.dilation_x, w.stride_x);
    require(
        in.images == out.images && fits(height, out.height) && fits(width, out.width),
        "the window makes " + std::to_string(height) + "x" + std::to_string(width) + " pixels of " + shape(in) +
            ", not " + shape(out)
    );
    if (out.height == 1) w.stride_y = 1;
    if (out.width == 1) w.stride_x = 1;
    return w;
}

Csr read_csr(int64_t rows, int64_t width, const int32_t* starts, const int32_t* columns, const float* values) {
    require(starts[0] == 0, "starts must ascend from 0");
    for (int64_t row = 0; row < rows; row++) require(starts[row] <= starts[row + 1], "starts must ascend from 0");
    for (int64_t row = 0; row < rows; row++)
        for (int32_t j = starts[row]; j < starts[row + 1]; j++) {
            require(
                columns[j] >= 0 && columns[j] < width,
                "columns must be in [0, " + std::to_string(width) + "), got " + std::to_string(columns[j])
            );
            require(j == starts[row] || columns[j - 1] < columns[j], "columns of a filter must ascend");
        }
    return {{starts, starts + rows + 1}, {columns, columns + starts[rows]}, {values, values + starts[rows]}};
}

std::vector<float> copy(const float* from, int64_t count) {
    return from ? std::vector<float>(from, from + count) : std::vector<float>();
}

}  // namespace

const char* sparing_error() { return message.c_str(); }

int sparing_lanes() { return LANES; }

SparingPlan* sparing_plan(int threads, const SparingOpenmp* openmp) {
    SparingPlan* plan = nullptr;
    attempt([&] {
        check_integer("threads", threads, 1, 1024);
        plan = new SparingPlan(threads, openmp);
        return 0;
    });
    return plan;
}

void sparing_free(SparingPlan* plan) { delete plan; }

int sparing_tensor(SparingPlan* plan, int64_t images, int64_t channels, int64_t height, int64_t width) {
    return attempt([&] {
        const Layout layout{images, channels, height, width};
        for (const int64_t size : {images, channels, height, width}) check_integer("every size of a tensor", size);
        // Tiles add at most a factor of 2 * LANES to the floats.
        require(
            static_cast<double>(images) * static_cast<double>(channels) * static_cast<double>(height) *
                    static_cast<double>(width) <= 1e11,
            "tensor " + shape(layout) + " is too large"
        );
        return plan->add_tensor(layout);
    });
}

int sparing_input(SparingPlan* plan, int tensor, int channels_last) {
    return attempt([&] {
        plan->add_input(std::make_unique<Input>(tensor, channels_last != 0));
        return 0;
    });
}

int sparing_output(SparingPlan* plan, int tensor, int channels_last) {
    return attempt([&] {
        plan->add_output(std::make_unique<Output>(tensor, channels_last != 0));
        return 0;
    });
}

int sparing_convolution(
    SparingPlan* plan, int in, int out, int residual, const SparingWindow* window, const int32_t* starts,
    const int32_t* columns, const float* values, const float* bias, int activation
) {
    return attempt([&] {
        const Layout &from = plan->layout(in), &to = plan->layout(out);
        const SparingWindow w = check_window(from, to, *window, false);
        check_integer("activation", activation, 0, HARDSIGMOID);
        if (residual >= 0) check_shape("the residual", plan->layout(residual), to);
        require(to.channels <= UINT16_MAX, "a convolution may have at most 65535 filters");
        const int64_t taps = w.kernel_y * w.kernel_x;
        require(taps <= UINT16_MAX, "a kernel may have at most 65535 elements, got " + std::to_string(taps));
        const int64_t width = from.channels * taps;
        check_integer("the number of weights of a filter", width);
        Csr weight = read_csr(to.channels, width, starts, columns, values);
        const bool matrix = from.images == 1 && from.height == 1 && from.width == to.width && width == from.channels &&
                            w.padding_y == 0 && w.padding_x == 0;
        if (matrix && from.width == 1 && width <= UINT16_MAX)
            plan->add(std::make_unique<Row>(in, out, residual, weight, copy(bias, to.channels), activation));
        else
            plan->add(std::make_unique<Convolution>(
                in, out, residual, w, std::move(weight), copy(bias, to.channels), activation
            ));
        return 0;
    });
}

int sparing_depthwise(
    SparingPlan* plan, int in, int out, const SparingWindow* window, const float* weight, const float* bias,
    int activation
) {
    return attempt([&] {
        const Layout &from = plan->layout(in), &to = plan->layout(out);
        const SparingWindow w = check_window(from, to, *window, false);
        check_integer("activation", activation, 0, HARDSIGMOID);
        require(from.channels == to.channels, "a depthwise convolution must keep the number of channels");
        const int64_t taps = w.kernel_y * w.kernel_x;
        check_integer("the size of a window", taps);
        check_integer("the number of weights of a depthwise convolution", from.channels * taps);
        plan->add(std::make_unique<Depthwise>(
            in, out, w, copy(weight, from.channels * taps), copy(bias, from.channels), activation
        ));
        return 0;
    });
}

int sparing_pool(SparingPlan* plan, int in, int out, const SparingWindow* window, int kind) {
    return attempt([&] {
        const Layout &from = plan->layout(in), &to = plan->layout(out);
        check_integer("kind", kind, 0, AVERAGE_WITHOUT_PADDING);
        const SparingWindow w = check_window(from, to, *window, kind == MAXIMUM);
        require(from.channels == to.channels, "pooling must keep the number of channels");
        check_integer("the size of a window", w.kernel_y * w.kernel_x);
        plan->add(std::make_unique<Pool>(in, out, w, kind));
        return 0;
    });
}

int sparing_mean(SparingPlan* plan, int in, int out) {
    return attempt([&] {
        const Layout &from = plan->layout(in), &to = plan->layout(out);
        check_shape("the mean", to, {1, from.channels, 1, from.images});
        plan->add(std::make_unique<Mean>(in, out));
        return 0;
    });
}

int sparing_affine(SparingPlan* plan, int in, int out, const float* scale, const float* bias, int activation) {
    return attempt([&] {
        const Layout &from = plan->layout(in), &to = plan->layout(out);
        check_shape("the output", to, from);
        check_integer("activation", activation, 0, HARDSIGMOID);
        plan->add(std::make_unique<Affine>(in, out, copy(scale, from.channels), copy(bias, from.channels), activation));
        return 0;
    });
}

int sparing_binary(SparingPlan* plan, int a, int b, int out, int kind, int activation) {
    return attempt([&] {
        const Layout &first = plan->layout(a), &second = plan->layout(b), &to = plan->layout(out);
        check_shape("the output", to, first);
        const bool gate = second.images == 1 && second.height == 1 && second.width == first.images &&
                          second.channels == first.channels;
        if (!gate) check_shape("the other operand", second, first);
        check_integer("kind", kind, 0, MULTIPLY);
        check_integer("activation", activation, 0, HARDSIGMOID);
        plan->add(std::make_unique<Binary>(a, b, out, kind, activation));
        return 0;
    });
}

int sparing_copy(SparingPlan* plan, int in, int64_t in_first, int out, int64_t out_first, int64_t channels) {
    return attempt([&] {
        const Layout &from = plan->layout(in), &to = plan->layout(out);
        check_shape("the output", to, {from.images, to.channels, from.height, from.width});
        check_integer("channels", channels);
        const auto check_range = [&](int64_t first, const Layout& layout) {
            check_integer("the first channel", first, 0);
            require(
                first + channels <= layout.channels,
                "channels [" + std::to_string(first) + ", " + std::to_string(first + channels) + ") are not in " +
                    shape(layout)
            );
        };
        check_range(in_first, from);
        check_range(out_first, to);
        plan->add(std::make_unique<Copy>(in, in_first, out, out_first, channels), true);
        return 0;
    });
}

int sparing_layer_norm(
    SparingPlan* plan, int in, int out, const float* weight, const float* bias, float epsilon, int centered
) {
    return attempt([&] {
        const Layout &from = plan->layout(in), &to = plan->layout(out);
        check_shape("the output", to, from);
        plan->add(std::make_unique<LayerNorm>(
            in, out, copy(weight, from.channels), copy(bias, from.channels), epsilon, centered != 0
        ));
        return 0;
    });
}

int sparing_attention(
    SparingPlan* plan, int query, int key, int value, int mask, int out, const int64_t* first, const int64_t* stride,
    int64_t heads, int64_t channels, int64_t queries, int64_t keys, float scale, int causal,
    int tokens_first, int64_t mask_heads, int64_t mask_queries, int64_t shared, const float* cosine, const float* sine
) {
    return attempt([&] {
        const Layout& to = plan->layout(out);
        check_integer("heads", heads, 1, to.channels);
        check_integer("the heads that share keys", shared, 1, heads);
        require(heads % shared == 0, "the heads must share keys in groups of equal size");
        check_integer("the channels of a head", channels);
        check_integer("the number of queries", queries, 1, to.width);
        const int64_t samples = to.width / queries;
        check_integer("the number of keys", keys, 1, LARGEST / samples);
        require(
            to.width % queries == 0 && to.channels % heads == 0,
            "the output must have " + std::to_string(queries) + " rows per sample and " + std::to_string(heads) +
                " heads, got " + shape(to)
        );
        const int numbers[] = {query, key, value};
        const int64_t rows[] = {to.width, samples * keys, samples * keys};
        Heads parts[3];
        for (int i = 0; i < 3; i++) {
            const Layout& from = plan->layout(numbers[i]);
            check_shape("query, key or value", from, {1, from.channels, 1, rows[i]});
            check_integer("the first channel", first[i], 0);
            check_integer("the channels from head to head", stride[i]);
            const int64_t others = i == 0 ? heads - 1 : heads / shared - 1;
            const int64_t last = first[i] + others * stride[i] + (i == 2 ? to.channels / heads : channels);
            require(
                last <= from.channels, "the heads end at channel " + std::to_string(last) + " of " + shape(from)
            );
            parts[i] = {numbers[i], first[i], stride[i]};
        }
        check_shape("the output", to, {1, to.channels, 1, to.width});
        require(
            (mask_heads == 1 || mask_heads == heads) && (mask_queries == 1 || mask_queries == queries),
            "a mask must have one or all heads and queries"
        );
        if (mask >= 0)
            check_shape("the mask", plan->layout(mask), {1, keys, 1, samples * mask_heads * mask_queries});
        require((cosine == nullptr) == (sine == nullptr), "a rotary embedding needs cosine and sine");
        require(
            !cosine || (channels % 2 == 0 && queries == keys),
            "a rotary embedding needs an even number of channels, and as many queries as keys"
        );
        plan->add(std::make_unique<Attention>(
            parts[0], parts[1], parts[2], mask, out, copy(cosine, keys * channels), copy(sine, keys * channels),
            AttentionShape{
                heads, channels, queries, keys, scale, causal != 0, tokens_first != 0, mask_heads, mask_queries, shared
            }
        ));
        return 0;
    });
}

int sparing_finish(SparingPlan* plan) {
    return attempt([&] {
        plan->finish();
        return 0;
    });
}

int64_t sparing_bytes(SparingPlan* plan) {
    return attempt([&] { return plan->bytes(); });
}

int sparing_run(SparingPlan* plan, const float* const* inputs, float* const* outputs) {
    return attempt([&] {
        plan->run(inputs, outputs);
        return 0;
    });
}

int sparing_profile(SparingPlan* plan, int on) {
    plan->profile = on != 0;
    return 0;
}

int sparing_operations(SparingPlan* plan) { return static_cast<int>(plan->operations().size()); }

const char* sparing_operation(SparingPlan* plan, int index) {
    const char* name = nullptr;
    attempt([&] {
        check_integer("operation", index, 0, sparing_operations(plan) - 1);
        name = plan->operations()[index]->name();
        return 0;
    });
    return name;
}

double sparing_seconds(SparingPlan* plan, int index) {
    return attempt([&] {
        check_integer("operation", index, 0, sparing_operations(plan) - 1);
        return plan->seconds(index);
    });
}
