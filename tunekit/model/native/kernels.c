/* Kernels for training in bfloat16 on a CPU with AVX-512: norms, gated activations and causal attention.

   Each kernel reads its inputs once, where a chain of torch's operations reads and writes them several times. Values
   are rounded to bfloat16 where that chain rounds them; sums are in float32. No sum is divided among threads, so
   results do not depend on the number of threads.
   The formulas are in the Python files that call the kernels: adapters/kernels/ and model/attention/cpu_kernel.py. */

#ifndef __AVX512F__
#error "the processor has no AVX-512"
#endif

#include <immintrin.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;
typedef struct { long start, length, first, keys; } document; /* its first token and its tokens; the same of its keys */
typedef struct { bf16 *at; long head, token; } view; /* strides, in elements, between heads and between tokens */

static inline float wide(bf16 value) {
    union { uint32_t bits; float number; } both = {(uint32_t)value << 16};
    return both.number;
}

static inline bf16 narrow(float value) { /* to the nearest, ties to even */
    union { float number; uint32_t bits; } both = {value};
    uint32_t rounded = (both.bits + 0x7fff + ((both.bits >> 16) & 1)) >> 16;
    return value != value ? 0x7fc0 : rounded;
}

static inline float rounded(float value) { return wide(narrow(value)); }

static inline float exponential(float x) { /* within 2 units in the last place up to 88; 0 below -87 */
    float power = __builtin_fmaf(x, 1.44269504f, 12582912.0f) - 12582912.0f;
    float rest = __builtin_fmaf(power, -0.693359375f, x);
    rest = __builtin_fmaf(power, 2.12194440e-4f, rest);
    float sum = 1.9875691500e-4f;
    sum = __builtin_fmaf(sum, rest, 1.3981999507e-3f);
    sum = __builtin_fmaf(sum, rest, 8.3334519073e-3f);
    sum = __builtin_fmaf(sum, rest, 4.1665795894e-2f);
    sum = __builtin_fmaf(sum, rest, 1.6666665459e-1f);
    sum = __builtin_fmaf(sum, rest, 5.0000001201e-1f);
    sum = __builtin_fmaf(sum, rest * rest, rest) + 1.0f;
    union { int32_t bits; float number; } scale = {((int32_t)power + 127) << 23};
    return x < -87.0f ? 0.0f : sum * scale.number;
}

static inline float sigmoid(float x) { return x < -88.0f ? 0.0f : 1.0f / (1.0f + exponential(-x)); }

void norm_forward(long rows, long width, const bf16 *x, const bf16 *weight, float epsilon, bf16 *y, float *scales,
                  int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        const bf16 *from = x + row * width;
        bf16 *to = y + row * width;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < width; i++) sum += wide(from[i]) * wide(from[i]);
        float scale = 1.0f / sqrtf(sum / width + epsilon);
        scales[row] = scale;
#pragma omp simd
        for (long i = 0; i < width; i++) to[i] = narrow(wide(weight[i]) * rounded(wide(from[i]) * scale));
    }
}

void norm_backward(long rows, long width, const bf16 *x, const bf16 *weight, const float *scales, const bf16 *gradient,
                   bf16 *of_x, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        const bf16 *from = x + row * width, *above = gradient + row * width;
        bf16 *to = of_x + row * width;
        float scale = scales[row], sum = 0;
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < width; i++) sum += rounded(wide(above[i]) * wide(weight[i])) * (wide(from[i]) * scale);
        float shared = sum / width;
#pragma omp simd
        for (long i = 0; i < width; i++)
            to[i] = narrow((rounded(wide(above[i]) * wide(weight[i])) - wide(from[i]) * scale * shared) * scale);
    }
}

void gated_forward(long count, const bf16 *gate, const bf16 *up, bf16 *hidden, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (long i = 0; i < count; i++) {
        float x = wide(gate[i]);
        hidden[i] = narrow(rounded(x * sigmoid(x)) * wide(up[i]));
    }
}

/* `of_hidden` is overwritten by the gradient of `up`. */
void gated_backward(long count, const bf16 *gate, const bf16 *up, bf16 *of_hidden, bf16 *of_gate, int threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
    for (long i = 0; i < count; i++) {
        float x = wide(gate[i]), share = sigmoid(x), above = wide(of_hidden[i]);
        of_gate[i] = narrow(rounded(above * wide(up[i])) * share * (1.0f + x * (1.0f - share)));
        of_hidden[i] = narrow(above * rounded(x * share));
    }
}

