/* The kernels of BODY, compiled for every LEVEL of lanes.h, and what the loader asks of a library.
 *
 * DISPATCH(kernel) defines hetrain_kernel(arguments), which calls kernel_0, kernel_1 or kernel_2 by arguments->level.
 */

#define LEVEL 0
#include BODY
#undef LEVEL

#if HETRAIN_X86
BEGIN_AVX2
#define LEVEL 1
#include BODY
#undef LEVEL
END_TARGET

BEGIN_AVX512
#define LEVEL 2
#include BODY
#undef LEVEL
END_TARGET

#define DISPATCH(kernel)                                     \
    void hetrain_##kernel(const kernel##_arguments *a)       \
    {                                                        \
        (a->level == 2   ? kernel##_2                        \
         : a->level == 1 ? kernel##_1                        \
                         : kernel##_0)(a);                   \
    }
#else
#define DISPATCH(kernel)                               \
    void hetrain_##kernel(const kernel##_arguments *a) \
    {                                                  \
        kernel##_0(a);                                 \
    }
#endif

int hetrain_best_level(void)
{
    return best_level();
}
