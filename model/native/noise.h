/* Numbers that look random and are not: what a seed, a decision and a code determine, as model/decoding/sampling.py has it.
 */
#pragma once
#include <cstdint>

static inline uint64_t shuffled(uint64_t bits) {
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9ull;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBull;
    return bits ^ (bits >> 31);
}

/* Over (0, 1), neither end. */
static inline double uniform(uint64_t seed, uint64_t decision, uint64_t code) {
    const uint64_t gamma = 0x9E3779B97F4A7C15ull;
    const uint64_t bits = shuffled(shuffled(shuffled(seed + gamma) + (decision + 1) * gamma) + (code + 1) * gamma);
    return ((double)(bits >> 12) + 0.5) * 0x1p-52;
}
