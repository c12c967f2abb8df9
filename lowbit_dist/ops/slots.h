/* What an optimizer remembers of a weight: read, moved by the rules of optim/adamw.py and optim/lion.py, and stored, a
 * block at a time. */
#pragma once
#include "cpu.h"

#define PLANE 64 /* elements that are encoded together; the least that share a scale; four to a block */

#define SMALLEST_SCALE 0x1p-126f
#define SIGNED_SQUARE 16129.0f        /* 127^2 */
#define UNSIGNED_FOURTH 4228250625.0f /* 255^4 */

enum states { FP32, BF16, INT8 };
enum rules { ADAMW, LION, APPLY }; /* APPLY: the direction is given, and no state is kept */

/* The structures are filled by cpu.py. */
typedef struct {
    float beta1, rest1, beta2, rest2, correction1, correction2, eps, lr, decay, keep, grad_scale;
    float nearest_from, nearest_slope; /* of a fraction's chance to become a level: 0 and 1, if that is the fraction */
    uint32_t step, tensor, key0, key1;
} Step;

/* A gradient, and the slots of a rule; v with AdamW only. */
typedef struct {
    void *m, *v;
    float *m_scale, *v_scale;
    const void *grad; /* with APPLY the direction, in float32 */
    int32_t states, grad_is_bf16;
} State;

/* What is known of a block between its stages. */
typedef struct {
    float m[BLOCK], v[BLOCK];
    float u[BLOCK]; /* the direction: of Lion, and of AdamW where codes keep residuals */
    uint32_t largest_m, largest_v; /* the bits of the largest absolute values */
    uint8_t code[BLOCK], next[BLOCK];
    int8_t level[BLOCK]; /* of code */
} Work __attribute__((aligned(64)));

INLINE float square(float x) { return x * x; }

/* Where a block's gradient and slots are read. */
typedef struct {
    const void *grad, *m, *v;
    float m_scale, v_scale;
} Inputs;

INLINE Inputs inputs_of(const State *state, int64_t block, int rule) {
    static const int64_t width[] = {[FP32] = 4, [BF16] = 2, [INT8] = 1};
    const int64_t start = block * BLOCK, at = start * width[state->states];
    return (Inputs){
        .grad = (const char *)state->grad + start * (state->grad_is_bf16 ? 2 : 4),
        .m = (const char *)state->m + at,
        .v = (const char *)state->v + at,
        .m_scale = rule != APPLY && state->states == INT8 ? state->m_scale[block] : 1.0f,
        .v_scale = rule == ADAMW && state->states == INT8 ? state->v_scale[block] : 1.0f,
    };
}

/* Asks memory for what the block after next reads: this one computes for longer than the hardware looks ahead. */
INLINE void prefetch(const void *from, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch((const char *)from + 2 * bytes + at);
}

INLINE void prefetch_inputs(const Inputs *in, const State *state, int rule) {
    const int64_t bytes = state->states == FP32 ? 4 * BLOCK : state->states == BF16 ? 2 * BLOCK : BLOCK;
    prefetch(in->grad, state->grad_is_bf16 ? 2 * BLOCK : 4 * BLOCK);
    if (rule != APPLY) prefetch(in->m, bytes);
    if (rule == ADAMW) prefetch(in->v, bytes);
}

/* Moves the slots, from where they are stored to work. */
#if defined(HAS_MASKS)

INLINE __m512 load_bf16(const uint16_t *from) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from)), 16));
}

INLINE __m512 signed_slots(const void *from, int j, __m512 scale, int states) {
    if (states == FP32) return _mm512_loadu_ps((const float *)from + j);
    if (states == BF16) return load_bf16((const uint16_t *)from + j);
    const __m128i code = _mm_loadu_si128((const void *)((const int8_t *)from + j));
    const __m512 q = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(code));
    return (q * _mm512_abs_ps(q)) * scale;
}

INLINE __m512 unsigned_slots(const void *from, int j, __m512 scale, int states) {
    if (states == FP32) return _mm512_loadu_ps((const float *)from + j);
    if (states == BF16) return load_bf16((const uint16_t *)from + j);
    const __m128i code = _mm_loadu_si128((const void *)((const uint8_t *)from + j));
    const __m512 q = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(code)), squared = q * q;
    return (squared * squared) * scale;
}

