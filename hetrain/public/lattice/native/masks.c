/* Masks by rejection: of 32-bit words, those whose low 30 bits are below q = 2^30 - 49151, in their order. */

#include "lanes.h"

#define GROUP 128
#define LOW_BITS 0x3fffffffu

#if HETRAIN_X86
#define FOR_EVERY_CPU __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FOR_EVERY_CPU
#endif

INLINE size_t filter(const uint32_t *words, size_t count, uint32_t *out, size_t kept, size_t room)
{
    for (size_t i = 0; i < count && kept < room; i++) {
        const uint32_t word = words[i] & LOW_BITS;
        out[kept] = word;
        kept += word < Q;
    }
    return kept;
}

/* Writes accepted words to `out`, at most `room`, and returns how many. 99.4 % of groups have none to reject. */
FOR_EVERY_CPU
size_t hetrain_accept(const uint32_t *words, size_t count, uint32_t *out, size_t room)
{
    size_t kept = 0, first = 0;
    for (; first + GROUP <= count && kept + GROUP <= room; first += GROUP) {
        uint32_t largest = 0;
        for (size_t i = 0; i < GROUP; i++) {
            const uint32_t word = words[first + i] & LOW_BITS;
            out[kept + i] = word;
            largest = word > largest ? word : largest;
        }
        kept = largest < Q ? kept + GROUP : filter(words + first, GROUP, out, kept, room);
    }
    return filter(words + first, count - first, out, kept, room);
}

int hetrain_interface(void)
{
    return 2;
}
