/* The kernel of epilogue.c for one LEVEL. */

#include "lanes.h"

#define shorts AT_LEVEL(shorts)
#define switched AT_LEVEL(switched)

typedef uint16_t shorts __attribute__((vector_size(2 * LANES)));

/* Products are made positive by 2^31 each; CONSTANT takes that back. */
#define WEIGHT(l) (1u << (6 + 8 * (l)))
#define COMPANION(w) ((uint32_t)(((uint64_t)(w) << 32) / Q))
#define CONSTANT (Q - (uint32_t)(((uint64_t)1 << 31) * (WEIGHT(0) + WEIGHT(1) + WEIGHT(2)) % Q))

INLINE shorts switched(const int32_t *low, const int32_t *middle, const int32_t *high)
{
    const int32_t *products[3] = {low, middle, high};
    words v = (words){0} + CONSTANT;
    for (int l = 0; l < 3; l++)
        v = reduced(v + product(load(products[l]) ^ 0x80000000u, WEIGHT(l), COMPANION(WEIGHT(l))), 2 * Q);
    /* v·2^16 = quotient·q + rest with rest in [0, 2q). No tie can be met: q is odd. */
    const uint32_t companion = (uint32_t)(((uint64_t)1 << 48) / Q);
    const words quotient = high_product(v, companion), rest = (v << 16) - quotient * Q;
    const words rounded = quotient - (words)(rest > HALF_Q) - (words)(rest > Q + HALF_Q);
    return __builtin_convertvector(rounded, shorts);
}

static void AT_LEVEL(switch)(const switch_arguments *a)
{
    int64_t i = 0;
    for (; i + LANES <= a->count; i += LANES) {
        const shorts u = switched(a->products[0] + i, a->products[1] + i, a->products[2] + i);
        memcpy(a->out + i, &u, sizeof u);
    }
    if (i < a->count) {
        int32_t last[3][LANES] = {{0}};
        const size_t left = (size_t)(a->count - i);
        for (int l = 0; l < 3; l++)
            memcpy(last[l], a->products[l] + i, left * sizeof(int32_t));
        const shorts u = switched(last[0], last[1], last[2]);
        memcpy(a->out + i, &u, left * sizeof(uint16_t));
    }
}
