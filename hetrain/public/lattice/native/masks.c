/* Masks by rejection: of 32-bit words, those whose low 30 bits are below q = 2^30 - 49151, in their order. */

#include "lanes.h"

#define GROUP 256
#define LOW_BITS 0x3fffffffu

#if HETRAIN_X86
#define FOR_EVERY_CPU __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FOR_EVERY_CPU
#endif

/* Moves the accepted words to the front and returns how many there are. 98.8 % of groups have none to reject. */
FOR_EVERY_CPU
size_t hetrain_accept(uint32_t *stream, size_t count)
{
    size_t kept = 0;
    for (size_t first = 0; first < count; first += GROUP) {
        const size_t size = count - first < GROUP ? count - first : GROUP;
        uint32_t group[GROUP] = {0}, largest = 0;
        memcpy(group, stream + first, size * sizeof *stream);
        for (size_t i = 0; i < GROUP; i++) {
            group[i] &= LOW_BITS;
            largest = group[i] > largest ? group[i] : largest;
        }
        if (largest < Q) {
            memcpy(stream + kept, group, size * sizeof *stream);
            kept += size;
        } else {
            for (size_t i = 0; i < size; i++) {
                stream[kept] = group[i];
                kept += group[i] < Q;
            }
        }
    }
    return kept;
}

int hetrain_interface(void)
{
    return 1;
}
