/* The kernels of ring.c for one LEVEL. */

#include "lanes.h"

#define floats AT_LEVEL(floats)
#define longs AT_LEVEL(longs)
#define masks_of AT_LEVEL(masks_of)
#define ahead AT_LEVEL(ahead)
#define prefetch AT_LEVEL(prefetch)
#define butterfly AT_LEVEL(butterfly)
#define radix_four AT_LEVEL(radix_four)
#define masked_product AT_LEVEL(masked_product)
#define product_quarter AT_LEVEL(product_quarter)
#define last_stages AT_LEVEL(last_stages)
#define larger AT_LEVEL(larger)
#define noise_of AT_LEVEL(noise_of)
#define message_of AT_LEVEL(message_of)
#define store_digits AT_LEVEL(store_digits)
#define sealing AT_LEVEL(sealing)
#define opening AT_LEVEL(opening)
#define write_rows AT_LEVEL(write_rows)
#define encrypt_lanes AT_LEVEL(encrypt_lanes)
#define decrypt_lanes AT_LEVEL(decrypt_lanes)
#define load_bytes AT_LEVEL(load_bytes)
#define unpack_group AT_LEVEL(unpack_group)

typedef float floats __attribute__((vector_size(4 * LANES)));

/* ---- The inverse transform: Gentleman and Sande, from bit-reversed order, values lazily in [0, 2q) ---- */

INLINE void butterfly(words *a, words *b, uint32_t w, uint32_t companion)
{
    const words sum = *a + *b, difference = *a - *b + 2 * Q;
    *a = reduced(sum, 2 * Q);
    *b = product(difference, w, companion);
}

/* Two stages over z[0], z[step], z[2·step], z[3·step]; `pair`, `single`: indices of their constants. */
INLINE void radix_four(words v[4], const roots *r, int64_t pair, int64_t single)
{
    const uint32_t *w = r->inverse, *c = r->inverse_companions;
    butterfly(&v[0], &v[1], w[pair], c[pair]);
    butterfly(&v[2], &v[3], w[pair + 1], c[pair + 1]);
    butterfly(&v[0], &v[2], w[single], c[single]);
    butterfly(&v[1], &v[3], w[single], c[single]);
}

/* Point i of sum_r mask_r·s_r */
INLINE words masked_product(const uint32_t *masks, const spectrum *s, int64_t i, int64_t rank)
{
    const int64_t degree = s->roots->degree;
    words sum = product(load(masks + BLOCK * i), s->values[i], s->companions[i]);
    for (int64_t r = 1; r < rank; r++) {
        i += degree;
        sum = reduced(sum + product(load(masks + BLOCK * i), s->values[i], s->companions[i]), 2 * Q);
    }
    return sum;
}

/* Rows that the last stages will read, a page apart: asked for while the first ones compute. */
typedef struct {
    const char *start;
    int64_t stride, rows;
} ahead;

INLINE void prefetch(ahead a, int64_t row)
{
    __builtin_prefetch(a.start + least(row, a.rows - 1) * a.stride, 0, 2);
}

/* All stages but the last two of masks·s, over points base .. base + N/4, which stay in the innermost cache. */
INLINE void product_quarter(words *z, const uint32_t *masks, const spectrum *s, int64_t base, int64_t rank,
                            ahead next)
{
    const roots *r = s->roots;
    const int64_t degree = r->degree, count = degree / 4;
    for (int64_t i = base; i < base + count; i += 4) {
        words v[4];
        for (int64_t k = 0; k < 4; k++)
            v[k] = masked_product(masks, s, i + k, rank), prefetch(next, i + k);
        radix_four(v, r, (degree + i) / 2, (degree + i) / 4);
        for (int64_t k = 0; k < 4; k++)
            z[i + k] = v[k];
    }
    int64_t step = 4;
    for (; 4 * step <= count; step *= 4)
        for (int64_t start = base; start < base + count; start += 4 * step) {
            const int64_t single = (degree + start) / (4 * step), pair = 2 * single;
            for (words *at = z + start; at < z + start + step; at++) {
                words v[4] = {at[0], at[step], at[2 * step], at[3 * step]};
                radix_four(v, r, pair, single);
                for (int64_t k = 0; k < 4; k++)
                    at[k * step] = v[k];
            }
        }
    if (step < count)
        for (words *at = z + base; at < z + base + step; at++) {
            const int64_t i = (degree + base) / (2 * step);
            butterfly(at, at + step, r->inverse[i], r->inverse_companions[i]);
        }
}

