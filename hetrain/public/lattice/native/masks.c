/* Masks by rejection: of 32-bit words, those whose low 30 bits are below q = 2^30 - 49151, in their order. */

#include "lanes.h"

#define GROUP 128
#define LOW_BITS 0x3fffffffu

#if HETRAIN_X86
#define FOR_EVERY_CPU __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FOR_EVERY_CPU
#endif

INLINE size_t filter(uint32_t *stream, size_t kept, size_t first, size_t size)
{
    for (size_t i = first; i < first + size; i++) {
        const uint32_t word = stream[i] & LOW_BITS;
        stream[kept] = word;
        kept += word < Q;
    }
    return kept;
}

INLINE size_t move(uint32_t *stream, size_t kept, size_t first)
{
    uint32_t group[GROUP];
    for (size_t i = 0; i < GROUP; i++)
        group[i] = stream[first + i] & LOW_BITS;
    memcpy(stream + kept, group, sizeof group);
    return kept + GROUP;
}

/* Moves the accepted words to the front and returns how many there are. 99.4 % of groups have none to reject. */
FOR_EVERY_CPU
size_t hetrain_accept(uint32_t *stream, size_t count)
{
    size_t kept = 0, first = 0;
    for (; first + GROUP <= count; first += GROUP) {
        uint32_t largest = 0;
        for (size_t i = first; i < first + GROUP; i++)
            largest = (stream[i] & LOW_BITS) > largest ? stream[i] & LOW_BITS : largest;
        if (largest < Q)
            kept = move(stream, kept, first);
        else
            kept = filter(stream, kept, first, GROUP);
    }
    return filter(stream, kept, first, count - first);
}

int hetrain_interface(void)
{
    return 1;
}
