/* The kernels of layers.c for one LEVEL. */

#include "lanes.h"

#define floats AT_LEVEL(floats)
#define get AT_LEVEL(get)
#define get_some AT_LEVEL(get_some)
#define put AT_LEVEL(put)
#define fused AT_LEVEL(fused)
#define all AT_LEVEL(all)
#define clamped AT_LEVEL(clamped)
#define exponential AT_LEVEL(exponential)
#define exponential_of AT_LEVEL(exponential_of)
#define one_and_exponential AT_LEVEL(one_and_exponential)
#define active AT_LEVEL(active)
#define activation AT_LEVEL(activation)
#define sum_of_products AT_LEVEL(sum_of_products)
#define inverse_rms AT_LEVEL(inverse_rms)
#define larger AT_LEVEL(larger)
#define sum_of_parts AT_LEVEL(sum_of_parts)
#define gate_rows AT_LEVEL(gate_rows)
#define gate_backward_rows AT_LEVEL(gate_backward_rows)

typedef float floats __attribute__((vector_size(4 * LANES)));

INLINE floats get(const float *from)
{
    floats v;
    memcpy(&v, from, sizeof v);
    return v;
}

/* The first `count` of a vector's values, and zeros */
INLINE floats get_some(const float *from, int64_t count)
{
    floats v = {0};
    memcpy(&v, from, sizeof(float) * (size_t)count);
    return v;
}

INLINE void put(float *to, floats v)
{
    memcpy(to, &v, sizeof v);
}

