/* What follows a worker's three int8 products, in one pass over memory: u = round((2^6·sum 2^(8l)·P_l mod q)·2^14 / q)
 * modulo 2^14, packed. The layout: hetrain/public/lattice/result_format.py. The reference: worker_gpu/epilogue.py. */

#include "lanes.h"

typedef struct {
    int64_t level, tokens, features, product_stride, out_stride; /* strides: from one token to the next */
    const int32_t *products[3];
    uint8_t *out;
} switch_arguments;

#define LEVEL 0
#include "epilogue_body.h"
#undef LEVEL

#if HETRAIN_X86
BEGIN_AVX2
#define LEVEL 1
#include "epilogue_body.h"
#undef LEVEL
END_TARGET
BEGIN_AVX512
#define LEVEL 2
#include "epilogue_body.h"
#undef LEVEL
END_TARGET
#endif

void hetrain_switch(const switch_arguments *a)
{
#if HETRAIN_X86
    if (a->level == 2)
        switch_2(a);
    else if (a->level == 1)
        switch_1(a);
    else
#endif
        switch_0(a);
}

int hetrain_best_level(void)
{
    return best_level();
}

/* Changes with the structure above. */
int hetrain_interface(void)
{
    return 2;
}