/* Coefficients j, j + N/4, j + N/2, j + 3N/4 of the product */
INLINE void last_stages(words v[4], const words *z, const roots *r, int64_t j)
{
    for (int64_t k = 0; k < 4; k++)
        v[k] = z[j + k * (r->degree / 4)];
    radix_four(v, r, 2, 1);
}

/* ---- Norms ---- */

INLINE words larger(words a, words b)
{
#if LEVEL == 2
    return (words)_mm512_max_epu32((__m512i)a, (__m512i)b);
#elif LEVEL == 1
    return (words)_mm256_max_epu32((__m256i)a, (__m256i)b);
#else
    const words above = (words)(a > b);
    return (a & above) | (b & ~above);
#endif
}

/* Sizes are compared by their bits: in that order NaN is the largest. */
static void AT_LEVEL(token_norms)(const token_norms_arguments *a)
{
    const uint32_t size = 0x7fffffff;
    for (int64_t token = 0; token < a->tokens; token++) {
        const float *const x = a->x + token * a->features, *const columns = a->columns;
        words tops[SUMS / LANES] = {{0}};
        floats sums[SUMS / LANES] = {{0}};
        uint32_t top[SUMS], largest = 0;
        float sum[SUMS];
        int64_t i = 0;
        for (; i + SUMS <= a->features; i += SUMS)
            for (int64_t k = 0; k < SUMS / LANES; k++) {
                const int64_t at = i + k * LANES;
                const floats value = (floats)load(x + at) * (floats)load(columns + at);
                tops[k] = larger(tops[k], (words)value & size);
                sums[k] += value * value;
            }
        memcpy(top, tops, sizeof top);
        memcpy(sum, sums, sizeof sum);
        for (int64_t k = 0; i + k < a->features; k++) {
            const float value = x[i + k] * columns[i + k];
            uint32_t bits;
            memcpy(&bits, &value, sizeof bits);
            bits &= size;
            top[k] = top[k] > bits ? top[k] : bits;
            sum[k] += value * value;
        }
        for (int64_t half = SUMS / 2; half; half /= 2)
            for (int64_t k = 0; k < half; k++)
                sum[k] += sum[k + half];
        for (int64_t k = 0; k < SUMS; k++)
            largest = largest > top[k] ? largest : top[k];
        memcpy(a->largest + token, &largest, sizeof largest);
        a->squares[token] = sum[0];
    }
}

/* ---- Encryption ---- */

