// C interface of the engine: build a plan from operations on tensors, then run it.
//
// All arguments are checked; pointers must have the length that is stated. A function that fails returns -1 (or null),
// and sparing_error() returns the message.
#pragma once

#include <cstdint>

struct SparingPlan;

// The threads of OpenMP in this process: GOMP_parallel and omp_get_thread_num.
struct SparingOpenmp {
    void (*parallel)(void (*task)(void*), void* argument, unsigned threads, unsigned flags);
    int (*thread)();
};

struct SparingWindow {
    int64_t kernel_y, kernel_x, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
};

// The numbers are the order of ACTIVATIONS in operations.py.
enum SparingActivation { IDENTITY, RELU, RELU6, GELU, GELU_TANH, SILU, SIGMOID, TANH, HARDSWISH, HARDSIGMOID };
enum SparingPool { MAXIMUM, AVERAGE, AVERAGE_WITHOUT_PADDING };
enum SparingBinary { ADD, MULTIPLY };

#define SPARING_API extern "C" __attribute__((visibility("default")))

SPARING_API const char* sparing_error();  // message of the last failure in this thread
SPARING_API int sparing_lanes();

// A plan runs on threads of its own, or on those of OpenMP if that is not null.
SPARING_API SparingPlan* sparing_plan(int threads, const SparingOpenmp*);
SPARING_API void sparing_free(SparingPlan*);

// Add a tensor of images [images, channels, height, width]. A matrix [rows, columns] has images = 1, channels =
// columns, height = 1, width = rows. Returns the number of the tensor.
SPARING_API int sparing_tensor(SparingPlan*, int64_t images, int64_t channels, int64_t height, int64_t width);

// Connect the next pointer of sparing_run to a tensor: inputs are copied from it, outputs to it. It is contiguous float32
// [images, channels, height, width], or [images, height, width, channels] if channels_last: for a matrix, [rows, columns].
SPARING_API int sparing_input(SparingPlan*, int tensor, int channels_last);
SPARING_API int sparing_output(SparingPlan*, int tensor, int channels_last);

// out = activation(sparse convolution(in) + bias + residual). Row f of the weight, in CSR format, has the nonzero values
// of filter f; column = (channel * kernel_y + y) * kernel_x + x, ascending. starts: [filters + 1]. bias: [filters].
// residual: a tensor of the shape of out, or -1. Grouped convolutions and Linear layers are written this way, too.
SPARING_API int sparing_convolution(
    SparingPlan*, int in, int out, int residual, const SparingWindow*, const int32_t* starts, const int32_t* columns,
    const float* values, const float* bias, int activation
);
// weight: [channels, kernel_y, kernel_x], bias: [channels].
SPARING_API int sparing_depthwise(
    SparingPlan*, int in, int out, const SparingWindow*, const float* weight, const float* bias, int activation
);
SPARING_API int sparing_pool(SparingPlan*, int in, int out, const SparingWindow*, int kind);
// Average of each channel of each image: [N, C, H, W] to a matrix [N, C].
SPARING_API int sparing_mean(SparingPlan*, int in, int out);
// out = activation(in * scale + bias), per channel. scale and bias may be null.
SPARING_API int sparing_affine(
    SparingPlan*, int in, int out, const float* scale, const float* bias, int activation
);
// out = activation(a + b) or activation(a * b). b has the shape of a, or is a matrix [N, C], one number per channel.
SPARING_API int sparing_binary(SparingPlan*, int a, int b, int out, int kind, int activation);
// Copy channels [in_first, in_first + channels) of in to out, from its channel out_first on: concatenation and slices.
SPARING_API int sparing_copy(SparingPlan*, int in, int64_t in_first, int out, int64_t out_first, int64_t channels);
// Normalize each position over its channels. weight and bias: [channels]. Unless centered, the mean is taken as 0.
SPARING_API int sparing_layer_norm(
    SparingPlan*, int in, int out, const float* weight, const float* bias, float epsilon, int centered
);

// out = softmax(scale * query . key + mask) . value for each head. Head h of the query has the channels from first[0] +
// h * stride[0] on, the key those from first[1] + h * stride[1] on, the value from first[2] + h * stride[2] on. All are
// matrices [samples * tokens, columns]; out: [samples * queries, heads * channels of a value]. channels: of a head in
// query and key. mask: a matrix [samples * mask_heads * mask_queries, keys] or -1; mask_heads is 1 or heads,
// mask_queries is 1 or queries. causal: query i sees the keys 0 to i. tokens_first: all but the mask have the rows
// [tokens * samples] in place of [samples * tokens]. shared: successive heads of the query that share one of key and value.
// cosine and sine: [keys, channels] or null. With them, query and key x of a token are x * cosine + [-second half of x,
// first half of x] * sine.
SPARING_API int sparing_attention(
    SparingPlan*, int query, int key, int value, int mask, int out, const int64_t* first, const int64_t* stride,
    int64_t heads, int64_t channels, int64_t queries, int64_t keys, float scale, int causal,
    int tokens_first, int64_t mask_heads, int64_t mask_queries, int64_t shared, const float* cosine, const float* sine
);

// Choose layouts and memory. No operation can be added after it.
SPARING_API int sparing_finish(SparingPlan*);
// Memory of all tensors of a finished plan, in bytes, or -1.
SPARING_API int64_t sparing_bytes(SparingPlan*);
// Run the plan. One call at a time.
SPARING_API int sparing_run(SparingPlan*, const float* const* inputs, float* const* outputs);

// Profile: number of operations, their names, and the seconds of the last run of each (0 unless profiling is on).
SPARING_API int sparing_profile(SparingPlan*, int on);
SPARING_API int sparing_operations(SparingPlan*);
SPARING_API const char* sparing_operation(SparingPlan*, int index);
SPARING_API double sparing_seconds(SparingPlan*, int index);  // or -1