/* C (m, 32) (+)= A (m, k) B (k, 32), m up to ROWS. A's element (i, p) is at a[i * a_row + p * a_column]. */
#define ROWS 8
#define COLUMNS 32
static inline __attribute__((always_inline)) void tile(long m, long k, const float *a, long a_row, long a_column,
                                                       const float *b, long b_row, float *c, long c_row, int adds) {
    __m512 low[ROWS], high[ROWS];
    for (long i = 0; i < m; i++) {
        low[i] = adds ? _mm512_loadu_ps(c + i * c_row) : _mm512_setzero_ps();
        high[i] = adds ? _mm512_loadu_ps(c + i * c_row + 16) : _mm512_setzero_ps();
    }
    for (long p = 0; p < k; p++) {
        __m512 left = _mm512_loadu_ps(b + p * b_row), right = _mm512_loadu_ps(b + p * b_row + 16);
        for (long i = 0; i < m; i++) {
            __m512 factor = _mm512_set1_ps(a[i * a_row + p * a_column]);
            low[i] = _mm512_fmadd_ps(factor, left, low[i]);
            high[i] = _mm512_fmadd_ps(factor, right, high[i]);
        }
    }
    for (long i = 0; i < m; i++) {
        _mm512_storeu_ps(c + i * c_row, low[i]);
        _mm512_storeu_ps(c + i * c_row + 16, high[i]);
    }
}

/* C (m, n) (+)= A B; n a multiple of COLUMNS. */
static void multiply(long m, long n, long k, const float *a, long a_row, long a_column, const float *b, long b_row,
                     float *c, long c_row, int adds) {
    for (long j = 0; j < n; j += COLUMNS) {
        long i = 0;
        for (; i + ROWS <= m; i += ROWS)
            tile(ROWS, k, a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row, adds);
        for (; i < m; i++) tile(1, k, a + i * a_row, a_row, a_column, b + j, b_row, c + i * c_row + j, c_row, adds);
    }
}

/* (rows, width), each row `stride` after the one before, as float32, times `scale`. */
static void read_rows(long rows, long width, const bf16 *from, long stride, float scale, float *to) {
    for (long i = 0; i < rows; i++)
        for (long d = 0; d < width; d++) to[i * width + d] = wide(from[i * stride + d]) * scale;
}

/* The transpose (width, columns) of these rows; columns beyond the rows are 0. */
static void read_across(long rows, long width, const bf16 *from, long stride, float *to, long columns) {
    for (long d = 0; d < width; d++) {
        for (long i = 0; i < rows; i++) to[d * columns + i] = wide(from[i * stride + d]);
        for (long i = rows; i < columns; i++) to[d * columns + i] = 0;
    }
}

static void write_rows(long rows, long width, const float *from, float scale, bf16 *to, long stride) {
    for (long i = 0; i < rows; i++)
        for (long d = 0; d < width; d++) to[i * stride + d] = narrow(from[i * width + d] * scale);
}

#define QUERIES 32 /* rows of a block of scores */

static long padded(long count) { return (count + COLUMNS - 1) / COLUMNS * COLUMNS; }

/* Softmax of scores (rows, columns): query `row` sees the first `seen` + row keys. Receives the logarithms of the sums
   of exponentials. */
static void softmax_rows(long rows, long seen, long columns, float *scores, float *logarithms) {
    for (long row = 0; row < rows; row++) {
        float *line = scores + row * columns, largest = -INFINITY, sum = 0;
        long count = seen + row;
#pragma omp simd reduction(max : largest)
        for (long j = 0; j < count; j++) largest = line[j] > largest ? line[j] : largest;
#pragma omp simd reduction(+ : sum)
        for (long j = 0; j < count; j++) sum += line[j] = exponential(line[j] - largest);
        float factor = 1.0f / sum;
#pragma omp simd
        for (long j = 0; j < count; j++) line[j] *= factor;
        for (long j = count; j < columns; j++) line[j] = 0;
        logarithms[row] = largest + logf(sum);
    }
}

/* P and scale * dL/dS, without the scale, from scores and from dL/dP. `offsets`: sum of G * O of each query. */
static void slopes_of_rows(long rows, long seen, long columns, long width, float *scores, float *slopes,
                           const float *logarithms, const float *above, const float *outputs) {
    for (long row = 0; row < rows; row++) {
        float *line = scores + row * columns, *slope = slopes + row * columns, offset = 0;
#pragma omp simd reduction(+ : offset)
        for (long d = 0; d < width; d++) offset += above[row * width + d] * outputs[row * width + d];
#pragma omp simd
        for (long j = 0; j < seen + row; j++) {
            line[j] = exponential(line[j] - logarithms[row]);
            slope[j] = (slope[j] - offset) * line[j];
        }
        for (long j = seen + row; j < columns; j++) line[j] = slope[j] = 0;
    }
}

/* Causal attention inside each document, over heads of D numbers, D a multiple of 32. A view's `at` is a tensor of
   queries (H, T, D), of keys and values (G, U, D), or of outputs (H, T, D); logarithms: (H, T). The backward kernel
   writes the gradients of q, k and v. Both return 1 if there was no memory. */