/* Centred binomial, eta = 8: ones of each word's low byte minus ones of its high byte. */
INLINE ints noise_of(const uint16_t *stream)
{
    shorts x;
    memcpy(&x, stream, sizeof x);
#if LEVEL == 2
    const __m256i low = _mm256_set1_epi8(15), nibbles = (__m256i)x, of = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m256i ones = _mm256_add_epi8(_mm256_shuffle_epi8(of, _mm256_and_si256(nibbles, low)),
        _mm256_shuffle_epi8(of, _mm256_and_si256(_mm256_srli_epi16(nibbles, 4), low)));
    return (ints)_mm512_cvtepi16_epi32(_mm256_maddubs_epi16(ones, _mm256_set1_epi16((short)0xff01)));
#elif LEVEL == 1
    const __m128i low = _mm_set1_epi8(15), nibbles = (__m128i)x, of = _mm_setr_epi8(
        0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    const __m128i ones = _mm_add_epi8(_mm_shuffle_epi8(of, _mm_and_si128(nibbles, low)),
        _mm_shuffle_epi8(of, _mm_and_si128(_mm_srli_epi16(nibbles, 4), low)));
    return (ints)_mm256_cvtepi16_epi32(_mm_maddubs_epi16(ones, _mm_set1_epi16((short)0xff01)));
#else
    x -= (x >> 1) & 0x5555;
    x = (x & 0x3333) + ((x >> 2) & 0x3333);
    x = (x + (x >> 4)) & 0x0f0f;
    return __builtin_convertvector(x & 0xff, ints) - __builtin_convertvector(x >> 8, ints);
#endif
}

/* round(x·column·inverse), half to even, no further than limit from zero */
INLINE ints message_of(const float *x, floats column, float inverse, float limit)
{
    const floats scaled = (floats)load(x) * column * inverse;
#if LEVEL == 2
    const __m512 top = _mm512_set1_ps(limit), bottom = _mm512_set1_ps(-limit);
    return (ints)_mm512_cvtps_epi32(_mm512_max_ps(bottom, _mm512_min_ps(top, (__m512)scaled)));
#elif LEVEL == 1
    const __m256 top = _mm256_set1_ps(limit), bottom = _mm256_set1_ps(-limit);
    return (ints)_mm256_cvtps_epi32(_mm256_max_ps(bottom, _mm256_min_ps(top, (__m256)scaled)));
#else
    /* 1.5·2^52 leaves round(v) modulo 2^32 in the low word of a double. */
    typedef double doubles __attribute__((vector_size(8 * LANES)));
    typedef int64_t longs __attribute__((vector_size(8 * LANES)));
    const ints over = scaled > limit, under = scaled < -limit, top = (ints)((floats){0} + limit);
    const ints bits = (over & top) | (under & (top ^ INT32_MIN)) | (~(over | under) & (ints)scaled);
    const doubles shifted = __builtin_convertvector((floats)bits, doubles) + 6755399441055744.0;
    return __builtin_convertvector((longs)shifted, ints);
#endif
}

/* The low three bytes of each lane, one plane after the other */
INLINE void store_digits(int8_t *planes, int64_t stride, words v)
{
#if LEVEL == 2
    const __m512i gather = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m512i join = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i digits = _mm512_permutexvar_epi32(join, _mm512_shuffle_epi8((__m512i)v, gather));
    _mm_storeu_si128((__m128i *)planes, _mm512_castsi512_si128(digits));
    _mm_storeu_si128((__m128i *)(planes + stride), _mm512_extracti32x4_epi32(digits, 1));
    _mm_storeu_si128((__m128i *)(planes + 2 * stride), _mm512_extracti32x4_epi32(digits, 2));
#elif LEVEL == 1
    const __m256i gather = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i join = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i digits = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8((__m256i)v, gather), join);
    const __m128i first = _mm256_castsi256_si128(digits);
    _mm_storel_epi64((__m128i *)planes, first);
    _mm_storeh_pd((double *)(planes + stride), (__m128d)first);
    _mm_storel_epi64((__m128i *)(planes + 2 * stride), _mm256_extracti128_si256(digits, 1));
#else
    for (int64_t plane = 0; plane < 3; plane++)
        for (int lane = 0; lane < LANES; lane++)
            planes[plane * stride + lane] = (int8_t)(v[lane] >> (8 * plane));
#endif
}

/* LANES features: pointers at their first one, strides in elements. */
typedef struct {
    const spectrum *secret;
    const uint32_t *masks;
    const uint16_t *noise;
    const float *x, *columns, *inverse;
    int64_t tokens, x_stride;
    float limit;
    int8_t *tile; /* [3][N][TILE_FEATURES] */
} sealing;

INLINE void encrypt_lanes(const sealing *s, int64_t rank)
{
    words z[MAX_DEGREE];
    const ahead x = {(const char *)s->x, 4 * s->x_stride, s->tokens};
    const roots *r = s->secret->roots;
    const floats column = (floats)load(s->columns);
    const int64_t degree = r->degree, quarter = degree / 4;
    for (int64_t base = 0; base < degree; base += quarter)
        product_quarter(z, s->masks, s->secret, base, rank, x);
    for (int64_t j = 0; j < quarter; j++) {
        words v[4];
        last_stages(v, z, r, j);
        for (int64_t k = 0; k < 4; k++) {
            const int64_t token = j + k * quarter;
            ints added = noise_of(s->noise + BLOCK * token);
            if (token < s->tokens)
                added += message_of(s->x + token * s->x_stride, column, s->inverse[token], s->limit);
            /* b + 2^6·0x808080, which is about q/2: from (0, 3q) to [0, q) */
            const words b = v[k] + (words)added + (DIGIT_OFFSET << DROPPED_BITS);
            const words shifted = reduced(reduced(b, 2 * Q), Q);
            const words c = (shifted + (1u << (DROPPED_BITS - 1))) >> DROPPED_BITS;
            store_digits(s->tile + TILE_FEATURES * token, TILE_FEATURES * degree, c ^ DIGIT_OFFSET);
        }
    }
}

