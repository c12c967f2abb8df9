/* Random words for the elements of blocks: Philox4x32-10 on vectors. See rng.py for which word an element gets. */
#pragma once
#include "cpu.h"

#define COUNTERS 64 /* of a block; one gives words to elements j, j + 64, j + 128 and j + 192 */

#if defined(__AVX512F__)
#define LANES 8
#elif defined(__AVX2__)
#define LANES 4
#else
#define LANES 2
#endif
typedef uint64_t Lanes __attribute__((vector_size(8 * LANES)));

/* Counters drawn together. One vector after the other would wait for each product; four at a time keep the multipliers
 * busy. */
#define VECTORS 4
#define SPAN (VECTORS * LANES)

/* What the words of a call are a function of, besides their counters' positions. */
typedef struct {
    uint64_t key0[10], key1[10]; /* of the rounds, each twice: for both halves of a lane */
    uint32_t step, tensor;
} Stream;

static inline Stream stream_of(uint32_t key0, uint32_t key1, uint32_t step, uint32_t tensor) {
    const uint64_t both = 0x100000001;
    Stream stream = {.step = step, .tensor = tensor};
    for (int round = 0; round < 10; round++, key0 += 0x9E3779B9, key1 += 0xBB67AE85) {
        stream.key0[round] = key0 * both;
        stream.key1[round] = key1 * both;
    }
    return stream;
}

static const uint64_t EVEN[8] __attribute__((aligned(64))) = {0, 2, 4, 6, 8, 10, 12, 14};

/* The products of y with the lower halves of x. Compilers do not find the instruction by themselves. */
INLINE Lanes multiply(Lanes x, uint32_t y) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(y));
#elif defined(__AVX2__)
    return (Lanes)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(y));
#else
    return (x & 0xFFFFFFFF) * y;
#endif
}

/* The upper halves of x as lower halves, with anything above them: x >> 32, at half its price. */
INLINE Lanes upper(Lanes x) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_shuffle_epi32((__m512i)x, _MM_PERM_DDBB);
#elif defined(__AVX2__)
    return (Lanes)_mm256_shuffle_epi32((__m256i)x, 0xF5);
#else
    return x >> 32;
#endif
}

/* The lower, or the upper, halves of two vectors, interleaved. */
INLINE Lanes lower_halves(Lanes even, Lanes odd) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_mask_shuffle_epi32((__m512i)even, 0xAAAA, (__m512i)odd, _MM_PERM_CCAA);
#else
    return (even & 0xFFFFFFFF) | (odd << 32);
#endif
}

INLINE Lanes upper_halves(Lanes even, Lanes odd) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_mask_shuffle_epi32((__m512i)odd, 0x5555, (__m512i)even, _MM_PERM_DDBB);
#else
    return (even >> 32) | (odd & 0xFFFFFFFF00000000);
#endif
}

/* of[i][k] is word i of the k-th of SPAN counters. */
typedef struct {
    uint32_t of[4][SPAN];
} Words __attribute__((aligned(64)));

/* SPAN counters on their way through the rounds.
 *
 * The words ride in 64-bit lanes whose upper halves hold leftovers, for multiply() reads the lower halves only. Even
 * and odd counters run in different vectors, whose lower halves interleave in the end. */
typedef struct {
    Lanes c0[VECTORS], c1[VECTORS], c2[VECTORS], c3[VECTORS];
} Drawing;

/* From counter q on. */
INLINE void begin_drawing(Drawing *restrict x, const Stream *stream, uint64_t q) {
#pragma GCC unroll 4
    for (int g = 0; g < VECTORS; g++) {
        memcpy(&x->c0[g], EVEN, sizeof(Lanes));
        x->c0[g] += (uint32_t)q + (uint64_t)(g / 2 * 2 * LANES + g % 2);
        x->c1[g] = (Lanes){0} + (q >> 32);
        x->c2[g] = (Lanes){0} + stream->step;
        x->c3[g] = (Lanes){0} + stream->tensor;
    }
}

/* One of the rounds 0 to 8. */
INLINE void mix(Drawing *restrict x, const Stream *stream, int round) {
#pragma GCC unroll 4
    for (int g = 0; g < VECTORS; g++) {
        const Lanes p0 = multiply(x->c0[g], 0xD2511F53), p2 = multiply(x->c2[g], 0xCD9E8D57);
        x->c0[g] = upper(p2) ^ x->c1[g] ^ stream->key0[round];
        x->c1[g] = p2;
        x->c2[g] = upper(p0) ^ x->c3[g] ^ stream->key1[round];
        x->c3[g] = p0;
    }
}

/* The tenth round, whose words are interleaved before they are mixed: see Words. */
INLINE void end_drawing(const Drawing *restrict x, const Stream *stream, Words *restrict words) {
#pragma GCC unroll 2
    for (int g = 0; g < VECTORS; g += 2) {
        Lanes p0[2], p2[2];
        for (int i = 0; i < 2; i++) {
            p0[i] = multiply(x->c0[g + i], 0xD2511F53);
            p2[i] = multiply(x->c2[g + i], 0xCD9E8D57);
        }
        const Lanes mixed[4] = {
            upper_halves(p2[0], p2[1]) ^ lower_halves(x->c1[g], x->c1[g + 1]) ^ stream->key0[9],
            lower_halves(p2[0], p2[1]),
            upper_halves(p0[0], p0[1]) ^ lower_halves(x->c3[g], x->c3[g + 1]) ^ stream->key1[9],
            lower_halves(p0[0], p0[1]),
        };
        for (int i = 0; i < 4; i++) memcpy(&words->of[i][g * LANES], &mixed[i], sizeof(Lanes));
    }
}

INLINE void draw(Words *restrict words, const Stream *stream, uint64_t q) {
    Drawing x;
    begin_drawing(&x, stream, q);
#pragma GCC unroll 9
    for (int round = 0; round < 9; round++) mix(&x, stream, round);
    end_drawing(&x, stream, words);
}
