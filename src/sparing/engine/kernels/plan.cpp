// The C interface of engine.h: check all arguments, then add operations to a plan.
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

void check_size(const char* name, int64_t size, int64_t least = 1) {
    require(
        size >= least && size <= LARGEST,
        std::string(name) + " must be between " + std::to_string(least) + " and " + std::to_string(LARGEST) + ", got " +
            std::to_string(size)
    );
}

void check_same(const Layout& a, const Layout& b, const char* operation) {
    require(
        a.images == b.images && a.channels == b.channels && a.height == b.height && a.width == b.width,
        std::string(operation) + ": shapes " + shape(a) + " and " + shape(b) + " differ"
    );
}

void check_choice(const char* name, int value, int last) {
    require(value >= 0 && value <= last, std::string(name) + " " + std::to_string(value) + " does not exist");
}

// `ceil`: the output may be larger by one, as with ceil_mode of pooling. Returns the window, with stride 1 where an
// output of one pixel makes the stride meaningless: the kernels need memory for each pixel of a stride.
SparingWindow check_window(const Layout& in, const Layout& out, SparingWindow w, bool ceil, const char* operation) {
    check_size("kernel height", w.kernel_y);
    check_size("kernel width", w.kernel_x);
    check_size("stride", w.stride_y);
    check_size("stride", w.stride_x);
    check_size("dilation", w.dilation_y);
    check_size("dilation", w.dilation_x);
    check_size("padding", w.padding_y, 0);
    check_size("padding", w.padding_x, 0);
    const auto fits = [&](int64_t size, int64_t padding, int64_t kernel, int64_t dilation, int64_t stride, int64_t got) {
        const int64_t rest = size + 2 * padding - (kernel - 1) * dilation - 1;
        const int64_t expected = rest < 0 ? 0 : rest / stride + 1;
        return expected >= 1 && (got == expected || (ceil && got == expected + 1));
    };
    require(
        in.images == out.images && fits(in.height, w.padding_y, w.kernel_y, w.dilation_y, w.stride_y, out.height) &&
            fits(in.width, w.padding_x, w.kernel_x, w.dilation_x, w.stride_x, out.width),
        std::string(operation) + ": output " + shape(out) + " does not follow from input " + shape(in)
    );
    if (out.height == 1) w.stride_y = 1;
    if (out.width == 1) w.stride_x = 1;
    return w;
}

Csr read_csr(int64_t rows, int64_t width, const int32_t* starts, const int32_t* columns, const float* values) {
    require(starts[0] == 0, "the first row of a sparse weight must start at 0");
    for (int64_t row = 0; row < rows; row++)
        require(starts[row] <= starts[row + 1], "the rows of a sparse weight must follow one another");
    for (int64_t row = 0; row < rows; row++)
        for (int32_t j = starts[row]; j < starts[row + 1]; j++)
            require(
                columns[j] >= 0 && columns[j] < width && (j == starts[row] || columns[j - 1] < columns[j]),
                "column " + std::to_string(columns[j]) + " of a sparse weight with " + std::to_string(width) +
                    " columns is not in range or not in order"
            );
    return {{starts, starts + rows + 1}, {columns, columns + starts[rows]}, {values, values + starts[rows]}};
}

std::vector<float> copy(const float* from, int64_t count) {
    return from ? std::vector<float>(from, from + count) : std::vector<float>();
}

}  // namespace

const char* sparing_error() { return message.c_str(); }

int sparing_lanes() { return LANES; }

SparingPlan* sparing_plan(int threads) {
    SparingPlan* plan = nullptr;
    attempt([&] {
        require(threads >= 1 && threads <= 1024, "threads must be between 1 and 1024, got " + std::to_string(threads));
        plan = new SparingPlan(threads);
        return 0;
    });
    return plan;
}

void sparing_free(SparingPlan* plan) { delete plan; }

