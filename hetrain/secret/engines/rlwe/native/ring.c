/* The client's kernels over R_q = Z_q[X]/(X^N + 1), q = 2^30 - 49151, for three instruction sets.
 *
 *     spectrum     NTT(s)/N of a secret
 *     token_norms  |x_t·column|, its largest and the sum of its squares
 *     encrypt      b_k = a_k·s + e_k + round(x_k·column_k / scale) modulo q, rounded to 24 bits, as three digit planes
 *     unpack       u of a result, from 14 bits each to 16
 *     decrypt      y_j = scale·column_j·(round(u_j·q / 2^14) - (W·a)_j·s) modulo q, signed
 *     check_up     (R·W)·c modulo q      check_down   R·u modulo 2^14
 *
 * Matrices are token-major: a vector holds features 16i, 16i+1, ... of one token, so nothing is ever transposed. Masks
 * and hints are in the transform's domain, [block of 16 features][rank·N points][16].
 *
 * Everything is exact. Nothing branches on, or indexes by, a secret. The reference is `TorchRing` in
 * hetrain/secret/engines/rlwe/torch_ring.py (compared to the bit by tests/unit/test_ring.py).
 */

#include "lanes.h"

#define MAX_DEGREE 2048
#define TILE_FEATURES 64 /* encrypted before they are written: a cache line of each row of a plane */
#define SUMS 32          /* parts of a sum of squares, whatever a vector's width */
#define CHUNK 512 /* features of a check at a time: a panel of 16 rows stays in the innermost cache */

/* c = round(b / 2^6): digits are bytes of b/2^6 + 0x808080, each with its top bit flipped. */
#define DROPPED_BITS 6
#define DIGIT_OFFSET 0x808080u

#define RESULT_MASK ((1u << RESULT_BITS) - 1)

/* Constants of a transform: psi^brv(i), psi^-brv(i), each with its companion. psi: see hetrain/public/lattice/ring.py */
typedef struct {
    int64_t degree;
    const uint32_t *forward, *forward_companions, *inverse, *inverse_companions; /* [N] */
} roots;

typedef struct {
    int64_t rank;
    const roots *roots;
    const uint32_t *values, *companions; /* [rank·N] */
} spectrum;

typedef struct {
    int64_t level, rank;
    const roots *roots;
    const int8_t *secret;         /* [rank, N], in {-1, 0, 1} */
    uint32_t *values, *companions; /* [rank·N], written */
} spectrum_arguments;

typedef struct {
    int64_t level, tokens, features;
    const float *x, *columns;  /* [T, K], [K] */
    float *largest, *squares; /* [T], written; NaN where x has one */
} token_norms_arguments;

typedef struct {
    int64_t level;
    const spectrum *secret;
    int64_t tokens, width, first, features; /* T, K; columns first .. first+features are encrypted */
    const uint32_t *masks;                  /* [blocks][rank·N][16] */
    const uint16_t *noise;                  /* [blocks][N][16], a keystream */
    const float *x, *columns, *inverse;     /* [T, K], [K], [T] */
    float limit;                            /* of |x·column·inverse|, an integer */
    int8_t *planes;                         /* [3, N, K], columns written */
} encrypt_arguments;

typedef struct {
    int64_t level;
    const spectrum *secret;
    int64_t tokens, n, first, features, width, column; /* columns first .. of u go to columns `column` .. of y */
    const uint16_t *u;                                 /* [N, n] */
    const uint32_t *hint;                              /* [blocks][rank·N][16] */
    const float *scales, *columns;                     /* [T], [width] */
    float *y;                                          /* [T, width], columns written */
} decrypt_arguments;

typedef struct {
    int64_t level, tokens, features, stride;
    const uint8_t *packed; /* [tokens, groups of 64 features, 112] */
    uint16_t *u;           /* [tokens, features], rows `stride` apart, written */
} unpack_arguments;

typedef struct {
    int64_t level, rows, features, tokens;
    const int32_t *image;  /* R·W [rows, features], |entries| ≤ 0x7f7f7f */
    const int8_t *planes;  /* [3, tokens, features] */
    uint32_t *out;         /* [groups of 16 rows][tokens][16], written */
} check_up_arguments;

typedef struct {
    int64_t level, rows, features, tokens;
    const int8_t *matrix; /* [rows, features], in {-1, 0, 1} */
    const uint16_t *u;    /* [tokens, features] */
    uint16_t *out;        /* [groups of 16 rows][tokens][16], written: residues modulo 2^16 */
} check_down_arguments;

static int64_t least(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static uint32_t times(uint32_t x, uint32_t w)
{
    return (uint32_t)((uint64_t)x * w % Q);
}

/* [0, 2q) to [0, q), without a branch */
static uint32_t below(uint32_t x)
{
    const uint32_t y = x - Q;
    return y + (Q & -(y >> 31));
}

/* Forward transform, Cooley and Tukey: coefficients in their order, spectrum in bit-reversed order. */
static void transform(uint32_t *a, const roots *r)
{
    const int64_t degree = r->degree;
    for (int64_t count = 1, half = degree / 2; half; count *= 2, half /= 2)
        for (int64_t i = 0; i < count; i++) {
            const uint32_t w = r->forward[count + i], companion = r->forward_companions[count + i];
            for (uint32_t *low = a + 2 * half * i, *end = low + half; low < end; low++) {
                const uint32_t lazy = low[half] * w - (uint32_t)((uint64_t)low[half] * companion >> 32) * Q;
                const uint32_t x = *low, y = below(lazy);
                low[0] = below(x + y);
                low[half] = below(x - y + Q);
            }
        }
}

/* The spectrum of every polynomial of a secret, over N: what the inverse transform leaves out. */
void hetrain_spectrum(const spectrum_arguments *a)
{
    const int64_t degree = a->roots->degree;
    uint32_t inverse_of_degree = 1;
    for (int64_t n = degree; n > 1; n /= 2)
        inverse_of_degree = times(inverse_of_degree, (Q + 1) / 2);
    for (int64_t i = 0; i < a->rank * degree; i++)
        a->values[i] = (uint32_t)a->secret[i] + (Q & (uint32_t)(a->secret[i] >> 7));
    for (int64_t i = 0; i < a->rank; i++)
        transform(a->values + i * degree, a->roots);
    for (int64_t i = 0; i < a->rank * degree; i++) {
        a->values[i] = times(a->values[i], inverse_of_degree);
        a->companions[i] = (uint32_t)(((uint64_t)a->values[i] << 32) / Q);
    }
}

#define BODY "ring_body.h"
#include "levels.h"

DISPATCH(token_norms)
DISPATCH(encrypt)
DISPATCH(decrypt)
DISPATCH(unpack)
DISPATCH(check_up)
DISPATCH(check_down)

/* Changes with every structure above: ring_library.py refuses another one. */
int hetrain_interface(void)
{
    return 4;
}