/* Sixteen at a time. Of a plain loop compilers make vectors of 64 bytes first, and widen them in two steps. */
INLINE void move_slots(Work *restrict work, const Inputs *in, const Step *now, int states, int grad_is_bf16,
                       int rule) {
    const __m512 grad_scale = _mm512_set1_ps(now->grad_scale);
    const __m512 beta1 = _mm512_set1_ps(now->beta1), rest1 = _mm512_set1_ps(now->rest1);
    const __m512 beta2 = _mm512_set1_ps(now->beta2), rest2 = _mm512_set1_ps(now->rest2);
    const __m512 m_scale = _mm512_set1_ps(in->m_scale), v_scale = _mm512_set1_ps(in->v_scale);
    __m512i largest_m = _mm512_setzero_si512(), largest_v = largest_m;
    for (int j = 0; j < BLOCK; j += 16) {
        const __m512 grad = grad_is_bf16 ? load_bf16((const uint16_t *)in->grad + j)
                                         : _mm512_loadu_ps((const float *)in->grad + j);
        const __m512 g = grad * grad_scale, m = signed_slots(in->m, j, m_scale, states);
        const __m512 mixed = m * beta1 + g * rest1;
        __m512 next_m = mixed;
        if (rule == ADAMW) {
            const __m512 v = unsigned_slots(in->v, j, v_scale, states), next_v = v * beta2 + (g * g) * rest2;
            _mm512_store_ps(work->v + j, next_v);
            largest_v = _mm512_max_epu32(largest_v, _mm512_castps_si512(next_v));
        } else {
            const __m512 zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1.0f);
            const __mmask16 above = _mm512_cmp_ps_mask(mixed, zero, _CMP_GT_OQ);
            const __mmask16 below = _mm512_cmp_ps_mask(mixed, zero, _CMP_LT_OQ);
            _mm512_store_ps(work->u + j, _mm512_mask_sub_ps(_mm512_maskz_mov_ps(above, one), below, zero, one));
            next_m = m * beta2 + g * rest2;
        }
        _mm512_store_ps(work->m + j, next_m);
        largest_m = _mm512_max_epu32(largest_m, _mm512_castps_si512(_mm512_abs_ps(next_m)));
    }
    work->largest_m = _mm512_reduce_max_epu32(largest_m);
    work->largest_v = _mm512_reduce_max_epu32(largest_v);
}

#else

INLINE float signed_slot(const void *from, int j, float scale, int states) {
    if (states == FP32) return ((const float *)from)[j];
    if (states == BF16) return from_bf16(((const uint16_t *)from)[j]);
    float q = ((const int8_t *)from)[j];
    return (q * fabsf(q)) * scale;
}

INLINE float unsigned_slot(const void *from, int j, float scale, int states) {
    if (states == FP32) return ((const float *)from)[j];
    if (states == BF16) return from_bf16(((const uint16_t *)from)[j]);
    return square(square(((const uint8_t *)from)[j])) * scale;
}

INLINE void move_slots(Work *restrict work, const Inputs *in, const Step *step, int states, int grad_is_bf16,
                       int rule) {
    const void *restrict grad = in->grad, *restrict m_from = in->m, *restrict v_from = in->v;
    const float m_scale = in->m_scale, v_scale = in->v_scale;
    const Step now = *step;
    for (int j = 0; j < BLOCK; j++) {
        float g = grad_is_bf16 ? from_bf16(((const uint16_t *)grad)[j]) : ((const float *)grad)[j];
        float m = signed_slot(m_from, j, m_scale, states);
        g = g * now.grad_scale;
        if (rule == ADAMW) {
            float v = unsigned_slot(v_from, j, v_scale, states);
            work->m[j] = m * now.beta1 + g * now.rest1;
            work->v[j] = v * now.beta2 + (g * g) * now.rest2;
        } else {
            float mixed = m * now.beta1 + g * now.rest1;
            work->u[j] = (float)((mixed > 0) - (mixed < 0));
            work->m[j] = m * now.beta2 + g * now.rest2;
        }
    }
    if (states != INT8) return;
    work->largest_m = largest_of(work->m, NULL, 0, BLOCK);
    if (rule == ADAMW) work->largest_v = largest_of(work->v, NULL, 0, BLOCK);
}