/* The first `count` bytes of each row of a tile, past the caches where they are whole lines: a plane's rows are pages apart,
 * and reading their lines before overwriting them would cost more than everything else here. */
static void write_rows(int8_t *to, int64_t stride, const int8_t *tile, int64_t rows, int64_t count)
{
    const int lines = count == TILE_FEATURES && ((uintptr_t)to | (uintptr_t)stride) % TILE_FEATURES == 0;
    for (; rows--; to += stride, tile += TILE_FEATURES) {
        if (!lines) {
            memcpy(to, tile, (size_t)count);
            continue;
        }
#if LEVEL == 2
        _mm512_stream_si512((void *)to, _mm512_load_si512(tile));
#elif LEVEL == 1
        _mm256_stream_si256((void *)to, _mm256_load_si256((const void *)tile));
        _mm256_stream_si256((void *)(to + 32), _mm256_load_si256((const void *)(tile + 32)));
#else
        memcpy(to, tile, TILE_FEATURES);
#endif
    }
}

static void AT_LEVEL(encrypt)(const encrypt_arguments *a)
{
    const int64_t degree = a->secret->roots->degree, rank = a->secret->rank;
    int8_t tile[3 * MAX_DEGREE * TILE_FEATURES] __attribute__((aligned(64)));
    float ragged[MAX_DEGREE * BLOCK], last_columns[BLOCK] = {0};
    sealing s = {
        .secret = a->secret,
        .masks = a->masks,
        .noise = a->noise,
        .inverse = a->inverse,
        .tokens = a->tokens,
        .limit = a->limit,
    };
    for (int64_t done = 0; done < a->features; done += BLOCK) {
        const int64_t features = least(BLOCK, a->features - done), in_tile = done % TILE_FEATURES;
        s.x = a->x + a->first + done, s.x_stride = a->width, s.tile = tile + in_tile;
        s.columns = a->columns + a->first + done;
        if (features < BLOCK) {
            memset(ragged, 0, sizeof ragged);
            for (int64_t token = 0; token < a->tokens; token++)
                memcpy(ragged + BLOCK * token, s.x + a->width * token, sizeof(float) * (size_t)features);
            memcpy(last_columns, s.columns, sizeof(float) * (size_t)features);
            s.x = ragged, s.x_stride = BLOCK, s.columns = last_columns;
        }
        for (int64_t lane = 0; lane < BLOCK; lane += LANES) {
            encrypt_lanes(&s, rank);
            s.masks += LANES, s.noise += LANES, s.x += LANES, s.columns += LANES, s.tile += LANES;
        }
        s.masks += BLOCK * (rank * degree - 1), s.noise += BLOCK * (degree - 1);
        if (in_tile + BLOCK == TILE_FEATURES || done + BLOCK >= a->features)
            write_rows(a->planes + a->first + done - in_tile, a->width, tile, 3 * degree, in_tile + features);
    }
#if LEVEL
    _mm_sfence();
#endif
}

/* ---- Decryption ---- */

typedef struct {
    const spectrum *secret;
    const uint32_t *hint;
    const uint16_t *u;
    const float *scales, *columns;
    int64_t tokens, u_stride, y_stride;
    float *y;
} opening;

INLINE void decrypt_lanes(const opening *o, int64_t rank)
{
    words z[MAX_DEGREE];
    const ahead u = {(const char *)o->u, 2 * o->u_stride, o->tokens};
    const roots *r = o->secret->roots;
    const floats column = (floats)load(o->columns);
    const int64_t quarter = r->degree / 4;
    for (int64_t base = 0; base < r->degree; base += quarter)
        product_quarter(z, o->hint, o->secret, base, rank, u);
    for (int64_t j = 0; j < quarter && j < o->tokens; j++) {
        words v[4];
        last_stages(v, z, r, j);
        for (int64_t k = 0; k < 4; k++) {
            const int64_t token = j + k * quarter;
            if (token >= o->tokens)
                break;
            shorts u;
            memcpy(&u, o->u + token * o->u_stride, sizeof u);
            const words switched = __builtin_convertvector(u, words) & RESULT_MASK;
            /* round(u·q / 2^14), since q = 2^30 - 49151 */
            const words b = (switched << (30 - RESULT_BITS)) - ((switched * 49151 + RESULT_MASK / 2) >> RESULT_BITS);
            const words shifted = reduced(reduced(b - v[k] + (2 * Q + HALF_Q), 2 * Q), Q);
            const floats y = __builtin_convertvector((ints)(shifted - HALF_Q), floats) * o->scales[token] * column;
            store(o->y + token * o->y_stride, (words)y);
        }
    }
}

