/* The checks of ring.c for one LEVEL: 16 rows of R, one in each lane, times the tokens of a matrix as they lie. */

#define pairs AT_LEVEL(pairs)
#define clear_missing AT_LEVEL(clear_missing)
#define up_panel AT_LEVEL(up_panel)
#define up_tile AT_LEVEL(up_tile)
#define down_tile AT_LEVEL(down_tile)

#define VECTORS (BLOCK / LANES) /* for 16 rows */

typedef uint16_t pairs __attribute__((vector_size(4 * LANES)));

/* ---- R·u modulo 2^16, which 2^14 divides: two features in each 32-bit lane ---- */

#undef TILE
#define TILE (8 / VECTORS) /* tokens at a time: as many sums as fit the registers */

INLINE void down_tile(uint16_t *out, const uint16_t *panel, const uint16_t *u, int64_t features, int64_t stride)
{
    words sums[TILE][VECTORS];
    memset(sums, 0, sizeof sums);
    for (int64_t k = 0; k < features; k += 2, panel += 2 * BLOCK)
        for (int64_t token = 0; token < TILE; token++) {
            uint32_t pair = 0;
            if (k + 1 < features)
                memcpy(&pair, u + token * stride + k, 4);
            else
                memcpy(&pair, u + token * stride + k, 2);
            const words both = (words){0} + pair;
            for (int64_t v = 0; v < VECTORS; v++) {
                words *sum = &sums[token][v];
                const words rows = load(panel + 2 * LANES * v);
#if LEVEL == 2
                *sum = (words)_mm512_dpwssd_epi32((__m512i)*sum, (__m512i)both, (__m512i)rows);
#else
                *sum = (words)((pairs)*sum + (pairs)rows * (pairs)both);
#endif
            }
        }
    for (int64_t token = 0; token < TILE; token++)
        for (int64_t v = 0; v < VECTORS; v++) {
            const words sum = LEVEL == 2 ? sums[token][v] : sums[token][v] + (sums[token][v] >> 16);
            uint16_t *at = out + BLOCK * token + LANES * v;
            for (int64_t lane = 0; lane < LANES; lane++)
                at[lane] = (uint16_t)(at[lane] + sum[lane]);
        }
}

static void AT_LEVEL(check_down)(const check_down_arguments *a)
{
    uint16_t panel[CHUNK][BLOCK][2];
    memset(a->out, 0, sizeof(uint16_t) * (size_t)((a->rows + BLOCK - 1) / BLOCK * BLOCK * a->tokens));
    for (int64_t row = 0; row < a->rows; row += BLOCK)
        for (int64_t first = 0; first < a->features; first += 2 * CHUNK) {
            const int64_t features = least(2 * CHUNK, a->features - first);
            memset(panel, 0, sizeof panel);
            for (int64_t r = 0; r < least(BLOCK, a->rows - row); r++)
                for (int64_t k = 0; k < features; k++)
                    panel[k / 2][r][k % 2] = (uint16_t)a->matrix[(row + r) * a->features + first + k];
            for (int64_t token = 0; token < a->tokens; token += TILE)
                down_tile(a->out + row * a->tokens + BLOCK * token, panel[0][0],
                          a->u + token * a->features + first, features, a->features);
        }
}

/* ---- (R·W)·(2^6·c) modulo q: c = c'' - 0x808080, where the bytes of c'' are the digits with their top bits flipped ---- */

#undef TILE
#if LEVEL == 2

/* Bytes of c'' times three signed digits of each entry of R·W; sums of equal weight 2^(8p) are added up. */
#define TILE 4
#define BIAS (1 << 30) /* keeps sums, at most 3·512·255·128 < 2^26 in size, positive */

typedef struct {
    int8_t digits[CHUNK / 4][3][BLOCK][4];
    uint32_t constant[BLOCK];
} up_panel;

static void AT_LEVEL(pack)(up_panel *panel, const int32_t *image, int64_t rows, int64_t features, int64_t stride)
{
    memset(panel, 0, sizeof *panel);
    for (int64_t r = 0; r < BLOCK; r++) {
        int64_t total = 0;
        for (int64_t k = 0; r < rows && k < features; k++) {
            const int32_t entry = image[r * stride + k];
            const uint32_t bytes = ((uint32_t)entry + DIGIT_OFFSET) ^ DIGIT_OFFSET;
            for (int64_t digit = 0; digit < 3; digit++)
                panel->digits[k / 4][digit][r][k % 4] = (int8_t)(bytes >> (8 * digit));
            total += entry;
        }
        int64_t constant = -total * ((int64_t)DIGIT_OFFSET << DROPPED_BITS) % Q;
        for (int p = 0; p < 5; p++)
            constant -= (int64_t)((uint64_t)BIAS * (((uint64_t)1 << (8 * p + DROPPED_BITS)) % Q) % Q);
        panel->constant[r] = (uint32_t)((constant % (int64_t)Q + Q) % Q);
    }
}