/* a·b + c, rounded once where there is an instruction for it */
INLINE floats fused(floats a, floats b, floats c)
{
#if LEVEL == 2
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LEVEL == 1
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

INLINE floats all(float x)
{
    return (floats){0} + x;
}

/* x in [low, high]; NaN remains NaN */
INLINE floats clamped(floats x, float low, float high)
{
    const floats lowest = all(low), highest = all(high);
#if LEVEL == 2
    return (floats)_mm512_max_ps((__m512)lowest, _mm512_min_ps((__m512)highest, (__m512)x));
#elif LEVEL == 1
    return (floats)_mm256_max_ps((__m256)lowest, _mm256_min_ps((__m256)highest, (__m256)x));
#elif defined(__SSE2__) && HETRAIN_X86
    return (floats)_mm_max_ps((__m128)lowest, _mm_min_ps((__m128)highest, (__m128)x));
#else
    const ints above = (ints)(x > highest), below = (ints)(x < lowest);
    return (floats)((above & (ints)highest) | (below & (ints)lowest) | (~(above | below) & (ints)x));
#endif
}

/* ---- Norms ---- */

INLINE float sum_of_parts(float *parts)
{
    for (int64_t half = SUMS / 2; half; half /= 2)
        for (int64_t k = 0; k < half; k++)
            parts[k] += parts[k + half];
    return parts[0];
}

/* sum of a∘b, or of w∘a∘b */
INLINE float sum_of_products(const float *a, const float *b, const float *w, int64_t width)
{
    floats sums[SUMS / LANES] = {{0}};
    float parts[SUMS];
    int64_t i = 0;
    for (; i + SUMS <= width; i += SUMS)
        for (int64_t k = 0; k < SUMS / LANES; k++) {
            const int64_t at = i + k * LANES;
            sums[k] += w ? get(w + at) * get(a + at) * get(b + at) : get(a + at) * get(b + at);
        }
    memcpy(parts, sums, sizeof parts);
    for (int64_t k = 0; i + k < width; k++)
        parts[k] += w ? w[i + k] * a[i + k] * b[i + k] : a[i + k] * b[i + k];
    return sum_of_parts(parts);
}

INLINE float inverse_rms(const float *x, int64_t width, float epsilon)
{
    return 1.0f / sqrtf(sum_of_products(x, x, NULL, width) / (float)width + epsilon);
}

static void AT_LEVEL(rms_norm)(const rms_norm_arguments *a)
{
    const float *const w = a->weight;
    for (int64_t row = 0; row < a->rows; row++) {
        const float *const x = a->x + row * a->x_stride, r = inverse_rms(x, a->width, a->epsilon);
        float *const y = a->y + row * a->width;
        int64_t i = 0;
        for (; i + LANES <= a->width; i += LANES)
            put(y + i, get(w + i) * (get(x + i) * r));
        for (; i < a->width; i++)
            y[i] = w[i] * (x[i] * r);
    }
}

static void AT_LEVEL(rms_norm_backward)(const rms_norm_backward_arguments *a)
{
    const float *const w = a->weight;
    for (int64_t row = 0; row < a->rows; row++) {
        const float *const x = a->x + row * a->x_stride, *const dy = a->dy + row * a->dy_stride;
        const float r = inverse_rms(x, a->width, a->epsilon);
        const float mean = sum_of_products(dy, x, w, a->width) / (float)a->width * r;
        float *const dx = a->dx + row * a->width;
        int64_t i = 0;
        for (; i + LANES <= a->width; i += LANES)
            put(dx + i, (get(w + i) * get(dy + i) - get(x + i) * r * mean) * r);
        for (; i < a->width; i++)
            dx[i] = (w[i] * dy[i] - x[i] * r * mean) * r;
    }
}

/* ---- Gates ---- */

#define LARGEST_GATE 64.0f /* beyond, p(g) is so far from 0 that sigmoid(p(g)) is 0 or 1 */

typedef struct {
    floats mantissa, power;
} exponential;

/* e^t = 2^n·e^r, |r| ≤ ln(2)/2, with Taylor's polynomial of degree 6 for e^r, which is within 2e-7. No less than e^-87;
 * infinite from 88.4 on. */
INLINE exponential exponential_of(floats t)
{
    const float to_integer = 12582912.0f; /* 1.5·2^23: what is added to it is rounded to an integer, in the low bits */
    const floats bounded = clamped(t, -87.0f, 89.0f); /* n from -126, of a normal number, to 128, of infinity */
    const floats shifted = fused(bounded, all(1.44269504f), all(to_integer)), n = shifted - to_integer;
    /* n·ln(2) in two parts, the first of them exact */
    const floats r = fused(n, all(2.12194440e-4f), fused(n, all(-0.693359375f), bounded));
    floats e = fused(r, all(1.0f / 720), all(1.0f / 120));
    e = fused(e, r, all(1.0f / 24));
    e = fused(e, r, all(1.0f / 6));
    e = fused(e, r, all(0.5f));
    e = fused(e, r, all(1.0f));
    e = fused(e, r, all(1.0f));
    return (exponential){e, (floats)(((words)shifted + 127) << 23)};
}

/* 1 + e^t, within 1e-6 of it */
INLINE floats one_and_exponential(floats t)
{
    const exponential e = exponential_of(t);
    return fused(e.mantissa, e.power, all(1.0f));
}

typedef struct {
    floats value, slope;
} active;

/* act(g) = g·s and act'(g) = s + g·s·((1 - s)·p'(g)) with s = sigmoid(p(g)): in this order nothing overflows. */
INLINE active activation(floats g, int64_t is_gelu)
{
    if (!is_gelu) {
        const floats s = 1.0f / one_and_exponential(-g), value = g * s;
        return (active){value, fused(value, 1.0f - s, s)};
    }
    const floats x = clamped(g, -LARGEST_GATE, LARGEST_GATE); /* cubes of others could overflow */
    const floats curve = x * x * (GELU_LINEAR * GELU_CUBIC);
    const floats s = 1.0f / one_and_exponential(-x * (curve + GELU_LINEAR)), value = g * s;
    return (active){value, fused(value, (1.0f - s) * (3.0f * curve + GELU_LINEAR), s)};
}

INLINE void gate_rows(const gate_arguments *a, int64_t is_gelu)
{
    const int64_t width = a->width, rest = width % LANES, whole = width - rest;
    for (int64_t row = 0; row < a->rows; row++) {
        const float *const g = a->g + row * a->g_stride, *const u = a->u + row * a->u_stride;
        float *const y = a->y + row * width;
        for (int64_t i = 0; i < whole; i += LANES)
            put(y + i, activation(get(g + i), is_gelu).value * get(u + i));
        if (rest) {
            const floats v = activation(get_some(g + whole, rest), is_gelu).value * get_some(u + whole, rest);
            memcpy(y + whole, &v, sizeof(float) * (size_t)rest);
        }
    }
}

static void AT_LEVEL(gate)(const gate_arguments *a)
{
    if (a->is_gelu)
        gate_rows(a, 1);
    else
        gate_rows(a, 0);
}

INLINE void gate_backward_rows(const gate_backward_arguments *a, int64_t is_gelu)
{
    const int64_t width = a->width, rest = width % LANES, whole = width - rest;
    for (int64_t row = 0; row < a->rows; row++) {
        const float *const g = a->g + row * a->g_stride, *const u = a->u + row * a->u_stride;
        const float *const dy = a->dy + row * a->dy_stride;
        float *const dg = a->both + 2 * row * width, *const du = dg + width;
        for (int64_t i = 0; i < whole; i += LANES) {
            const active act = activation(get(g + i), is_gelu);
            const floats d = get(dy + i);
            put(dg + i, d * get(u + i) * act.slope);
            put(du + i, d * act.value);
        }
        if (rest) {
            const active act = activation(get_some(g + whole, rest), is_gelu);
            const floats d = get_some(dy + whole, rest), right = d * act.value;
            const floats left = d * get_some(u + whole, rest) * act.slope;
            memcpy(dg + whole, &left, sizeof(float) * (size_t)rest);
            memcpy(du + whole, &right, sizeof(float) * (size_t)rest);
        }
    }
}

static void AT_LEVEL(gate_backward)(const gate_backward_arguments *a)
{
    if (a->is_gelu)
        gate_backward_rows(a, 1);
    else
        gate_backward_rows(a, 0);
}

/* ---- Softmax ---- */

INLINE floats larger(floats a, floats b)
{
    const ints above = (ints)(a > b);
    return (floats)((above & (ints)a) | (~above & (ints)b));
}

static void AT_LEVEL(exponentials)(const exponentials_arguments *a)
{
    const int64_t rest = a->width % LANES, whole = a->width - rest;
    for (int64_t row = 0; row < a->rows; row++) {
        float *const z = a->z + row * a->z_stride;
        floats highest = all(z[0]), sums = all(0.0f);
        for (int64_t i = 0; i < whole; i += LANES)
            highest = larger(get(z + i), highest);
        float largest = z[0], sum = 0.0f;
        for (int64_t k = 0; k < LANES; k++)
            largest = highest[k] > largest ? highest[k] : largest;
        for (int64_t i = whole; i < a->width; i++)
            largest = z[i] > largest ? z[i] : largest;
        for (int64_t i = 0; i < whole; i += LANES) {
            const exponential e = exponential_of(get(z + i) - largest);
            const floats value = e.mantissa * e.power;
            put(z + i, value);
            sums += value;
        }
        if (rest) {
            const exponential e = exponential_of(get_some(z + whole, rest) - largest);
            const floats value = e.mantissa * e.power;
            memcpy(z + whole, &value, sizeof(float) * (size_t)rest);
            for (int64_t k = 0; k < rest; k++)
                sum += value[k];
        }
        for (int64_t k = 0; k < LANES; k++)
            sum += sums[k];
        a->largest[row] = largest;
        a->sums[row] = sum;
    }
}
