/* What the sources of the CPU backend share. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "packed codes and random words are laid out for little-endian machines"
#endif

#define BLOCK 256

/* Vectors of 16 floats, with masks and all operations on bytes. */
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define HAS_MASKS
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE float from_bf16(uint16_t x) { return float_of((uint32_t)x << 16); }

/* To nearest even; a NaN stays one. */
INLINE uint16_t to_bf16(float x) {
    uint32_t bits = bits_of(x);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

#define PARALLEL_ELEMENTS 65536 /* of one cheap pass: less is not worth waking threads */

/* The bits of max |x|: those of a NaN are above those of infinity, and these above all others. */
INLINE uint32_t largest_of(const float *wide, const uint16_t *half, int is_bf16, int64_t n) {
    uint32_t largest = 0;
    for (int64_t k = 0; k < n; k++) {
        const uint32_t size = (is_bf16 ? (uint32_t)half[k] << 16 : bits_of(wide[k])) & 0x7FFFFFFF;
        largest = size > largest ? size : largest;
    }
    return largest;
}

/* A token in integers, in tokens.c. */
void lowbit_round_token(const void *x, int32_t is_bf16, int64_t n, int32_t top, float least, int8_t *levels,
                        float *per_unit);