#endif

INLINE void move_block(Work *restrict work, const Inputs *in, const Step *now, int states, int grad_is_bf16,
                       int rule) {
#define CASE(STATES, IS_BF16) \
    case STATES * 2 + IS_BF16: \
        move_slots(work, in, now, STATES, IS_BF16, rule); \
        break
    if (rule == APPLY) return;
    switch (states * 2 + grad_is_bf16) {
        CASE(FP32, 0);
        CASE(FP32, 1);
        CASE(BF16, 0);
        CASE(BF16, 1);
        CASE(INT8, 0);
        CASE(INT8, 1);
    }
#undef CASE
}

/* In 8 bits a slot's code is how many of the thresholds power(k - 1/2) y reaches, of y in units of its block's scale.
 * That is floor(root + 1/2), and compared with one threshold an approximate root tells it. Adding 2^23 to a root leaves
 * an integer in its low bits. No y exceeds the last threshold; a mean of squares has a code of at least 1. */
#if defined(HAS_MASKS)

/* Of 16 elements; the lowest bytes are the codes. `floored` is 2^23 + floor(root), of a root that is wrong by less than
 * 1/2. */
INLINE __m512i codes_of(__m512 y, __m512 floored, int fourth) {
    __m512 threshold = _mm512_sub_ps(floored, _mm512_set1_ps(8388607.5f));
    threshold = _mm512_mul_ps(threshold, threshold);
    if (fourth) threshold = _mm512_mul_ps(threshold, threshold);
    const __m512i code = _mm512_castps_si512(floored);
    return _mm512_mask_add_epi32(code, _mm512_cmp_ps_mask(y, threshold, _CMP_GE_OQ), code, _mm512_set1_epi32(1));
}

/* The lowest bytes of 64 elements. */
INLINE __m512i lowest_bytes(const __m512i *x /* [4] */) {
    const __m512i lowest = _mm512_set4_epi32(0x0C0C0C0C, 0x08080808, 0x04040404, 0x00000000);
    __m512i mixed = _mm512_mask_shuffle_epi8(x[0], 0x2222222222222222, x[1], lowest);
    mixed = _mm512_mask_shuffle_epi8(mixed, 0x4444444444444444, x[2], lowest);
    mixed = _mm512_mask_shuffle_epi8(mixed, 0x8888888888888888, x[3], lowest);
    /* Byte k of element l is that of element 16 k + l. */
    mixed = _mm512_shuffle_epi8(mixed, _mm512_set4_epi32(0x0F0B0703, 0x0E0A0602, 0x0D090501, 0x0C080400));
    return _mm512_permutexvar_epi32(_mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0), mixed);
}

#define DOWNWARD (_MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC)

INLINE void encode_signed(const float *restrict m, int8_t *restrict code, float inverse) {
    __m512i codes[4];
    uint64_t negative = 0;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512 x = _mm512_load_ps(m + 16 * i);
        const __m512 y = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(inverse));
        /* Of a y of 0 it is a NaN, whose lowest byte is 0. */
        const __m512 floored = _mm512_fmadd_round_ps(y, _mm512_rsqrt14_ps(y), _mm512_set1_ps(8388608.0f), DOWNWARD);
        codes[i] = codes_of(y, floored, 0);
        negative |= (uint64_t)_mm512_movepi32_mask(_mm512_castps_si512(x)) << (16 * i);
    }
    const __m512i all = lowest_bytes(codes);
    _mm512_storeu_si512(code, _mm512_mask_sub_epi8(all, negative, _mm512_setzero_si512(), all));
}