static void AT_LEVEL(decrypt)(const decrypt_arguments *a)
{
    const int64_t rank = a->secret->rank, block_words = BLOCK * rank * a->secret->roots->degree;
    uint16_t ragged[MAX_DEGREE * BLOCK];
    float tile[MAX_DEGREE * BLOCK], last_columns[BLOCK] = {0};
    for (int64_t done = 0; done < a->features; done += BLOCK) {
        const int64_t features = least(BLOCK, a->features - done);
        const int whole = features == BLOCK;
        float *const y = a->y + a->column + done;
        opening o = {
            .secret = a->secret,
            .hint = a->hint + done / BLOCK * block_words,
            .u = a->u + a->first + done,
            .scales = a->scales,
            .columns = a->columns + a->column + done,
            .tokens = a->tokens,
            .u_stride = a->n,
            .y_stride = whole ? a->width : BLOCK,
            .y = whole ? y : tile,
        };
        if (!whole) {
            memset(ragged, 0, sizeof ragged);
            for (int64_t token = 0; token < a->tokens; token++)
                memcpy(ragged + BLOCK * token, o.u + a->n * token, sizeof(uint16_t) * (size_t)features);
            memcpy(last_columns, o.columns, sizeof(float) * (size_t)features);
            o.u = ragged, o.u_stride = BLOCK, o.columns = last_columns;
        }
        for (int64_t lane = 0; lane < BLOCK; lane += LANES) {
            decrypt_lanes(&o, rank);
            o.hint += LANES, o.u += LANES, o.columns += LANES, o.y += LANES;
        }
        for (int64_t token = 0; !whole && token < a->tokens; token++)
            memcpy(y + token * a->width, tile + BLOCK * token, sizeof(float) * (size_t)features);
    }
}

/* ---- Results as they travel ---- */

INLINE shorts load_bytes(const uint8_t *from)
{
    bytes v;
    memcpy(&v, from, sizeof v);
    return __builtin_convertvector(v, shorts);
}

INLINE void unpack_group(uint16_t *u, const uint8_t *packed)
{
    _Static_assert(RESULT_LOW_BITS == 6, "three bytes hold four times six bits");
    for (int64_t lane = 0; lane < BLOCK; lane += LANES) {
        const uint8_t *const rest = packed + GROUP_FEATURES + lane;
        const shorts x = load_bytes(rest), y = load_bytes(rest + BLOCK), z = load_bytes(rest + 2 * BLOCK);
        const shorts low[GROUP_BLOCKS] = {x & 63, x >> 6 | (y & 15) << 2, y >> 4 | (z & 3) << 4, z >> 2};
        for (int64_t block = 0; block < GROUP_BLOCKS; block++) {
            const int64_t at = BLOCK * block + lane;
            const shorts value = load_bytes(packed + at) << RESULT_LOW_BITS | low[block];
            memcpy(u + at, &value, sizeof value);
        }
    }
}

static void AT_LEVEL(unpack)(const unpack_arguments *a)
{
    const int64_t whole = a->features / GROUP_FEATURES * GROUP_FEATURES;
    const uint8_t *packed = a->packed;
    for (int64_t token = 0; token < a->tokens; token++) {
        uint16_t last[GROUP_FEATURES], *const u = a->u + token * a->stride;
        for (int64_t first = 0; first < whole; first += GROUP_FEATURES, packed += GROUP_BYTES)
            unpack_group(u + first, packed);
        if (whole < a->features) {
            unpack_group(last, packed);
            memcpy(u + whole, last, sizeof(uint16_t) * (size_t)(a->features - whole));
            packed += GROUP_BYTES;
        }
    }
}

#include "check_body.h"
