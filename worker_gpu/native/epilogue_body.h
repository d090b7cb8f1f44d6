/* The kernel of epilogue.c for one LEVEL. */

#include "lanes.h"

#define switched AT_LEVEL(switched)
#define store_bytes AT_LEVEL(store_bytes)
#define pack_group AT_LEVEL(pack_group)

/* Products are made positive by 2^31 each; CONSTANT takes that back. */
#define WEIGHT(l) (1u << (6 + 8 * (l)))
#define COMPANION(w) ((uint32_t)(((uint64_t)(w) << 32) / Q))
#define CONSTANT (Q - (uint32_t)(((uint64_t)1 << 31) * (WEIGHT(0) + WEIGHT(1) + WEIGHT(2)) % Q))

/* u of LANES features, in [0, 2^15]: residues modulo 2^14 */
INLINE words switched(const int32_t *const products[3], int64_t first)
{
    words v = (words){0} + CONSTANT;
    for (int l = 0; l < 3; l++)
        v = reduced(v + product(load(products[l] + first) ^ 0x80000000u, WEIGHT(l), COMPANION(WEIGHT(l))), 2 * Q);
    /* v·2^14 = quotient·q + rest with rest in [0, 2q). No tie can be met: q is odd. */
    const uint32_t companion = (uint32_t)(((uint64_t)1 << (32 + RESULT_BITS)) / Q);
    const words quotient = high_product(v, companion), rest = (v << RESULT_BITS) - quotient * Q;
    return quotient - (words)(rest > HALF_Q) - (words)(rest > Q + HALF_Q);
}

/* The low byte of each lane */
INLINE void store_bytes(uint8_t *to, words v)
{
    const bytes low = __builtin_convertvector(v, bytes);
    memcpy(to, &low, sizeof low);
}

INLINE void pack_group(uint8_t *out, const int32_t *const products[3], int64_t first)
{
    _Static_assert(RESULT_LOW_BITS == 6, "four times six bits make three bytes");
    for (int64_t lane = 0; lane < BLOCK; lane += LANES) {
        words low[GROUP_BLOCKS];
        for (int64_t block = 0; block < GROUP_BLOCKS; block++) {
            const words u = switched(products, first + BLOCK * block + lane);
            store_bytes(out + BLOCK * block + lane, u >> RESULT_LOW_BITS);
            low[block] = u & RESULT_LOW_MASK;
        }
        uint8_t *const rest = out + GROUP_FEATURES + lane;
        store_bytes(rest, low[0] | low[1] << 6);
        store_bytes(rest + BLOCK, low[1] >> 2 | low[2] << 4);
        store_bytes(rest + 2 * BLOCK, low[2] >> 4 | low[3] << 2);
    }
}

static void AT_LEVEL(switch)(const switch_arguments *a)
{
    const int64_t whole = a->features / GROUP_FEATURES * GROUP_FEATURES;
    int32_t last[3][GROUP_FEATURES] = {{0}};
    const int32_t *const padded[3] = {last[0], last[1], last[2]};
    for (int64_t token = 0; token < a->tokens; token++) {
        const int64_t at = token * a->product_stride;
        const int32_t *const products[3] = {a->products[0] + at, a->products[1] + at, a->products[2] + at};
        uint8_t *out = a->out + token * a->out_stride;
        for (int64_t first = 0; first < whole; first += GROUP_FEATURES, out += GROUP_BYTES)
            pack_group(out, products, first);
        if (whole < a->features) {
            for (int l = 0; l < 3; l++)
                memcpy(last[l], products[l] + whole, sizeof(int32_t) * (size_t)(a->features - whole));
            pack_group(out, padded, 0);
        }
    }
}
