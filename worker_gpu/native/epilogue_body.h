/* The kernel of epilogue.c for one LEVEL. */

#include "lanes.h"

#define reals AT_LEVEL(reals)
#define real_bits AT_LEVEL(real_bits)
#define half_ints AT_LEVEL(half_ints)
#define half_words AT_LEVEL(half_words)
#define half_bytes AT_LEVEL(half_bytes)
#define loaded AT_LEVEL(loaded)
#define switched AT_LEVEL(switched)
#define store_bytes AT_LEVEL(store_bytes)
#define pack_group AT_LEVEL(pack_group)

#undef HALF
#define HALF (LANES / 2) /* features of which a vector holds doubles */

typedef double reals __attribute__((vector_size(8 * HALF)));
typedef uint64_t real_bits __attribute__((vector_size(8 * HALF)));
typedef int32_t half_ints __attribute__((vector_size(4 * HALF)));
typedef uint32_t half_words __attribute__((vector_size(4 * HALF)));
typedef uint8_t half_bytes __attribute__((vector_size(HALF)));

INLINE reals loaded(const int32_t *from)
{
#if LEVEL == 2
    return (reals)_mm512_cvtepi32_pd(_mm256_loadu_si256((const __m256i *)from));
#elif LEVEL == 1
    return (reals)_mm256_cvtepi32_pd(_mm_loadu_si128((const __m128i *)from));
#else
    half_ints v;
    memcpy(&v, from, sizeof v);
    return __builtin_convertvector(v, reals);
#endif
}

/* u of HALF features, modulo 2^32: the low 14 bits count.
 *
 * Of up to 130,000 columns (kernels.py) the sum and the multiple of q are integers below 2^53, so the rest is exact, in
 * -q/2..q/2 or one beyond. As q is odd, rest·2^14 / q is at least 1 / 2q from every tie, and its rounding at most 2^-38.
 */
INLINE half_words switched(const int32_t *const products[3], int64_t first)
{
    reals sum = {0};
    for (int l = 2; l >= 0; l--)
        sum += loaded(products[l] + first) * (double)(1 << (6 + 8 * l));
    const reals multiple = (sum * (1.0 / Q) + ROUNDING - ROUNDING) * Q;
    const reals u = (sum - multiple) * ((double)(1 << RESULT_BITS) / Q) + ROUNDING;
    return __builtin_convertvector((real_bits)u, half_words);
}

/* The low byte of each lane */
INLINE void store_bytes(uint8_t *to, half_words v)
{
    const half_bytes low = __builtin_convertvector(v, half_bytes);
    memcpy(to, &low, sizeof low);
}

INLINE void pack_group(uint8_t *out, const int32_t *const products[3], int64_t first)
{
    _Static_assert(RESULT_LOW_BITS == 6, "four times six bits make three bytes");
    for (int64_t lane = 0; lane < BLOCK; lane += HALF) {
        half_words low[GROUP_BLOCKS];
        for (int64_t block = 0; block < GROUP_BLOCKS; block++) {
            const half_words u = switched(products, first + BLOCK * block + lane);
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
