/* What follows a worker's three int8 products, in one pass over memory: u = round((2^6·sum 2^(8l)·P_l mod q)·2^14 / q)
 * modulo 2^14, packed. The layout: hetrain/public/lattice/result_format.py. The reference: worker_gpu/epilogue.py. */

#include "lanes.h"

typedef struct {
    int64_t level, tokens, features, product_stride, out_stride; /* strides: from one token to the next */
    const int32_t *products[3];
    uint8_t *out;
} switch_arguments;

#define ROUNDING 0x1.8p52 /* Added to a double below 2^51, rounds it, and leaves it in the low bits. */

#define BODY "epilogue_body.h"
#include "levels.h"

DISPATCH(switch)

/* Changes with the structure above. */
int hetrain_interface(void)
{
    return 2;
}