int sparing_tensor(SparingPlan* plan, int64_t images, int64_t channels, int64_t height, int64_t width) {
    return attempt([&] {
        const Layout layout{images, channels, height, width};
        for (const int64_t size : {images, channels, height, width}) check_size("every size of a tensor", size);
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
        const SparingWindow w = check_window(from, to, *window, false, "convolution");
        check_choice("activation", activation, HARDSIGMOID);
        if (residual >= 0) check_same(plan->layout(residual), to, "residual of a convolution");
        require(to.channels <= UINT16_MAX, "a convolution may have at most 65535 filters");
        const int64_t taps = w.kernel_y * w.kernel_x;
        require(taps <= UINT16_MAX, "a kernel may have at most 65535 elements, got " + std::to_string(taps));
        const int64_t width = from.channels * taps;
        check_size("the number of weights of a filter", width);
        Csr weight = read_csr(to.channels, width, starts, columns, values);
        const bool matrix = from.images == 1 && from.height == 1 && from.width == to.width && width == from.channels &&
                            w.padding_y == 0 && w.padding_x == 0;
        if (matrix && from.width <= FEW && width <= UINT16_MAX)
            plan->add(std::make_unique<Rows>(in, out, residual, std::move(weight), copy(bias, to.channels), activation));
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
        const SparingWindow w = check_window(from, to, *window, false, "depthwise convolution");
        check_choice("activation", activation, HARDSIGMOID);
        require(from.channels == to.channels, "a depthwise convolution keeps the number of channels");
        const int64_t taps = w.kernel_y * w.kernel_x;
        check_size("the size of a window", taps);
        check_size("the number of weights of a depthwise convolution", from.channels * taps);
        plan->add(std::make_unique<Depthwise>(
            in, out, w, copy(weight, from.channels * taps), copy(bias, from.channels), activation
        ));
        return 0;
    });
}

int sparing_pool(SparingPlan* plan, int in, int out, const SparingWindow* window, int kind) {
    return attempt([&] {
        const Layout &from = plan->layout(in), &to = plan->layout(out);
        check_choice("pooling", kind, AVERAGE_WITHOUT_PADDING);
        const SparingWindow w = check_window(from, to, *window, kind == MAXIMUM, "pooling");
        require(from.channels == to.channels, "pooling keeps the number of channels");
        check_size("the size of a window", w.kernel_y * w.kernel_x);
        plan->add(std::make_unique<Pool>(in, out, w, kind));
        return 0;
    });
}

int sparing_mean(SparingPlan* plan, int in, int out) {
    return attempt([&] {
        const Layout &from = plan->layout(in), &to = plan->layout(out);
        check_same({1, from.channels, 1, from.images}, to, "mean");
        plan->add(std::make_unique<Mean>(in, out));
        return 0;
    });
}

int sparing_affine(SparingPlan* plan, int in, int out, const float* scale, const float* bias, int activation) {
    return attempt([&] {
        const Layout &from = plan->layout(in), &to = plan->layout(out);
        check_same(from, to, "affine");
        check_choice("activation", activation, HARDSIGMOID);
        plan->add(std::make_unique<Affine>(in, out, copy(scale, from.channels), copy(bias, from.channels), activation));
        return 0;
    });
}

int sparing_binary(SparingPlan* plan, int a, int b, int out, int kind, int activation) {
    return attempt([&] {
        const Layout &first = plan->layout(a), &second = plan->layout(b), &to = plan->layout(out);
        check_same(first, to, "binary operation");
        const bool gate = second.images == 1 && second.height == 1 && second.width == first.images &&
                          second.channels == first.channels;
        if (!gate) check_same(first, second, "binary operation");
        check_choice("binary operation", kind, MULTIPLY);
        check_choice("activation", activation, HARDSIGMOID);
        plan->add(std::make_unique<Binary>(a, b, out, kind, activation));
        return 0;
    });
}

int sparing_copy(SparingPlan* plan, int in, int64_t in_first, int out, int64_t out_first, int64_t channels) {
    return attempt([&] {
        Layout from = plan->layout(in), to = plan->layout(out);
        check_size("the number of channels", channels);
        check_size("the first channel", in_first, 0);
        check_size("the first channel", out_first, 0);
        require(
            in_first + channels <= from.channels && out_first + channels <= to.channels,
            "copy: channels out of range of " + shape(from) + " or " + shape(to)
        );
        from.channels = to.channels;
        check_same(from, to, "copy");
        plan->add(std::make_unique<Copy>(in, in_first, out, out_first, channels), true);
        return 0;
    });
}

int sparing_layer_norm(
    SparingPlan* plan, int in, int out, const float* weight, const float* bias, float epsilon
) {
    return attempt([&] {
        const Layout &from = plan->layout(in), &to = plan->layout(out);
        check_same(from, to, "layer norm");
        plan->add(std::make_unique<LayerNorm>(in, out, copy(weight, from.channels), copy(bias, from.channels), epsilon));
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
        check_choice("operation", index, sparing_operations(plan) - 1);
        name = plan->operations()[index]->name();
        return 0;
    });
    return name;
}

double sparing_seconds(SparingPlan* plan, int index) {
    return attempt([&] {
        check_choice("operation", index, sparing_operations(plan) - 1);
        return plan->seconds(index);
    });
}
