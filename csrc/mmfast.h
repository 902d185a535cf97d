// The flat C boundary of mmfast: every entry point of the native library.
//
// Rules. Every function returns a status: 0 for success, else one of the codes below with a message in
// mmfast_last_error() (thread-local). Nothing throws across this boundary. The caller allocates every buffer; a kernel
// allocates only scratch that it frees before it returns. Sizes are elements, not bytes. No pointer may be null unless
// its comment says so; outputs never alias inputs unless their comment says so. Outputs are written (`=`), not added
// to.
#pragma once
#include <stdint.h>

#define MMFAST_ABI_VERSION 7

#ifdef __cplusplus
extern "C" {
#endif

enum mmfast_status {
    MMFAST_OK = 0,
    MMFAST_INVALID_ARGUMENT = 1,
    MMFAST_OUT_OF_MEMORY = 2,
    MMFAST_CUDA_ERROR = 3,
    MMFAST_DECLINED = 4  // these values are not for this kernel: what it wrote is not to be used
};

enum mmfast_dtype { MMFAST_FLOAT32 = 0, MMFAST_FLOAT64 = 1, MMFAST_FLOAT16 = 2, MMFAST_BFLOAT16 = 3 };

// The message of the last failure in this thread; empty if there was none. Valid until the next failure here.
const char* mmfast_last_error(void);

// Instruction sets compiled in and supported by this processor, best last, as one space-separated string.
const char* mmfast_supported_isas(void);
// The instruction set in use, and a way to choose a lower one (for tests). An unknown or unsupported name is refused.
const char* mmfast_isa(void);
int mmfast_set_isa(const char* name);
// 1 on Intel's processors, on which alone Intel's libraries use the best instruction set; else 0.
int mmfast_is_intel(void);

// ---- adversarial
// A loss is a sum over K terms. Term k maps one tensor of n_k logits x to
//     value_k = weight_k * reduce_i w_i * phi_k(sign_k * (x_i - other_i) + shift_k),
// reduce being the mean (mean = 1; the mean of no elements is NaN) or the sum (mean = 0), and
// total = value_0 + ... + value_{K-1}, added in that order. TILTED is softplus(u) + tilt * u; LEAKY_SQUARE is the
// square of sign * leaky(x - other) + shift, leaky(x) = x > 0 ? x : MMFAST_ADVERSARIAL_LEAK * x. "Values' dtype" is
// float64 for float64 logits, else float32.
enum mmfast_phi {
    MMFAST_SOFTPLUS = 0,
    MMFAST_SQUARE = 1,
    MMFAST_RELU = 2,
    MMFAST_IDENTITY = 3,
    MMFAST_ABS = 4,
    MMFAST_SIGMOID = 5,
    MMFAST_RELU_SQUARE = 6,
    MMFAST_TILTED = 7,
    MMFAST_LEAKY_SQUARE = 8
};
#define MMFAST_ADVERSARIAL_LEAK 0.05

typedef struct {
    const void* logits;      // (size,) dtype, contiguous
    const void* other;       // (size,) dtype, contiguous; null: 0, or the centre
    const void* centre;      // (1,) values' dtype: one other for all logits; null: 0. Not together with other
    const void* weights;     // (size / per_weight,) values' dtype, w_i is element i / per_weight; null: 1
    const void* peer_slope;  // (1,) values' dtype: dlogits is less by dtotal * peer_slope / size; or null. May point
                             // into slopes
    // backward, and CPU forward, which gives those of dtotal = 1:
    void* dlogits;  // (size,) dtype; may alias logits; null: not wanted
    void* dother;   // (size,) dtype; may alias other; null: not wanted
    int64_t size;
    int64_t per_weight;  // at least 1
    int32_t phi;         // enum mmfast_phi
    double sign, shift, weight, tilt;
} mmfast_adversarial_term;

typedef struct {
    int32_t dtype;  // enum mmfast_dtype, of all logits
    int32_t mean;
    int64_t count;                         // K
    const mmfast_adversarial_term* terms;  // (K,), host memory
    // (K,) value of each term, values' dtype; forward only; null: not wanted
    void* values;
    // (K,) weight_k * sign_k * reduce_i w_i * phi_k'(...), values' dtype; forward only; null: not wanted
    void* slopes;
    // (K,) mean of each term's logits, values' dtype; forward only, written first, so that a term's centre may point
    // into it; null: not wanted
    void* means;
    // (1,) total in dtype; forward only
    void* total;
    // (1,) gradient of the loss with respect to total, in dtype; backward only. CPU: null is 1
    const void* dtotal;
    int32_t threads;  // CPU: at least 1
    // CUDA only: K * MMFAST_ADVERSARIAL_TERM float64, and in a forward 2 + K + 3 * sum_k ceil(n_k /
    // MMFAST_ADVERSARIAL_CHUNK) more, aligned to 16 bytes, unwritten
    void* scratch;
    void* stream;  // CUDA: the stream to launch on; null is the default stream
} mmfast_adversarial_args;

#define MMFAST_ADVERSARIAL_CHUNK 4096
#define MMFAST_ADVERSARIAL_TERM 72

int mmfast_cpu_adversarial_forward(const mmfast_adversarial_args* args);
// dlogits_k = dtotal * weight_k * w * phi_k'(sign_k * (x - other) + shift_k) * sign_k [/ n_k], rounded once;
// dother_k = -dlogits_k.
int mmfast_cpu_adversarial_backward(const mmfast_adversarial_args* args);
// The same on the current CUDA device; every pointer but args and terms is device memory. Two launches a forward and
// one a backward; while the stream is captured as many for each 450 to 1,000 terms.
int mmfast_cuda_adversarial_forward(const mmfast_adversarial_args* args);
int mmfast_cuda_adversarial_backward(const mmfast_adversarial_args* args);

// ---- conv_transpose: normalisation and activation
enum mmfast_activation {
    MMFAST_ACT_NONE = 0,
    MMFAST_ACT_RELU = 1,
    MMFAST_ACT_LEAKY_RELU = 2,
    MMFAST_ACT_TANH = 3,
    MMFAST_ACT_SIGMOID = 4,
    MMFAST_ACT_SILU = 5,
    MMFAST_ACT_GELU = 6  // z times the normal distribution function of z
};

// out = act((y - mean_c) / sqrt(var_c + eps) * weight_c + bias_c), for each of `sets` sets with moments of its own (one
// for a batch norm, one a sample for an instance norm) over its batch * size elements of channel c.
// y, out, dout, dy: (sets, batch, channels, size), or with channels_last (sets, batch, size, channels); contiguous.
// "compute dtype" is float64 for float64 tensors, else float32.
typedef struct {
    int32_t dtype;  // enum mmfast_dtype, of y, out, dout and dy
    int32_t channels_last;
    int64_t sets, batch, channels, size;  // at least 1 each
    int32_t activation;                   // enum mmfast_activation
    double negative_slope;                // of leaky relu
    int32_t measure;                      // 1: mean and var are y's own; forward writes them. 0: they are given
    double eps;
    const void* y;
    const void* weight;  // (channels,) compute dtype, or null: 1
    const void* bias;    // (channels,) compute dtype, or null: 0
    void* mean;          // (sets, channels) compute dtype
    void* var;           // (sets, channels) compute dtype; the biased variance
    void* out;           // forward only; may alias y; null: only the moments are wanted
    const void* dout;    // backward only
    void* dy;            // backward only; may alias dout
    void* dweight;       // (sets, channels) compute dtype, backward only
    void* dbias;         // (sets, channels) compute dtype, backward only
    int32_t threads;     // CPU: at least 1
    void* scratch;       // CUDA only: mmfast_cuda_normalize_scratch(args) float32, unwritten
    void* stream;        // CUDA: the stream to launch on; null is the default stream
} mmfast_normalize_args;

int mmfast_cpu_normalize_forward(const mmfast_normalize_args* args);
int mmfast_cpu_normalize_backward(const mmfast_normalize_args* args);
// The same on the current CUDA device, for float32, float16 and bfloat16: at most three launches. Every pointer is
// device memory, aligned to 16 bytes.
int64_t mmfast_cuda_normalize_scratch(const mmfast_normalize_args* args);
int mmfast_cuda_normalize_forward(const mmfast_normalize_args* args);
int mmfast_cuda_normalize_backward(const mmfast_normalize_args* args);

// out = act(y), and its gradient.
typedef struct {
    int32_t dtype;  // enum mmfast_dtype
    int32_t activation;
    double negative_slope;  // at least 0
    int64_t count;
    const void* y;     // (count,) forward: the argument; backward: the value, for silu and gelu the argument
    const void* dout;  // (count,) backward only
    void* out;         // (count,) forward: the value; backward: dout * act'; may alias y or dout
    int32_t threads;   // CPU: at least 1
    void* stream;      // CUDA: the stream to launch on; null is the default stream
} mmfast_activation_args;

int mmfast_cpu_activation_forward(const mmfast_activation_args* args);
int mmfast_cpu_activation_backward(const mmfast_activation_args* args);
int mmfast_cuda_activation_forward(const mmfast_activation_args* args);
int mmfast_cuda_activation_backward(const mmfast_activation_args* args);

// ---- conv_transpose
// y[n, o, q] = act(bias_o + sum over c, k, i with i * stride + k * dilation - before = q of weight[c, o, k] * x[n, c,
// i]) in each of three dimensions, of which the first ones may be 1, and its gradients with respect to x and weight.
typedef struct {
    int32_t dtype;  // MMFAST_FLOAT32 or MMFAST_FLOAT64, of all tensors
    int32_t x_channels_last, y_channels_last;
    int64_t batch, in_channels, out_channels;
    int64_t in_size[3], out_size[3], kernel[3], stride[3], dilation[3], before[3];
    const void* x;       // (batch, in_channels, *in_size) contiguous; of a forward that is not depthwise, or of the
                         // gather's or squares', perhaps channels last
    const void* weight;  // (in_channels, out_channels, *kernel) contiguous; depthwise (in_channels, *kernel)
    const void* bias;    // (out_channels,), or null: 0; forward only
    void* y;             // (batch, out_channels, *out_size), contiguous or channels last; backward: dy, only read
    int32_t activation;  // of the forward; the gradients are without
    double negative_slope;
    void* dx;  // (batch, in_channels, *in_size) contiguous; depthwise perhaps null: not wanted
    void*
        dweight;  // of weight's shape; depthwise each sample's share (batch, in_channels, *kernel); or null: not wanted
    int32_t threads;
} mmfast_conv_transpose_args;

// Any Cout, best few. The backward declines what is not finite: the weight for dx, what it found for dweight.
int mmfast_cpu_phases_forward(const mmfast_conv_transpose_args* args);
int mmfast_cpu_phases_backward(const mmfast_conv_transpose_args* args);
// Products of matrices, without an activation. dx: of x's layout, or null: not wanted.
int mmfast_cpu_gather_forward(const mmfast_conv_transpose_args* args);
int mmfast_cpu_gather_backward(const mmfast_conv_transpose_args* args);
// The same in fewer multiplications, in one or two dimensions, the sizes before being 1, where kernel = 2 stride
// without dilation. Declines another geometry, nothing, and a result that is not finite.
int mmfast_cpu_squares_forward(const mmfast_conv_transpose_args* args);
int mmfast_cpu_squares_backward(const mmfast_conv_transpose_args* args);
// Each output channel has an input channel of its own: in_channels = out_channels, the sum over i and k only. Declines
// what is not finite: the weight, but for dweight, and what it found for dweight.
int mmfast_cpu_depthwise_forward(const mmfast_conv_transpose_args* args);
int mmfast_cpu_depthwise_backward(const mmfast_conv_transpose_args* args);

// The transposed convolution of few output channels a group on the current CUDA device, float32, float16 or bfloat16:
//     y[n, g * group_out + c, o] = act(bias + sum of x[n, g * I + ci, i] * weight[k, g * I + ci, c] over all ci, k, i
//     with i * stride + k * dilation - before = o),  I = in_channels / groups
// and the gradients of the sum by x and weight. Three dimensions, of which the first ones may be 1. Every pointer is
// device memory, aligned to 16 bytes.
typedef struct {
    int32_t dtype;  // enum mmfast_dtype, of all tensors
    int32_t x_channels_last, y_channels_last;
    int64_t batch, in_channels, groups, group_out;  // group_out: 1 to 4
    int64_t in_size[3], out_size[3], kernel[3], stride[3], dilation[3], before[3];
    const void* x;       // (batch, in_channels, *in_size) contiguous, or channels last
    const void* weight;  // (*kernel, in_channels, group_out) contiguous
    const void* bias;    // (groups * group_out,), or null: 0; forward only
    int32_t activation;  // forward only
    double negative_slope;
    void* y;         // (batch, groups * group_out, *out_size) contiguous, or channels last; forward only
    const void* dy;  // the same; backward only
    void* dx;        // of x's layout, or null: not wanted; backward only
    void* dweight;   // of weight's layout, or null: not wanted; backward only
    void* scratch;   // mmfast_cuda_direct_scratch(args) float32, unwritten; only where dweight is wanted
    void* stream;    // null is the default stream
} mmfast_direct_args;

int64_t mmfast_cuda_direct_scratch(const mmfast_direct_args* args);
int mmfast_cuda_direct_forward(const mmfast_direct_args* args);
int mmfast_cuda_direct_backward(const mmfast_direct_args* args);

// ---- rnn
// A layer of a recurrent network over whole sequences, one or both directions. The caller has computed the input side
// gx = x W_ih^T + b_ih of every step, on a CPU with or without b_ih; the kernel walks time:
//     a = W_hh (m h') + b_hh, h' and c' the state one step before (one step after in the reverse direction)
//     RNN   h~ = phi(gx + a), phi = tanh or relu
//     GRU   r = sigmoid(gx_r + a_r), z = sigmoid(gx_z + a_z), n = tanh(gx_n + r a_n), h~ = n + z (h' - n)
//     LSTM  i, f, o = sigmoid(gx_ifo + a_ifo), g = tanh(gx_g + a_g), c = f c' + i g, h~ = u = o tanh(c),
//           with a projection h~ = W_hr u
//     h = k h' + (1 - k) h~
// m is the dropout mask, without one 1. k is the zoneout mask, without one the zoneout rate.
//
// Rows. A sequence tensor has N rows and a row belongs to one step t of one sequence b of the batch:
//     row(t, b) = offsets[t] + b                          packed (offsets not null): b < offsets[t+1] - offsets[t]
//     row(t, b) = t * B + b                               padded
// Where reset[row(t, b)] is not 0, no state passes between row(t, b) and row(t - 1, b), in neither direction; at t = 0
// the forward direction begins with zeros in the place of h0 and c0. A row past a length resets nothing.
// D = directions, H = hidden, P = proj or, where that is 0, H: the size of h; G = gates a unit (1, 3 or 4, in torch's
// order: r z n, i f g o). Every tensor is contiguous and in `dtype` unless said; state and accumulation are float32 for
// 16-bit dtypes. Direction d owns the d-th half of the columns.
//     gx, gates, dgates (N, D * G * H)   activated gates; GRU's n, LSTM's g after the tanh; not kept for RNN
//     cell (N, D * H)                    GRU: a_n; LSTM: c; RNN: h~, kept with zoneout only
//     y, dy (N, D * P)                   h, 0 past a length
//     dm (N, D * H)                      GRU: the gradient of a_n
//     dh (N, D * P)                      LSTM with a projection: the gradient of W_hr u
//     u (N, D * H)                       LSTM with a projection: o tanh(c)
//     previous (N, D * P)                m h' of each row, what W_hh was multiplied by; 0 past a length
//     h0, hn and their gradients (D, B, P); c0, cn and theirs (D, B, H)
// All of dgates, dm, dh and u are 0 past a length.
// Saved for backward: y, gates, cell. This layout is the same for the kernels of every device.
enum mmfast_rnn_mode { MMFAST_RNN_TANH = 0, MMFAST_RNN_RELU = 1, MMFAST_GRU = 2, MMFAST_LSTM = 3 };

typedef struct {
    int32_t dtype;                 // enum mmfast_dtype
    int32_t mode;                  // enum mmfast_rnn_mode
    int32_t directions;            // 1 or 2
    int64_t steps, batch, hidden;  // T, B, H
    int64_t proj;                  // P of an LSTM with a projection, else 0
    double zoneout;                // the rate k, where there is no zoneout_mask; 0: no zoneout
    const int64_t* offsets;        // (T + 1,) packed only: row of each step's first sequence; else null
    const int64_t* lengths;        // (B,) or null: T each; clamped to [0, T]; packed: null, on CUDA those of offsets
    const uint8_t* reset;          // (N,) or null: 0
    const uint8_t* zoneout_mask;   // (N, D * P) of 0 and 1, or null
    const void* dropout_mask;      // (D, B, P) or null: 1
    const void* w_hh[2];           // (G * H, P) of each direction
    const void* b_hh[2];           // (G * H,) of each direction, or null: 0
    const void* w_hr[2];           // (P, H) of each direction; null without a projection
    const void *h0, *c0;           // or null: 0
    int32_t threads;               // CPU: at least 1
    int64_t rows;                  // CUDA: N
    int32_t tf32;                  // CUDA, float32: operands of products are rounded to TF32
    void* stream;                  // CUDA; null is the default stream
} mmfast_rnn_layer;

typedef struct {
    mmfast_rnn_layer layer;
    const void* gx;
    void *gates, *cell;   // null where no backward will come or none is kept; gates may be gx
    void *y, *hn, *cn;    // cn: LSTM only
    const void* b_ih[2];  // CPU: (G * H,) of each direction, which gx lacks, or null: 0
    const void* x;        // CPU, float32 and float64: (N, I), of which the walk makes gx, then null; or null
    const void* w_ih[2];  // CPU: (G * H, I) of each direction, with x
    int64_t input;        // CPU: I, with x
} mmfast_rnn_forward_args;

int mmfast_cpu_rnn_forward(const mmfast_rnn_forward_args* args);

typedef struct {
    mmfast_rnn_layer layer;
    const void *y, *gates, *cell;
    const void *dy, *dhn, *dcn;  // or null: 0
    void *dgates, *dm;           // the gradient of gx; dm: GRU only
    void *dh, *u;                // LSTM with a projection only
    void* previous;              // or null: not wanted
    void *dh0, *dc0;             // or null: not wanted
    void *db_ih[2], *db_hh[2];   // CPU: (G * H,) of each direction, or null: not wanted
    // CPU, float32 and float64: products over all rows, each or null: the caller's, or not wanted
    const void *x, *w_ih[2];  // (N, I), (G * H, I) of each direction
    int64_t input;            // I
    void *dx, *dw_ih[2], *dw_hh[2];
} mmfast_rnn_backward_args;

// What needs the walk through time. The rest are products over all rows, the caller's or made here: dx = dgates W_ih,
// dW_ih = dgates^T x, dW_hh = dgates^T previous (GRU: its n rows by dm), dW_hr = dh^T u; on CUDA db = sums of dgates
// and dm over the rows.
int mmfast_cpu_rnn_backward(const mmfast_rnn_backward_args* args);

// The same walks on the current CUDA device, in one launch with W_hh on chip, without zoneout, dropout and projection,
// for so few units that mmfast_cuda_rnn_resident is not 0; all pointers, of offsets and lengths too, are device memory.
// float32, float16, bfloat16. gates may be gx; gates and cell are 0 past a length.
int mmfast_cuda_rnn_forward(const mmfast_rnn_forward_args* args);
int mmfast_cuda_rnn_backward(const mmfast_rnn_backward_args* args);
// How many of the walks' blocks, or clusters of blocks that share W_hh, the current device runs at once; 0 where it or
// they cannot.
int mmfast_cuda_rnn_resident(int32_t dtype, int32_t mode, int64_t hidden);

// One step forward of a Cell: h and c of the equations above without extras, from products that the caller has made or
// leaves to the kernel.
typedef struct {
    int32_t dtype;  // enum mmfast_dtype
    int32_t mode;   // enum mmfast_rnn_mode
    int64_t batch, input, hidden;
    // (B, G * H) x W_ih^T, which may hold h' W_hh^T too but for GRU, and h' W_hh^T or null: 0. gx null: both are made
    // here, float32 and float64 only
    const void *gx, *gh;
    const void *x, *w_ih, *b_ih, *w_hh, *b_hh;  // (B, I), (G * H, I), (G * H,) or null, (G * H, H), (G * H,) or null
    const void *h0, *c0;                        // (B, H) or null: 0
    void *h, *c;                                // (B, H); of an RNN h may be gx; c: LSTM only
} mmfast_rnn_cell_args;

int mmfast_cpu_rnn_cell(const mmfast_rnn_cell_args* args);

// out = a b + bias, or with add: out += a b + bias. a (M, K) and b (K, N) of any strides, one of each matrix' 1 to be
// fast. float32 and float64.
typedef struct {
    int32_t dtype;
    int64_t rows, columns, depth;  // M, N, K
    const void* a;
    int64_t a_row, a_column;  // strides
    const void* b;
    int64_t b_row, b_column;
    const void* bias;  // (N,) or null: 0
    void* out;         // (M, N), rows out_row apart; aliases nothing
    int64_t out_row;
    int32_t add;
    int32_t threads;
} mmfast_product_args;

int mmfast_cpu_product(const mmfast_product_args* args);

// One step of one direction of a layer on the current CUDA device, without zoneout, dropout and projection: the caller
// walks time and makes each step's product of matrices. The step's R rows are the first R sequences of the batch. A
// sequence tensor's pointer is that of its first row at this step and of the direction's first column; rows are the
// tensor's, D * width apart. All but steps and masks on the device. float32, float16, bfloat16; "float" is float32.
typedef struct {
    int32_t dtype, mode, directions;
    int64_t rows, hidden;    // R, H
    int64_t step;            // t
    const int64_t* lengths;  // (R,): row b has this step if t < lengths[b]; or null: all have it
    // (cuts,) of `reset`, of the rows that the walk enters this step across, cut_step being theirs: t, in the reverse
    // direction t + 1. Null: no resets. Row b is cut if b < cuts, cut[b] is not 0 and cut_step < lengths[b].
    const uint8_t* cut;
    int64_t cuts, cut_step;
    void* stream;  // null is the default stream
} mmfast_rnn_step;

typedef struct {
    mmfast_rnn_step step;
    const void* gx;
    const void* product;  // (R, G * H) W_hh h'
    const void* bias;     // (G * H,) b_hh, or null: 0
    void* h;              // (R, H) h' in, h out; rows that lack the step keep theirs
    void* exact;          // (R, H) float, the same of a GRU of a 16-bit dtype; else null
    void* c;              // (R, H) float, LSTM: c' in, c out
    void* y;
    void *gates, *cell;  // or null; gates may be gx; 0 where a row lacks the step
} mmfast_rnn_step_forward_args;

int mmfast_cuda_rnn_step_forward(const mmfast_rnn_step_forward_args* args);

// The gradient that reaches a row's h is dh, of what the walk back did before, by `product` and by dy.
typedef struct {
    mmfast_rnn_step step;
    int64_t all;          // rows that dh and dc are of: at least R and `products`
    int64_t products;     // rows of `product`
    const void* product;  // (products, H) the step's that was walked back before: delta W_hh
    const void *y, *gates, *cell;
    const void* dy;  // or null: 0
    // y and cell at the step that the forward walked before this one, where b < befores and before_step < lengths[b];
    // other rows began with h0 and c0
    int64_t befores, before_step;
    const void *y_before, *cell_before;
    const void *h0, *c0;  // (R, H) or null: 0
    void *dh, *dc;        // (all, H) float: in from the last step, out for the next one; dc: LSTM only
    void *dgates, *dm;    // dm: GRU only
    void* previous;       // or null
    void* delta;          // (R, G * H) what W_hh carries on: dgates, of a GRU's n dm, 0 where cut. Null: not wanted
} mmfast_rnn_step_backward_args;

int mmfast_cuda_rnn_step_backward(const mmfast_rnn_step_backward_args* args);

#ifdef __cplusplus
}
#endif