typedef struct {
    const document *documents;
    long count, heads, groups, width, tokens;
    float scale;
    int threads;
    view q, k, v, output, gradient, of_q, of_k, of_v;
    float *logarithms;
} attention;

static bf16 *place(view tensor, long head, long token) { return tensor.at + head * tensor.head + token * tensor.token; }

static int attend_group(const attention *call, document part, long group) {
    long width = call->width, columns = padded(part.keys), shared = call->heads / call->groups;
    float *memory = malloc(sizeof(float) * (2 * columns * width + 2 * QUERIES * width + QUERIES * columns));
    if (!memory) return 1;
    float *keys = memory, *values = keys + columns * width, *queries = values + columns * width;
    float *sums = queries + QUERIES * width, *scores = sums + QUERIES * width;
    read_rows(part.keys, width, place(call->v, group, part.first), call->v.token, 1, values);
    read_across(part.keys, width, place(call->k, group, part.first), call->k.token, keys, columns);
    for (long head = group * shared; head < (group + 1) * shared; head++)
        for (long start = 0; start < part.length; start += QUERIES) {
            long rows = part.length - start < QUERIES ? part.length - start : QUERIES, token = part.start + start;
            long seen = part.keys - part.length + start + 1, last = seen + rows - 1, used = padded(last);
            read_rows(rows, width, place(call->q, head, token), call->q.token, call->scale, queries);
            multiply(rows, used, width, queries, width, 1, keys, columns, scores, used, 0);
            softmax_rows(rows, seen, used, scores, call->logarithms + head * call->tokens + token);
            multiply(rows, width, last, scores, used, 1, values, width, sums, width, 0);
            write_rows(rows, width, sums, 1, place(call->output, head, token), call->output.token);
        }
    free(memory);
    return 0;
}

static int attend_group_backward(const attention *call, document part, long group) {
    long width = call->width, columns = padded(part.keys), size = columns * width, shared = call->heads / call->groups;
    float *memory = malloc(sizeof(float) * (5 * size + 4 * QUERIES * width + 2 * QUERIES * columns));
    if (!memory) return 1;
    float *keys = memory, *keys_across = keys + size, *values_across = keys_across + size;
    float *of_keys = values_across + size, *of_values = of_keys + size, *queries = of_values + size;
    float *sums = queries + QUERIES * width, *above = sums + QUERIES * width, *outputs = above + QUERIES * width;
    float *scores = outputs + QUERIES * width, *slopes = scores + QUERIES * columns;
    read_rows(part.keys, width, place(call->k, group, part.first), call->k.token, 1, keys);
    read_across(part.keys, width, place(call->k, group, part.first), call->k.token, keys_across, columns);
    read_across(part.keys, width, place(call->v, group, part.first), call->v.token, values_across, columns);
    memset(of_keys, 0, sizeof(float) * 2 * size);
    for (long head = group * shared; head < (group + 1) * shared; head++)
        for (long start = 0; start < part.length; start += QUERIES) {
            long rows = part.length - start < QUERIES ? part.length - start : QUERIES, token = part.start + start;
            long seen = part.keys - part.length + start + 1, last = seen + rows - 1, used = padded(last);
            read_rows(rows, width, place(call->q, head, token), call->q.token, call->scale, queries);
            read_rows(rows, width, place(call->gradient, head, token), call->gradient.token, 1, above);
            read_rows(rows, width, place(call->output, head, token), call->output.token, 1, outputs);
            multiply(rows, used, width, queries, width, 1, keys_across, columns, scores, used, 0);
            multiply(rows, used, width, above, width, 1, values_across, columns, slopes, used, 0);
            slopes_of_rows(rows, seen, used, width, scores, slopes, call->logarithms + head * call->tokens + token,
                           above, outputs);
            multiply(last, width, rows, scores, 1, used, above, width, of_values, width, 1);
            multiply(last, width, rows, slopes, 1, used, queries, width, of_keys, width, 1);
            multiply(rows, width, last, slopes, used, 1, keys, width, sums, width, 0);
            write_rows(rows, width, sums, call->scale, place(call->of_q, head, token), call->of_q.token);
        }
    write_rows(part.keys, width, of_keys, 1, place(call->of_k, group, part.first), call->of_k.token);
    write_rows(part.keys, width, of_values, 1, place(call->of_v, group, part.first), call->of_v.token);
    free(memory);
    return 0;
}

static int each_group(const attention *call, int (*compute)(const attention *, document, long)) {
    int failed = 0;
#pragma omp parallel for collapse(2) num_threads(call->threads) schedule(dynamic) reduction(| : failed)
    for (long number = 0; number < call->count; number++)
        for (long group = 0; group < call->groups; group++) failed |= compute(call, call->documents[number], group);
    return failed;
}

int attention_forward(const attention *call) { return each_group(call, attend_group); }

int attention_backward(const attention *call) { return each_group(call, attend_group_backward); }
