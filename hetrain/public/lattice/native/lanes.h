/* Arithmetic modulo q = 2^30 - 49151 in the lanes of a vector, for one instruction set at a time.
 *
 * Included again for each LEVEL, between that level's BEGIN and END_TARGET; names defined by AT_LEVEL get the level as a
 * suffix, so that one file holds all three versions of a kernel:
 *
 *     LEVEL 0   portable: C with the vector extension of GCC and Clang
 *     LEVEL 1   AVX2 (x86-64-v3)
 *     LEVEL 2   AVX-512 (x86-64-v4) with VNNI
 *
 * Products with a constant w are lazy (Harvey, "Faster arithmetic for number-theoretic transforms", 2014): with
 * w' = floor(w·2^32 / q), x·w - floor(x·w' / 2^32)·q lies in [0, 2q) for every 32-bit x.
 */

#ifndef HETRAIN_LANES
#define HETRAIN_LANES

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(HETRAIN_PORTABLE)
#define HETRAIN_X86 1
#include <immintrin.h>
#define BEGIN_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,bmi2,fma\")")
#define BEGIN_AVX512          \
    _Pragma("GCC push_options") \
    _Pragma("GCC target(\"avx2,bmi2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512\")")
#define END_TARGET _Pragma("GCC pop_options")
#else
#define HETRAIN_X86 0
#endif

#define Q 1073692673u
#define HALF_Q ((Q - 1) / 2)
#define BLOCK 16 /* features side by side in memory, whatever a vector's width */

/* Results, u = round(b'·2^14 / q) modulo 2^14, travel in groups of four blocks: hetrain/public/lattice/result_format.py */
#define RESULT_BITS 14
#define RESULT_LOW_BITS (RESULT_BITS - 8)
#define RESULT_LOW_MASK ((1u << RESULT_LOW_BITS) - 1)
#define GROUP_BLOCKS 4
#define GROUP_FEATURES (GROUP_BLOCKS * BLOCK)
#define GROUP_BYTES (GROUP_FEATURES * RESULT_BITS / 8)
#define INLINE static inline __attribute__((always_inline))

#define PASTE_(name, level) name##_##level
#define PASTE(name, level) PASTE_(name, level)
#define AT_LEVEL(name) PASTE(name, LEVEL)

#define words AT_LEVEL(words)
#define ints AT_LEVEL(ints)
#define wide AT_LEVEL(wide)
#define shorts AT_LEVEL(shorts)
#define bytes AT_LEVEL(bytes)
#define load AT_LEVEL(load)
#define store AT_LEVEL(store)
#define even_products AT_LEVEL(even_products)
#define high_product AT_LEVEL(high_product)
#define smaller AT_LEVEL(smaller)
#define product AT_LEVEL(product)
#define reduced AT_LEVEL(reduced)

/* The highest level that this machine has. */
INLINE int best_level(void)
{
#if HETRAIN_X86
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("bmi2") || !__builtin_cpu_supports("fma"))
        return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512vnni")
               ? 2
               : 1;
#else
    return 0;
#endif
}

#endif

#ifdef LEVEL
#undef LANES
#define LANES (4 << LEVEL)

typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint64_t wide __attribute__((vector_size(4 * LANES)));
typedef uint16_t shorts __attribute__((vector_size(2 * LANES)));
typedef uint8_t bytes __attribute__((vector_size(LANES)));

INLINE words load(const void *from)
{
    words v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE void store(void *to, words v)
{
    memcpy(to, &v, sizeof v);
}

/* 64-bit products of lanes 0, 2, 4, ... */
INLINE wide even_products(words a, words b)
{
#if LEVEL == 2
    return (wide)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif LEVEL == 1
    return (wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && HETRAIN_X86
    return (wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
    return ((wide)a & 0xffffffffu) * ((wide)b & 0xffffffffu);
#endif
}

/* floor(a·c / 2^32) */
INLINE words high_product(words a, uint32_t c)
{
    const words constant = (words){0} + c;
    const wide even = even_products(a, constant), odd = even_products((words)((wide)a >> 32), constant);
#if LEVEL == 2
    return (words)_mm512_mask_shuffle_epi32((__m512i)odd, 0x5555, (__m512i)even, _MM_PERM_DDBB);
#elif LEVEL == 1
    return (words)_mm256_blend_epi32((__m256i)(even >> 32), (__m256i)odd, 0xaa);
#else
    return (words)((even >> 32) | (odd & ~(uint64_t)0xffffffffu));
#endif
}

INLINE words smaller(words a, words b)
{
#if LEVEL == 2
    return (words)_mm512_min_epu32((__m512i)a, (__m512i)b);
#elif LEVEL == 1
    return (words)_mm256_min_epu32((__m256i)a, (__m256i)b);
#else
    const words below = (words)(a < b);
    return (a & below) | (b & ~below);
#endif
}

/* x·w modulo q, in [0, 2q); `companion` is floor(w·2^32 / q). */
INLINE words product(words x, uint32_t w, uint32_t companion)
{
    return x * w - high_product(x, companion) * Q;
}

/* [0, bound + multiple) to [0, bound), for a bound of at least `multiple` */
INLINE words reduced(words x, uint32_t multiple)
{
    return smaller(x, x - multiple);
}

#endif
