/* The kernel of int16.c for one LEVEL. A pair is two columns' int16 in one word. */

#include "lanes.h"

#define signed_bytes AT_LEVEL(signed_bytes)
#define integers AT_LEVEL(integers)
#define pairs_of AT_LEVEL(pairs_of)
#define pack_three AT_LEVEL(pack_three)
#define pack_operand AT_LEVEL(pack_operand)
#define pack_by_rows AT_LEVEL(pack_by_rows)
#define pack_by_columns AT_LEVEL(pack_by_columns)
#define pack_weights AT_LEVEL(pack_weights)
#define dot AT_LEVEL(dot)
#define multiply_tile AT_LEVEL(multiply_tile)
#define add_some AT_LEVEL(add_some)
#define add_tile AT_LEVEL(add_tile)
#define multiply_block AT_LEVEL(multiply_block)

#undef PANEL
#define PANEL (2 * LANES) /* columns of a tile: rows of W */

typedef int8_t signed_bytes __attribute__((vector_size(LANES)));

/* ---- Packing ---- */

/* `count` integers, and zeros */
INLINE ints integers(const int8_t *from, int64_t count)
{
    int8_t some[LANES] = {0};
    if (count < LANES)
        from = memcpy(some, from, (size_t)count);
#if LEVEL == 2
    return (ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from));
#elif LEVEL == 1
    return (ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from));
#else
    signed_bytes v;
    memcpy(&v, from, sizeof v);
    return __builtin_convertvector(v, ints);
#endif
}

/* Lanes 0 and 1, 2 and 3, ... as a pair in the lower half of 64 bits */
INLINE wide pairs_of(ints v)
{
    return ((wide)v & 0xffffu) | ((wide)v >> 16 & 0xffff0000u);
}

/* The digits low and high of LANES columns: pairs at to[0] and to[1], the next columns' ROWS words later */
INLINE void pack_three(uint32_t *to, ints d0, ints d1, ints d2)
{
    const ints c = d0 + d1 * 256 + d2 * 65536, high = (c + (1 << (DIGIT_BITS - 1))) >> DIGIT_BITS;
    const wide both = pairs_of(c - high * (1 << DIGIT_BITS)) | pairs_of(high) << 32;
    for (int pair = 0; pair < LANES / 2; pair++) {
        const uint64_t digits = both[pair];
        memcpy(to + ROWS * pair, &digits, sizeof digits);
    }
}

/* [tokens of a tile][pairs][ROWS]. The last tile repeats its last token. */
static void pack_operand(const multiply_arguments *a, const block *b, uint32_t *to)
{
    const int64_t digits = a->planes - 1, group = ROWS / digits;
    for (int64_t token = 0; token < divided_up(b->tokens, group) * group; token++) {
        uint32_t *row = to + token / group * ROWS * b->pairs + token % group * digits;
        const int8_t *const d =
            a->operand + (b->token + smallest(token, b->tokens - 1)) * a->token_stride + b->column;
        for (int64_t k = 0; k < b->columns; k += LANES, row += ROWS * LANES / 2) {
            const int64_t count = b->columns - k;
            const int8_t *const at = d + k;
            pack_three(row, integers(at, count), integers(at + a->plane_stride, count),
                       integers(at + 2 * a->plane_stride, count));
            if (digits == 3) {
                const wide top = pairs_of(integers(at + 3 * a->plane_stride, count));
                for (int pair = 0; pair < LANES / 2; pair++)
                    row[ROWS * pair + 2] = (uint32_t)top[pair];
            }
        }
    }
}

/* One panel [pairs][PANEL] of W by rows. The last panel repeats its last row. */
INLINE void pack_by_rows(const int8_t *from, int64_t row_stride, int64_t rows, int64_t columns, uint32_t *to)
{
    for (int64_t row = 0; row < PANEL; row++) {
        const int8_t *const w = from + smallest(row, rows - 1) * row_stride;
        uint32_t *at = to + row;
        for (int64_t k = 0; k < columns; k += LANES, at += PANEL * LANES / 2) {
            const wide pairs = pairs_of(integers(w + k, columns - k));
            for (int pair = 0; pair < LANES / 2; pair++)
                at[PANEL * pair] = (uint32_t)pairs[pair];
        }
    }
}

/* One panel of a transposed W: rows beyond the last one are zeros. */
INLINE void pack_by_columns(const int8_t *from, int64_t column_stride, int64_t rows, int64_t columns,
                            int64_t pairs, uint32_t *to)
{
    for (int64_t pair = 0; pair < pairs; pair++, to += PANEL)
        for (int64_t row = 0; row < PANEL; row += LANES) {
            const int8_t *const w = from + 2 * pair * column_stride + row;
            const int64_t count = rows > row ? rows - row : 0;
            const ints even = integers(w, 2 * pair < columns ? count : 0);
            const ints odd = integers(w + column_stride, 2 * pair + 1 < columns ? count : 0);
            store(to + row, ((words)even & 0xffffu) | (words)odd << 16);
        }
}