INLINE void up_tile(uint32_t *out, const up_panel *panel, const int8_t *planes, int64_t features, int64_t stride,
                    int64_t plane_stride)
{
    const int64_t whole = features / 4 * 4;
    int8_t last[3][TILE][4] = {{{0}}};
    if (whole < features)
        for (int64_t l = 0; l < 3; l++)
            for (int64_t token = 0; token < TILE; token++)
                memcpy(last[l][token], planes + l * plane_stride + token * stride + whole, (size_t)(features - whole));
    __m512i sums[TILE][5];
    for (int64_t token = 0; token < TILE; token++)
        for (int p = 0; p < 5; p++)
            sums[token][p] = _mm512_set1_epi32(BIAS);
    for (int64_t k = 0; k < features; k += 4, planes += 4) {
        if (k == whole)
            planes = last[0][0], stride = sizeof last[0][0], plane_stride = sizeof last[0];
        const int8_t(*const digits)[BLOCK][4] = panel->digits[k / 4];
        for (int64_t token = 0; token < TILE; token++)
            for (int64_t l = 0; l < 3; l++) {
                int32_t four;
                memcpy(&four, planes + l * plane_stride + token * stride, sizeof four);
                const __m512i c = _mm512_xor_si512(_mm512_set1_epi32(four), _mm512_set1_epi8((char)0x80));
                for (int64_t m = 0; m < 3; m++)
                    sums[token][l + m] =
                        _mm512_dpbusd_epi32(sums[token][l + m], c, _mm512_loadu_si512(digits[m]));
            }
    }
    for (int64_t token = 0; token < TILE; token++) {
        words total = load(out + BLOCK * token) + load(panel->constant);
        for (int p = 0; p < 5; p++) {
            const uint32_t weight = (uint32_t)(((uint64_t)1 << (8 * p + DROPPED_BITS)) % Q);
            const uint32_t companion = (uint32_t)(((uint64_t)weight << 32) / Q);
            total = reduced(total + product((words)sums[token][p], weight, companion), 2 * Q);
        }
        store(out + BLOCK * token, reduced(total, Q));
    }
}

#else

/* 64-bit sums of c'' times 2^6·(R·W) modulo q: at most 512·2^24·2^30. */
#define TILE (LEVEL == 1 ? 2 : 1)

typedef struct {
    uint32_t entries[CHUNK][BLOCK];
    uint32_t constant[BLOCK];
} up_panel;

static void AT_LEVEL(pack)(up_panel *panel, const int32_t *image, int64_t rows, int64_t features, int64_t stride)
{
    memset(panel, 0, sizeof *panel);
    for (int64_t r = 0; r < rows; r++) {
        uint64_t total = 0;
        for (int64_t k = 0; k < features; k++) {
            const int32_t entry = image[r * stride + k] << DROPPED_BITS;
            panel->entries[k][r] = (uint32_t)entry + (Q & (uint32_t)(entry >> 31));
            total += panel->entries[k][r];
        }
        panel->constant[r] = Q - (uint32_t)(total % Q * DIGIT_OFFSET % Q);
    }
}

INLINE void up_tile(uint32_t *out, const up_panel *panel, const int8_t *planes, int64_t features, int64_t stride,
                    int64_t plane_stride)
{
    uint32_t c[TILE][CHUNK];
    wide even[TILE][VECTORS], odd[TILE][VECTORS];
    memset(even, 0, sizeof even);
    memset(odd, 0, sizeof odd);
    for (int64_t token = 0; token < TILE; token++) {
        const uint8_t *at = (const uint8_t *)planes + token * stride;
        for (int64_t k = 0; k < features; k++)
            c[token][k] = ((uint32_t)at[k] | (uint32_t)at[k + plane_stride] << 8 |
                           (uint32_t)at[k + 2 * plane_stride] << 16) ^ DIGIT_OFFSET;
    }
    for (int64_t k = 0; k < features; k++)
        for (int64_t v = 0; v < VECTORS; v++) {
            const words entries = load(panel->entries[k] + LANES * v), others = (words)((wide)entries >> 32);
            for (int64_t token = 0; token < TILE; token++) {
                const words value = (words){0} + c[token][k];
                even[token][v] += even_products(entries, value);
                odd[token][v] += even_products(others, value);
            }
        }
    for (int64_t token = 0; token < TILE; token++)
        for (int64_t r = 0; r < BLOCK; r++) {
            const int64_t v = r / LANES, i = r % LANES / 2;
            const uint64_t sum = r % 2 ? odd[token][v][i] : even[token][v][i];
            uint32_t *at = out + BLOCK * token + r;
            *at = (uint32_t)((sum % Q + *at + panel->constant[r]) % Q);
        }
}

#endif

static void AT_LEVEL(check_up)(const check_up_arguments *a)
{
    up_panel panel;
    memset(a->out, 0, sizeof(uint32_t) * (size_t)((a->rows + BLOCK - 1) / BLOCK * BLOCK * a->tokens));
    for (int64_t row = 0; row < a->rows; row += BLOCK)
        for (int64_t first = 0; first < a->features; first += CHUNK) {
            const int64_t features = least(CHUNK, a->features - first);
            AT_LEVEL(pack)(&panel, a->image + row * a->features + first, least(BLOCK, a->rows - row), features,
                           a->features);
            for (int64_t token = 0; token < a->tokens; token += TILE)
                up_tile(a->out + row * a->tokens + BLOCK * token, &panel, a->planes + token * a->features + first,
                        features, a->features, a->tokens * a->features);
        }
}
