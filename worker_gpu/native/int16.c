/* Exact products c·Wᵀ by 16-bit multiplications: for processors that multiply no 8-bit numbers exactly.
 *
 *     c = D_0 + 2^8·D_1 + 2^16·D_2 = low + 2^12·high,    |low|, |high| <= MAX_DIGIT = 2056
 *
 * One instruction multiplies pairs of columns and adds both products in 32 bits: low and high are the rows of one
 * product, a fourth plane D_3 is a third row. After at most BLOCK_K columns the sums, below 2^31, are added to the planes
 * of the result: their lower digits are positive and small, so that only the highest planes grow with K.
 *
 * Blocks as in "BLIS: A Framework for Rapidly Instantiating BLAS Functionality" (Van Zee and van de Geijn, 2015): a panel
 * of W stays in the first cache, a block of c in the second one. The reference: worker_gpu/kernels.py.
 */

#include "lanes.h"

#define DIGIT_BITS 12
#define MAX_DIGIT 2056
#define ROWS 6 /* of a tile: digits of three tokens, or with a fourth plane of two */
#define BLOCK_K 2048
#define BLOCK_N 640
#define BLOCK_OPERAND 81920 /* tokens times columns */
#define ALIGNMENT 64
#define OPERAND_WORDS (BLOCK_OPERAND * 3 / 2) /* pairs of up to three digits */
#define WEIGHT_WORDS (BLOCK_N * BLOCK_K / 2)

_Static_assert((int64_t)BLOCK_K * MAX_DIGIT * 128 < INT32_MAX, "sums of a block have 32 bits");
_Static_assert(BLOCK_OPERAND >= ROWS * BLOCK_K && BLOCK_N % 32 == 0 && BLOCK_K % 16 == 0, "blocks are whole tiles");

typedef struct {
    int64_t level, planes, tokens, n, k; /* planes: 3 or 4 */
    int64_t plane_stride, token_stride;  /* of the operand, whose columns are side by side */
    int64_t row_stride, column_stride;   /* of W [n, k]: one of them is 1 */
    int64_t out_plane_stride, out_token_stride;
    const int8_t *operand, *matrix;
    int32_t *out;
    uint8_t *workspace;
} multiply_arguments;

/* Part of a product: tokens and rows of W from `token` and `row`, columns from `column`, padded to `pairs` pairs */
typedef struct {
    int64_t token, tokens, row, rows, column, columns, pairs;
} block;

INLINE int64_t smallest(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

INLINE int64_t divided_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

#define BODY "int16_body.h"
#include "levels.h"

DISPATCH(multiply)

int64_t hetrain_workspace_bytes(void)
{
    return ALIGNMENT + (int64_t)sizeof(uint32_t) * (OPERAND_WORDS + WEIGHT_WORDS);
}

/* Changes with the structure above. */
int hetrain_interface(void)
{
    return 1;
}