static void pack_weights(const multiply_arguments *a, const block *b, uint32_t *to)
{
    for (int64_t row = 0; row < b->rows; row += PANEL, to += PANEL * b->pairs) {
        const int8_t *const from =
            a->matrix + (b->row + row) * a->row_stride + b->column * a->column_stride;
        if (a->column_stride == 1)
            pack_by_rows(from, a->row_stride, b->rows - row, b->columns, to);
        else
            pack_by_columns(from, a->column_stride, b->rows - row, b->columns, b->pairs, to);
    }
}

/* ---- Multiplying ---- */

/* sum + x0·w0 + x1·w1 of the pairs in each lane */
INLINE ints dot(ints sum, ints x, ints w)
{
#if LEVEL == 2
    return (ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#elif LEVEL == 1
    return sum + (ints)_mm256_madd_epi16((__m256i)x, (__m256i)w);
#elif defined(__SSE2__) && HETRAIN_X86
    return sum + (ints)_mm_madd_epi16((__m128i)x, (__m128i)w);
#else
    return sum + (ints)((words)x << 16) / 65536 * ((ints)((words)w << 16) / 65536) + (x >> 16) * (w >> 16);
#endif
}

static void multiply_tile(const uint32_t *x, const uint32_t *w, int64_t pairs, words sums[ROWS][2])
{
    ints sum[ROWS][2] = {{{0}}};
    for (int64_t pair = 0; pair < pairs; pair++, x += ROWS, w += PANEL) {
        const ints left = (ints)load(w), right = (ints)load(w + LANES);
#pragma GCC unroll 6
        for (int row = 0; row < ROWS; row++) {
            const ints both = (ints)((words){0} + x[row]);
            sum[row][0] = dot(sum[row][0], both, left);
            sum[row][1] = dot(sum[row][1], both, right);
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < ROWS; row++) {
        sums[row][0] = (words)sum[row][0];
        sums[row][1] = (words)sum[row][1];
    }
}

/* Adds to `count` values, or writes them. */
INLINE void add_some(int32_t *to, words v, int64_t count, int is_first)
{
    if (count >= LANES) {
        store(to, is_first ? v : v + load(to));
        return;
    }
    words old = {0};
    if (!is_first)
        memcpy(&old, to, sizeof(int32_t) * (size_t)count);
    v += old;
    memcpy(to, &v, sizeof(int32_t) * (size_t)count);
}

/* Adds low + 2^12·high as three digits: only the highest has a sign. The sum of D_3 is the fourth plane's. */
INLINE void add_tile(const multiply_arguments *a, int32_t *out, words sums[ROWS][2], int64_t tokens, int64_t rows,
                     int is_first)
{
    const int64_t digits = a->planes - 1;
    for (int64_t token = 0; token < tokens; token++, out += a->out_token_stride)
        for (int64_t half = 0; half < 2 && LANES * half < rows; half++) {
            const int64_t count = rows - LANES * half;
            const words low = sums[token * digits][half], high = sums[token * digits + 1][half];
            int32_t *const to = out + LANES * half;
            add_some(to, low & 0xff, count, is_first);
            add_some(to + a->out_plane_stride, (low >> 8 & 0xff) + ((high & 0xf) << 4), count, is_first);
            add_some(to + 2 * a->out_plane_stride, (words)((ints)low >> 16) + (words)((ints)high >> 4), count, is_first);
            if (digits == 3)
                add_some(to + 3 * a->out_plane_stride, sums[token * digits + 2][half], count, is_first);
        }
}

static void multiply_block(const multiply_arguments *a, const block *b, const uint32_t *operand,
                           const uint32_t *weights)
{
    const int64_t group = ROWS / (a->planes - 1);
    words sums[ROWS][2];
    for (int64_t row = 0; row < b->rows; row += PANEL, weights += PANEL * b->pairs) {
        const uint32_t *x = operand;
        for (int64_t token = 0; token < b->tokens; token += group, x += ROWS * b->pairs) {
            int32_t *const out = a->out + (b->token + token) * a->out_token_stride + b->row + row;
            multiply_tile(x, weights, b->pairs, sums);
            add_tile(a, out, sums, smallest(group, b->tokens - token), b->rows - row, b->column == 0);
        }
    }
}

static void AT_LEVEL(multiply)(const multiply_arguments *a)
{
    uint32_t *const operand = (uint32_t *)(((uintptr_t)a->workspace + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    uint32_t *const weights = operand + OPERAND_WORDS;
    const int64_t width = divided_up(divided_up(a->k, divided_up(a->k, BLOCK_K)), 16) * 16;
    const int64_t tokens = BLOCK_OPERAND / width / ROWS * ROWS;
    block b;
    for (b.column = 0; b.column < a->k; b.column += width) {
        b.columns = smallest(width, a->k - b.column);
        b.pairs = divided_up(b.columns, LANES) * (LANES / 2);
        for (b.row = 0; b.row < a->n; b.row += BLOCK_N) {
            b.rows = smallest(BLOCK_N, a->n - b.row);
            pack_weights(a, &b, weights);
            for (b.token = 0; b.token < a->tokens; b.token += tokens) {
                b.tokens = smallest(tokens, a->tokens - b.token);
                pack_operand(a, &b, operand);
                multiply_block(a, &b, operand, weights);
            }
        }
    }
}