INLINE void encode_unsigned(const float *restrict v, uint8_t *restrict code, float inverse) {
    __m512i codes[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512 y = _mm512_mul_ps(_mm512_load_ps(v + 16 * i), _mm512_set1_ps(inverse));
        const __m512 root = _mm512_rsqrt14_ps(_mm512_rsqrt14_ps(y));
        codes[i] = codes_of(y, _mm512_add_round_ps(root, _mm512_set1_ps(8388608.0f), DOWNWARD), 1);
    }
    _mm512_storeu_si512(code, _mm512_max_epu8(lowest_bytes(codes), _mm512_set1_epi8(1)));
}

#else

/* A square root that is too small, by 0.01 % to 0.2 %: the exponent halved, and one Newton step that overshoots from
 * either side. */
INLINE float low_root(float y) {
    float r = float_of(0x5F0B2895u - (bits_of(y) >> 1)); /* about 0.79 / root(y) */
    float t = y * r;
#if defined(__FMA__)
    return t * __builtin_fmaf(-t, r, 1.88975f); /* no code depends on this rounding */
#else
    return t * (1.88975f - t * r);
#endif
}

/* In the low bits. Of a root that is too small by less than 1, root + 1/2 is floored to the code or to one less. */
INLINE uint32_t code_of(float y, float root, int fourth) {
    float rounded = root + 8388608.0f;
    float threshold = square(rounded - 8388607.5f);
    if (fourth) threshold = square(threshold);
    uint32_t code = bits_of(rounded);
    return y >= threshold ? code + 1 : code;
}

INLINE void encode_signed(const float *restrict m, int8_t *restrict code, float inverse) {
    for (int j = 0; j < PLANE; j++) {
        float y = fabsf(m[j]) * inverse;
        int32_t size = (int32_t)code_of(y, low_root(y), 0);
        code[j] = (int8_t)(m[j] < 0 ? -size : size);
    }
}

INLINE void encode_unsigned(const float *restrict v, uint8_t *restrict code, float inverse) {
    for (int j = 0; j < PLANE; j++) {
        float y = v[j] * inverse;
        uint32_t rounded = code_of(y, low_root(low_root(y)), 1);
        code[j] = (uint8_t)(rounded > 0x4B000001 ? rounded : 0x4B000001); /* the exponent's bits fall off */
    }
}

#endif

/* Of a block's 8-bit slots. */
typedef struct {
    float m, v, m_inverse, v_inverse;
} Scales;

INLINE float block_scale(uint32_t largest, float top) {
    float scale = float_of(largest) / top;
    return scale >= SMALLEST_SCALE ? scale : 0.0f;
}

INLINE Scales scales_of_slots(const Work *restrict work, int states, int rule) {
    Scales found = {0};
    if (rule == APPLY || states != INT8) return found;
    found.m = block_scale(work->largest_m, SIGNED_SQUARE);
    found.m_inverse = found.m > 0 ? 1.0f / found.m : 0.0f;
    if (rule != ADAMW) return found;
    found.v = block_scale(work->largest_v, UNSIGNED_FOURTH);
    found.v_inverse = found.v > 0 ? 1.0f / found.v : 0.0f;
    return found;
}

INLINE void store_slots(const Work *restrict work, const State *state, const Scales *scales, int64_t block, int rule) {
    const int64_t at = block * BLOCK;
    if (rule == APPLY) return;
    if (state->states == INT8) {
        state->m_scale[block] = scales->m;
        if (rule == ADAMW) state->v_scale[block] = scales->v;
#pragma GCC unroll 1
        for (int j = 0; j < BLOCK; j += PLANE) {
            encode_signed(work->m + j, (int8_t *)state->m + at + j, scales->m_inverse);
            if (rule == ADAMW) encode_unsigned(work->v + j, (uint8_t *)state->v + at + j, scales->v_inverse);
        }
    } else if (state->states == BF16) {
        uint16_t *restrict m = (uint16_t *)state->m + at, *restrict v = (uint16_t *)state->v + at;
        for (int j = 0; j < BLOCK; j++) m[j] = to_bf16(work->m[j]);
        for (int j = 0; rule == ADAMW && j < BLOCK; j++) v[j] = to_bf16(work->v[j]);
    } else {
        memcpy((float *)state->m + at, work->m, sizeof work->m);
        if (rule == ADAMW) memcpy((float *)state->v + at, work->v, sizeof work->v);
    }
}
