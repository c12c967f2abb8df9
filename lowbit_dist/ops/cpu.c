/* The ops of reference.py and states.py for CPU workers, with the rules of optim/adamw.py and optim/lion.py fused in:
 * the same bytes; see there for what they mean.
 *
 * Work goes block by block (256 elements), through arrays that stay in the first-level cache. Every loop over a block
 * is a plain loop that compilers turn into vector code. Two things keep the bytes those of the reference: no
 * contraction into fused multiply-adds (-ffp-contract=off) and IEEE division and square root.
 *
 * What a block goes through is written once; `rule`, `states` and `grad_is_bf16` are arguments of functions that are
 * always inlined, and constants where those are called.
 */
#include "cpu.h"

#define PLANE 64 /* the least that share a scale; four to a block */
#define COUNTERS 64 /* Philox calls of a block; one gives words to elements j, j + 64, j + 128 and j + 192 */

#define SMALLEST_SCALE 0x1p-126f
#define SIGNED_SQUARE 16129.0f        /* 127^2 */
#define UNSIGNED_FOURTH 4228250625.0f /* 255^4 */
#define LARGEST_STEP_BITS 0x47800000u /* of 65536.0f */

/* A call on fewer blocks than this is not worth waking threads. */
#define PARALLEL_BLOCKS 512
/* Blocks that a thread takes at a time. */
#define RUN 64

enum states { FP32, BF16, INT8 };
enum rules { ADAMW, LION, APPLY }; /* APPLY: the direction is given, and no state is kept */

/* The structures are filled by cpu.py. */
typedef struct {
    float beta1, rest1, beta2, rest2, correction1, correction2, eps, lr, decay, keep, grad_scale;
    uint32_t step, tensor, key0, key1;
} Step;

/* Element e of the whole tensor has scale[e / scale_every]; a shard begins at block `first_block`. */
typedef struct {
    int32_t low, high, bits, n_threads;
    int64_t n_blocks, first_block, scale_every, n_scales;
} Shard;

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
    float root[BLOCK]; /* of the bias-corrected v (AdamW) */
    float u[BLOCK];    /* the direction (Lion) */
    uint8_t code[BLOCK], next[BLOCK];
} Work __attribute__((aligned(64)));

INLINE float square(float x) { return x * x; }

#if defined(__AVX512F__)
#define LANES 8
#elif defined(__AVX2__)
#define LANES 4
#else
#define LANES 2
#endif
typedef uint64_t Lanes __attribute__((vector_size(8 * LANES)));

/* Counters drawn together, and elements updated together. One vector after the other would wait for each product; four
 * at a time keep the multipliers busy. */
#define VECTORS 4
#define SPAN (VECTORS * LANES)

/* Vectors of 16 floats, with masks and all operations on bytes. */
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define HAS_MASKS
#endif

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

/* Philox4x32-10 for the SPAN counters from q on: word i of counter q + k goes to word[i][k].
 *
 * The words ride in 64-bit lanes whose upper halves hold leftovers, for multiply() reads the lower halves only. Even
 * and odd counters run in different vectors, whose lower halves interleave in the end. */
INLINE void draw(uint32_t (*restrict word)[SPAN], uint64_t q, const Step *now) {
    Lanes c0[VECTORS], c1[VECTORS], c2[VECTORS], c3[VECTORS];
#pragma GCC unroll 4
    for (int g = 0; g < VECTORS; g++) {
        memcpy(&c0[g], EVEN, sizeof(Lanes));
        c0[g] += (uint32_t)q + (uint64_t)(g / 2 * 2 * LANES + g % 2);
        c1[g] = (Lanes){0} + (q >> 32);
        c2[g] = (Lanes){0} + now->step;
        c3[g] = (Lanes){0} + now->tensor;
    }
    uint32_t key0 = now->key0, key1 = now->key1;
#pragma GCC unroll 9
    for (int round = 0; round < 9; round++) {
#pragma GCC unroll 4
        for (int g = 0; g < VECTORS; g++) {
            const Lanes p0 = multiply(c0[g], 0xD2511F53), p2 = multiply(c2[g], 0xCD9E8D57);
            c0[g] = upper(p2) ^ c1[g] ^ key0;
            c1[g] = p2;
            c2[g] = upper(p0) ^ c3[g] ^ key1;
            c3[g] = p0;
        }
        key0 += 0x9E3779B9;
        key1 += 0xBB67AE85;
    }
    /* The tenth, whose words are interleaved before they are mixed. */
    const uint64_t both = 0x100000001;
#pragma GCC unroll 2
    for (int g = 0; g < VECTORS; g += 2) {
        Lanes p0[2], p2[2];
        for (int i = 0; i < 2; i++) {
            p0[i] = multiply(c0[g + i], 0xD2511F53);
            p2[i] = multiply(c2[g + i], 0xCD9E8D57);
        }
        const Lanes mixed[4] = {
            upper_halves(p2[0], p2[1]) ^ lower_halves(c1[g], c1[g + 1]) ^ key0 * both,
            lower_halves(p2[0], p2[1]),
            upper_halves(p0[0], p0[1]) ^ lower_halves(c3[g], c3[g + 1]) ^ key1 * both,
            lower_halves(p0[0], p0[1]),
        };
        for (int i = 0; i < 4; i++) memcpy(&word[i][g * LANES], &mixed[i], sizeof(Lanes));
    }
}

/* A block's codes between storage and work, where each is a byte. */
static void unpack_block(const uint8_t *restrict packed, uint8_t *restrict code, int bits) {
    if (bits == 8) {
        memcpy(code, packed, BLOCK);
    } else if (bits == 4 || bits == 6) {
        for (int j = 0; j < 128; j++) {
            code[j] = packed[j] & 15;
            code[j + 128] = packed[j] >> 4;
        }
        if (bits == 6)
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 64; j++) code[j + 64 * i] |= ((packed[128 + j] >> (2 * i)) & 3) << 4;
    } else {
        for (int j = 0; j < 64; j++) {
            code[j] = packed[j] & 3;
            code[j + 64] = (packed[j] >> 2) & 3;
            code[j + 128] = (packed[j] >> 4) & 3;
            code[j + 192] = packed[j] >> 6;
        }
        if (bits == 3)
            for (int i = 0; i < 8; i++)
                for (int j = 0; j < 32; j++) code[j + 32 * i] |= ((packed[64 + j] >> i) & 1) << 2;
    }
}

static void pack_block(uint8_t *restrict packed, const uint8_t *restrict code, int bits) {
    if (bits == 8) {
        memcpy(packed, code, BLOCK);
    } else if (bits == 4 || bits == 6) {
        for (int j = 0; j < 128; j++) packed[j] = (uint8_t)((code[j] & 15) | code[j + 128] << 4);
        if (bits == 6)
            for (int j = 0; j < 64; j++)
                packed[128 + j] = (uint8_t)(code[j] >> 4 | code[j + 64] >> 4 << 2 | code[j + 128] >> 4 << 4 |
                                            code[j + 192] >> 4 << 6);
    } else {
        for (int j = 0; j < 64; j++)
            packed[j] = (uint8_t)((code[j] & 3) | (code[j + 64] & 3) << 2 | (code[j + 128] & 3) << 4 |
                                  code[j + 192] << 6);
        if (bits == 3)
            for (int j = 0; j < 32; j++) {
                uint8_t high = 0;
                for (int i = 0; i < 8; i++) high |= (uint8_t)(code[j + 32 * i] >> 2 << i);
                packed[64 + j] = high;
            }
    }
}

static int64_t count_changes(const uint8_t *restrict old, const uint8_t *restrict new) {
    uint8_t changes[COUNTERS];
    int32_t sum = 0;
    for (int j = 0; j < COUNTERS; j++)
        changes[j] = (uint8_t)((old[j] != new[j]) + (old[j + 64] != new[j + 64]) + (old[j + 128] != new[j + 128]) +
                               (old[j + 192] != new[j + 192]));
    for (int j = 0; j < COUNTERS; j++) sum += changes[j];
    return sum;
}

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

/* How many of the thresholds power(k - 1/2) y reaches, in the low bits. That is floor(root + 1/2) for an exact root;
 * one that is too small by less than 1 gives it or one less, and the next threshold tells which. Adding 2^23 rounds to
 * an integer and leaves it in the low bits. No y exceeds the last threshold. */
INLINE uint32_t code_of(float y, float root, int fourth) {
    float rounded = root + 8388608.0f;
    float threshold = square(rounded - 8388607.5f);
    if (fourth) threshold = square(threshold);
    uint32_t code = bits_of(rounded);
    return y >= threshold ? code + 1 : code;
}

INLINE float block_scale(uint32_t largest, float top) {
    float scale = float_of(largest) / top;
    return scale >= SMALLEST_SCALE ? scale : 0.0f;
}

#if defined(HAS_MASKS)

/* Of 64 elements. */
INLINE __mmask64 joined(const __mmask16 *of_plane) {
    uint64_t mask;
    memcpy(&mask, of_plane, sizeof mask);
    return mask;
}

/* The bits of the largest absolute value. */
INLINE uint32_t largest_of_block(const float *restrict x) {
    __m512 largest[4];
    for (int i = 0; i < 4; i++) largest[i] = _mm512_load_ps(x + 16 * i);
    for (int j = 64; j < BLOCK; j += 64)
        for (int i = 0; i < 4; i++) largest[i] = _mm512_range_ps(largest[i], _mm512_load_ps(x + j + 16 * i), 11);
    for (int i = 1; i < 4; i++) largest[0] = _mm512_range_ps(largest[0], largest[i], 11);
    return bits_of(_mm512_reduce_max_ps(_mm512_abs_ps(largest[0])));
}

/* code_of(y, low_root(for_root)) of 16 elements; their lowest bytes are the codes. */
INLINE __m512i codes_of(__m512 y, __m512 for_root, int fourth) {
    const __m512i halved = _mm512_srli_epi32(_mm512_castps_si512(for_root), 1);
    const __m512 r = _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_set1_epi32(0x5F0B2895), halved));
    const __m512 t = _mm512_mul_ps(for_root, r);
    const __m512 rounded =
        _mm512_fmadd_ps(t, _mm512_fnmadd_ps(t, r, _mm512_set1_ps(1.88975f)), _mm512_set1_ps(8388608.0f));
    __m512 threshold = _mm512_sub_ps(rounded, _mm512_set1_ps(8388607.5f));
    threshold = _mm512_mul_ps(threshold, threshold);
    if (fourth) threshold = _mm512_mul_ps(threshold, threshold);
    const __m512i code = _mm512_castps_si512(rounded);
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

INLINE void encode_signed(const float *restrict m, int8_t *restrict code, float inverse) {
    for (int j = 0; j < BLOCK; j += 64) {
        __m512i codes[4];
        __mmask16 negative[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const __m512 x = _mm512_load_ps(m + j + 16 * i);
            const __m512 y = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(inverse));
            negative[i] = _mm512_movepi32_mask(_mm512_castps_si512(x));
            codes[i] = codes_of(y, y, 0);
        }
        const __m512i all = lowest_bytes(codes);
        _mm512_storeu_si512(code + j, _mm512_mask_sub_epi8(all, joined(negative), _mm512_setzero_si512(), all));
    }
}

INLINE void encode_unsigned(const float *restrict v, const float *restrict root, uint8_t *restrict code, float inverse,
                            float root_of_scaled) {
    for (int j = 0; j < BLOCK; j += 64) {
        __m512i codes[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            codes[i] = codes_of(_mm512_mul_ps(_mm512_load_ps(v + j + 16 * i), _mm512_set1_ps(inverse)),
                                _mm512_mul_ps(_mm512_load_ps(root + j + 16 * i), _mm512_set1_ps(root_of_scaled)), 1);
        _mm512_storeu_si512(code + j, _mm512_max_epu8(lowest_bytes(codes), _mm512_set1_epi8(1)));
    }
}

#else

INLINE uint32_t largest_of_block(const float *restrict x) { return largest_of(x, NULL, 0, BLOCK); }

INLINE void encode_signed(const float *restrict m, int8_t *restrict code, float inverse) {
    for (int j = 0; j < BLOCK; j++) {
        float y = fabsf(m[j]) * inverse;
        int32_t size = (int32_t)code_of(y, low_root(y), 0);
        code[j] = (int8_t)(m[j] < 0 ? -size : size);
    }
}

INLINE void encode_unsigned(const float *restrict v, const float *restrict root, uint8_t *restrict code, float inverse,
                            float root_of_scaled) {
    for (int j = 0; j < BLOCK; j++) {
        uint32_t rounded = code_of(v[j] * inverse, low_root(root[j] * root_of_scaled), 1);
        code[j] = (uint8_t)(rounded > 0x4B000001 ? rounded : 0x4B000001); /* the exponent's bits fall off */
    }
}

#endif

/* A mean of squares has a code of at least 1. */
INLINE void store_8_bit(const Work *restrict work, int8_t *restrict m_code, uint8_t *restrict v_code,
                        float *restrict m_scale, float *restrict v_scale, float correction2, int rule) {
    /* Both slots' divisions come before the loops, which then need not wait for them. */
    float v_inverse = 0, root_of_scaled = 0;
    if (rule == ADAMW) {
        *v_scale = block_scale(largest_of_block(work->v), UNSIGNED_FOURTH);
        v_inverse = *v_scale > 0 ? 1.0f / *v_scale : 0.0f;
        root_of_scaled = sqrtf(v_inverse / correction2);
    }
    *m_scale = block_scale(largest_of_block(work->m), SIGNED_SQUARE);
    encode_signed(work->m, m_code, *m_scale > 0 ? 1.0f / *m_scale : 0.0f);
    if (rule == ADAMW) encode_unsigned(work->v, work->root, v_code, v_inverse, root_of_scaled);
}

INLINE void store_slots(const Work *restrict work, const State *state, int64_t block, float correction2, int rule) {
    const int64_t at = block * BLOCK;
    if (rule == APPLY) return;
    if (state->states == INT8) {
        store_8_bit(work, (int8_t *)state->m + at, (uint8_t *)state->v + at, &state->m_scale[block],
                    &state->v_scale[block], correction2, rule);
    } else if (state->states == BF16) {
        uint16_t *restrict m = (uint16_t *)state->m + at, *restrict v = (uint16_t *)state->v + at;
        for (int j = 0; j < BLOCK; j++) m[j] = to_bf16(work->m[j]);
        for (int j = 0; rule == ADAMW && j < BLOCK; j++) v[j] = to_bf16(work->v[j]);
    } else {
        memcpy((float *)state->m + at, work->m, sizeof work->m);
        if (rule == ADAMW) memcpy((float *)state->v + at, work->v, sizeof work->v);
    }
}

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

/* Moves the slots, from where they are stored to work. */
INLINE void move_slots(Work *restrict work, const void *restrict grad, const void *restrict m_from,
                       const void *restrict v_from, float m_scale, float v_scale, const Step *step, int states,
                       int grad_is_bf16, int rule) {
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
}

INLINE void move_block(Work *restrict work, const Inputs *in, const Step *now, int states, int grad_is_bf16,
                       int rule) {
#define CASE(STATES, IS_BF16) \
    case STATES * 2 + IS_BF16: \
        move_slots(work, in->grad, in->m, in->v, in->m_scale, in->v_scale, now, STATES, IS_BF16, rule); \
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

/* The direction of element j, which the weight goes against. AdamW: m-hat / (sqrt(v-hat) + eps), and the root stays in
 * work. Others: what was computed or given, u[j]. */
INLINE float direction(Work *restrict work, const float *u, int j, const Step *now, int rule) {
    if (rule != ADAMW) return u[j];
    float root = sqrtf(work->v[j] * now->correction2);
    work->root[j] = root;
    return (work->m[j] * now->correction1) / (root + now->eps);
}

/* Rounds the stepped levels to the grid. Drawing and updating alternate in small spans, so that a core multiplies for
 * the one while it divides for the other. Codes are widened before and narrowed after: loops over numbers of one width
 * make better vector code. */
static void round_any(Work *restrict work, const float *u, uint64_t q, const Step *step, const float *per_unit_of,
                      int low, int high, int rule) {
    const Step now = *step;
    uint32_t words[4][SPAN] __attribute__((aligned(64)));
    int32_t levels[BLOCK] __attribute__((aligned(64)));
    for (int j = 0; j < BLOCK; j++) levels[j] = work->code[j] + low;
    for (int start = 0; start < COUNTERS; start += SPAN) {
        draw(words, q + (uint64_t)start, &now);
        for (int i = 0; i < 4; i++) {
            const uint32_t *restrict word = words[i];
            const float per_unit = per_unit_of[i];
            for (int k = 0; k < SPAN; k++) {
                int j = start + COUNTERS * i + k;
                float unit = direction(work, u, j, &now, rule);
                int32_t level = levels[j];
                float d = per_unit * unit - now.decay * (float)level;
                uint32_t size = bits_of(d) & 0x7FFFFFFF;
                float a = float_of(size < LARGEST_STEP_BITS ? size : LARGEST_STEP_BITS);
                int32_t whole = (int32_t)a;
                uint32_t threshold = (uint32_t)((a - (float)whole) * 0x1p32f);
                int32_t moved = word[k] < threshold ? whole + 1 : whole;
                int32_t next = d < 0 ? level - moved : level + moved;
                next = next < low ? low : next;
                levels[j] = next > high ? high : next;
            }
        }
    }
    for (int j = 0; j < BLOCK; j++) work->next[j] = (uint8_t)(levels[j] - low);
}

#if defined(HAS_MASKS)

/* Steps of a level and more: their whole levels are taken here, in bytes that saturate; which of the rests move is
 * returned. `size` is in 2^-32 levels. */
static __attribute__((noinline)) __mmask16 take_whole(uint8_t *next, __m512 size, __m512i word, __mmask16 down) {
    const __m512 a = _mm512_mul_ps(size, _mm512_set1_ps(0x1p-32f));
    const __m512i whole = _mm512_cvttps_epi32(a); /* what is too large for it becomes 2^31, unsigned */
    const __m512 rest = _mm512_mul_ps(_mm512_sub_ps(a, _mm512_cvtepi32_ps(whole)), _mm512_set1_ps(0x1p32f));
    const __m128i levels = _mm512_cvtusepi32_epi8(whole), old = _mm_loadu_si128((const __m128i *)next);
    const __m128i up = _mm_adds_epu8(old, levels);
    _mm_storeu_si128((__m128i *)next, _mm_mask_subs_epu8(up, down, old, levels));
    return _mm512_cmplt_epu32_mask(word, _mm512_cvttps_epu32(rest));
}

/* The same in units of 2^-32 levels, where a step's bits are its threshold and most steps are below a level: which
 * elements move is a mask, and bytes that saturate at the grid's ends move by it. */
INLINE void round_fast(Work *restrict work, const float *u, uint64_t q, const Step *step, const float *per_unit_of,
                       int low, int high, int rule) {
    uint32_t words[4][SPAN] __attribute__((aligned(64)));
    __mmask16 moved[4][4], down[4][4];
    const __m512 level = _mm512_set1_ps(0x1p32f), decay = _mm512_set1_ps(step->decay * 0x1p32f);
    memcpy(work->next, work->code, BLOCK);
    for (int start = 0; start < COUNTERS; start += SPAN) {
        draw(words, q + (uint64_t)start, step);
        for (int i = 0; i < 4; i++) {
            const __m512 per_unit = _mm512_set1_ps(per_unit_of[i] * 0x1p32f);
#pragma GCC unroll 4
            for (int k = 0; k < SPAN; k += 16) {
                const int j = start + COUNTERS * i + k, part = (start + k) / 16;
                __m512 unit;
                if (rule == ADAMW) {
                    const __m512 root =
                        _mm512_sqrt_ps(_mm512_load_ps(work->v + j) * _mm512_set1_ps(step->correction2));
                    _mm512_store_ps(work->root + j, root);
                    unit = _mm512_load_ps(work->m + j) * _mm512_set1_ps(step->correction1) /
                           (root + _mm512_set1_ps(step->eps));
                } else {
                    unit = _mm512_loadu_ps(u + j);
                }
                const __m512i code = _mm512_cvtepu8_epi32(_mm_load_si128((const __m128i *)(work->code + j)));
                const __m512 old = _mm512_cvtepi32_ps(_mm512_add_epi32(code, _mm512_set1_epi32(low)));
                const __m512 d = per_unit * unit - decay * old, size = _mm512_abs_ps(d);
                const __m512i word = _mm512_load_si512(words[i] + k);
                down[i][part] = _mm512_movepi32_mask(_mm512_castps_si512(d));
                moved[i][part] = _mm512_cmplt_epu32_mask(word, _mm512_cvttps_epu32(size));
                if (__builtin_expect(_mm512_cmp_ps_mask(size, level, _CMP_GE_OQ) != 0, 0))
                    moved[i][part] = take_whole(work->next + j, size, word, down[i][part]);
            }
        }
    }
    const __m512i one = _mm512_set1_epi8(1), top = _mm512_set1_epi8((char)(high - low));
    for (int i = 0; i < 4; i++) {
        const __mmask64 moves = joined(moved[i]), falls = joined(down[i]);
        __m512i next = _mm512_load_si512(work->next + PLANE * i);
        next = _mm512_mask_adds_epu8(next, moves & ~falls, next, one);
        next = _mm512_mask_subs_epu8(next, moves & falls, next, one);
        _mm512_store_si512(work->next + PLANE * i, _mm512_min_epu8(next, top));
    }
}

#endif

INLINE void update_levels(Work *restrict work, const float *u, uint64_t q, const Step *step,
                          const float *minus_levels_per_unit /* [4] */, int low, int high, int rule) {
#if defined(HAS_MASKS)
    float largest = 0;
    for (int i = 0; i < 4; i++) largest = fmaxf(largest, fabsf(minus_levels_per_unit[i]));
    if (__builtin_expect(largest < 0x1p90f, 1)) { /* its product with 2^32 is a float */
        round_fast(work, u, q, step, minus_levels_per_unit, low, high, rule);
        return;
    }
#endif
    round_any(work, u, q, step, minus_levels_per_unit, low, high, rule);
}

/* The scale of each plane of block `place` of the whole tensor, by at most one division. */
INLINE void scales_of_block(float *of_plane /* [4] */, const float *scale, const Shard *shard, int64_t place) {
    int64_t number = 0, within = 0;
    if (shard->n_scales > 1) {
        number = place * BLOCK / shard->scale_every;
        within = place * BLOCK - number * shard->scale_every;
    }
    for (int i = 0; i < 4; i++) {
        of_plane[i] = scale[number];
        within += PLANE;
        if (within == shard->scale_every) {
            within = 0;
            number++;
        }
    }
}

INLINE int64_t step_codes(uint8_t *codes, const float *scale, const State *state, const Shard *shard, const Step *now,
                          int64_t block, int rule) {
    Work work;
    const int64_t place = shard->first_block + block;
    uint8_t *packed = codes + block * BLOCK * shard->bits / 8;
    const Inputs in = inputs_of(state, block, rule);
    prefetch_inputs(&in, state, rule);
    prefetch(packed, BLOCK * shard->bits / 8);
    float per_unit[4];
    scales_of_block(per_unit, scale, shard, place);
    for (int i = 0; i < 4; i++) per_unit[i] = -(now->lr / per_unit[i]);
    unpack_block(packed, work.code, shard->bits);
    move_block(&work, &in, now, state->states, state->grad_is_bf16, rule);
    update_levels(&work, rule == APPLY ? (const float *)in.grad : work.u, (uint64_t)place * COUNTERS, now, per_unit,
                  shard->low, shard->high, rule);
    pack_block(packed, work.next, shard->bits);
    store_slots(&work, state, block, now->correction2, rule);
    return count_changes(work.code, work.next);
}

INLINE void step_weights(float *restrict weight, const State *state, const Step *step, int64_t block, int rule) {
    Work work;
    const Inputs in = inputs_of(state, block, rule);
    prefetch_inputs(&in, state, rule);
    prefetch(weight, BLOCK * sizeof(float));
    move_block(&work, &in, step, state->states, state->grad_is_bf16, rule);
    const float *u = rule == APPLY ? (const float *)in.grad : work.u;
    const Step now = *step;
    for (int j = 0; j < BLOCK; j++) weight[j] = weight[j] * now.keep - direction(&work, u, j, &now, rule) * now.lr;
    store_slots(&work, state, block, now.correction2, rule);
}

/* A run of blocks by each rule. */
#define SPECIALISED(NAME, RULE) \
    static int64_t NAME##_codes(uint8_t *codes, const float *scale, const State *state, const Shard *shard, \
                                const Step *now, int64_t block, int64_t end) { \
        int64_t flips = 0; \
        for (; block < end; block++) flips += step_codes(codes, scale, state, shard, now, block, RULE); \
        return flips; \
    } \
    static void NAME##_weights(float *weight, const State *state, const Step *now, int64_t block, int64_t end) { \
        for (; block < end; block++) step_weights(weight + block * BLOCK, state, now, block, RULE); \
    }
SPECIALISED(adamw, ADAMW)
SPECIALISED(lion, LION)
SPECIALISED(apply, APPLY)

typedef int64_t StepCodes(uint8_t *, const float *, const State *, const Shard *, const Step *, int64_t, int64_t);
typedef void StepWeights(float *, const State *, const Step *, int64_t, int64_t);

INLINE int64_t end_of(int64_t block, int64_t n_blocks) { return block + RUN < n_blocks ? block + RUN : n_blocks; }

/* One step of the codes of a shard; how many changed. */
int64_t lowbit_step_codes(uint8_t *codes, const float *scale, const State *state, const Shard *shard, const Step *now,
                          int32_t rule) {
    StepCodes *const step_run =
        (StepCodes *[]){[ADAMW] = adamw_codes, [LION] = lion_codes, [APPLY] = apply_codes}[rule];
    int64_t flips = 0;
#pragma omp parallel for schedule(static) reduction(+ : flips) num_threads(shard->n_threads) \
    if (shard->n_blocks >= PARALLEL_BLOCKS)
    for (int64_t block = 0; block < shard->n_blocks; block += RUN)
        flips += step_run(codes, scale, state, shard, now, block, end_of(block, shard->n_blocks));
    return flips;
}

/* How codes keep their residuals; see `Accumulator` in targets.py. */
typedef struct {
    void *values; /* of the shard: int8 counts, or levels in bfloat16 */
    float reach, threshold; /* levels */
    float kept, per_level; /* levels that a value of 1 is still worth; the value of a level */
    int32_t resets, is_bf16;
} Residual;

INLINE float residual_of(const void *values, int j, int is_bf16) {
    return is_bf16 ? from_bf16(((const uint16_t *)values)[j]) : (float)((const int8_t *)values)[j];
}

/* Rounded by chance: to a whole count, or to bfloat16, which is the upper half of a float. */
INLINE void store_residual(void *values, int j, float rest, uint32_t word, int is_bf16) {
    if (is_bf16) {
        ((uint16_t *)values)[j] = (uint16_t)((bits_of(rest) + (word >> 16)) >> 16);
        return;
    }
    float whole = floorf(rest);
    /* A fraction just below 1 is 1 in float32, which no word reaches. */
    uint64_t threshold = (uint64_t)((rest - whole) * 0x1p32f);
    int32_t count = (int32_t)whole + (word < threshold);
    count = count < -127 ? -127 : count;
    ((int8_t *)values)[j] = (int8_t)(count > 127 ? 127 : count);
}

/* Moves level + residual by -lr u: the level changes where the sum is beyond its threshold. */
INLINE int64_t accumulate_block(uint8_t *packed, void *restrict values, const float *restrict u,
                                const float *of_plane, const Residual *kept, const Shard *shard, const Step *step,
                                uint64_t q, int is_bf16) {
    Work work;
    const Step now = *step;
    const Residual by = *kept;
    const int32_t low = shard->low, high = shard->high;
    uint32_t words[4][SPAN] __attribute__((aligned(64)));
    unpack_block(packed, work.code, shard->bits);
    for (int start = 0; start < COUNTERS; start += SPAN) {
        draw(words, q + (uint64_t)start, &now);
        for (int i = 0; i < 4; i++) {
            const uint32_t *restrict word = words[i];
            const float levels_per_unit = now.lr / of_plane[i];
            for (int k = 0; k < SPAN; k++) {
                int j = start + COUNTERS * i + k;
                float level = (float)(work.code[j] + low);
                float x = level + residual_of(values, j, is_bf16) * by.kept;
                x = x * now.keep - levels_per_unit * u[j];
                float next = fabsf(x - level) > by.threshold ? rintf(x) : level;
                next = next < (float)low ? (float)low : next;
                next = next > (float)high ? (float)high : next;
                float rest = x - next;
                rest = rest < -by.reach ? -by.reach : rest;
                rest = rest > by.reach ? by.reach : rest;
                rest = rest * by.per_level;
                rest = by.resets && next != level ? 0.0f : rest;
                store_residual(values, j, rest, word[k], is_bf16);
                work.next[j] = (uint8_t)((int32_t)next - low);
            }
        }
    }
    pack_block(packed, work.next, shard->bits);
    return count_changes(work.code, work.next);
}

int64_t lowbit_accumulate(uint8_t *codes, const float *scale, const float *u, const Residual *kept,
                          const Shard *shard, const Step *now) {
    int64_t flips = 0;
#pragma omp parallel for schedule(static) reduction(+ : flips) num_threads(shard->n_threads) \
    if (shard->n_blocks >= PARALLEL_BLOCKS)
    for (int64_t block = 0; block < shard->n_blocks; block++) {
        const int64_t place = shard->first_block + block, at = block * BLOCK;
        const uint64_t q = (uint64_t)place * COUNTERS;
        uint8_t *packed = codes + at * shard->bits / 8;
        char *values = (char *)kept->values + at * (kept->is_bf16 ? 2 : 1);
        float of_plane[4];
        scales_of_block(of_plane, scale, shard, place);
        flips += kept->is_bf16 ? accumulate_block(packed, values, u + at, of_plane, kept, shard, now, q, 1)
                               : accumulate_block(packed, values, u + at, of_plane, kept, shard, now, q, 0);
    }
    return flips;
}

/* Copies `n` elements that may not be there. */
INLINE void copy(void *to, const void *from, size_t n, size_t width) {
    if (to && from) memcpy(to, from, n * width);
}

/* The last `n` < BLOCK elements, by way of a whole block whose other elements are 0. */
static void step_short_block(StepWeights *step_run, float *weight, const State *state, int64_t block, size_t n,
                             const Step *now) {
    float grad[BLOCK] = {0}, m[BLOCK] = {0}, v[BLOCK] = {0}, whole[BLOCK] = {0};
    const size_t at = (size_t)block * BLOCK;
    const size_t width = state->states == FP32 ? 4 : state->states == BF16 ? 2 : 1;
    const size_t grad_width = state->grad_is_bf16 ? 2 : 4;
    char *m_at = state->m ? (char *)state->m + at * width : NULL;
    char *v_at = state->v ? (char *)state->v + at * width : NULL;
    float *m_scale = state->m_scale ? state->m_scale + block : NULL;
    float *v_scale = state->v_scale ? state->v_scale + block : NULL;
    const State only = {m, v, m_scale, v_scale, grad, state->states, state->grad_is_bf16};
    copy(grad, (const char *)state->grad + at * grad_width, n, grad_width);
    copy(m, m_at, n, width);
    copy(v, v_at, n, width);
    copy(whole, weight + at, n, sizeof(float));

    step_run(whole, &only, now, 0, 1);

    copy(m_at, m, n, width);
    copy(v_at, v, n, width);
    copy(weight + at, whole, n, sizeof(float));
}

/* One step of `n` ordinary weights. */
void lowbit_step_weights(float *weight, const State *state, int64_t n, int32_t n_threads, const Step *now,
                         int32_t rule) {
    StepWeights *const step_run =
        (StepWeights *[]){[ADAMW] = adamw_weights, [LION] = lion_weights, [APPLY] = apply_weights}[rule];
    const int64_t n_blocks = n / BLOCK;
#pragma omp parallel for schedule(static) num_threads(n_threads) if (n_blocks >= PARALLEL_BLOCKS)
    for (int64_t block = 0; block < n_blocks; block += RUN)
        step_run(weight, state, now, block, end_of(block, n_blocks));
    if (n % BLOCK) step_short_block(step_run, weight, state, n_blocks, (size_t)(n % BLOCK), now);
}

static void scale_levels(const uint8_t *restrict code, int low, const float *restrict of_plane, float *restrict out) {
    for (int i = 0; i < BLOCK; i += PLANE)
        for (int j = i; j < i + PLANE; j++) out[j] = (float)(code[j] + low) * of_plane[i / PLANE];
}

static void scale_levels_bf16(const uint8_t *restrict code, int low, const float *restrict of_plane,
                              uint16_t *restrict out) {
    for (int i = 0; i < BLOCK; i += PLANE)
        for (int j = i; j < i + PLANE; j++) out[j] = to_bf16((float)(code[j] + low) * of_plane[i / PLANE]);
}

void lowbit_decode(const uint8_t *codes, const float *scale, void *out, int32_t out_is_bf16, const Shard *shard) {
#pragma omp parallel for schedule(static) num_threads(shard->n_threads) if (shard->n_blocks >= PARALLEL_BLOCKS)
    for (int64_t block = 0; block < shard->n_blocks; block++) {
        uint8_t code[BLOCK] __attribute__((aligned(64)));
        float of_plane[4];
        scales_of_block(of_plane, scale, shard, shard->first_block + block);
        unpack_block(codes + block * BLOCK * shard->bits / 8, code, shard->bits);
        if (out_is_bf16)
            scale_levels_bf16(code, shard->low, of_plane, (uint16_t *)out + block * BLOCK);
        else
            scale_levels(code, shard->low, of_plane, (float *)out + block * BLOCK);
    }
}

/* The codes of the level nearest to each weight, ties to the even one. */
void lowbit_encode(const float *restrict weight, const float *scale, uint8_t *restrict codes, const Shard *shard) {
    const float low = (float)shard->low, high = (float)shard->high;
#pragma omp parallel for schedule(static) num_threads(shard->n_threads) if (shard->n_blocks >= PARALLEL_BLOCKS)
    for (int64_t block = 0; block < shard->n_blocks; block++) {
        uint8_t code[BLOCK] __attribute__((aligned(64)));
        float of_plane[4];
        scales_of_block(of_plane, scale, shard, shard->first_block + block);
        for (int i = 0; i < BLOCK; i += PLANE)
            for (int j = i; j < i + PLANE; j++) {
                float nearest = rintf(weight[block * BLOCK + j] / of_plane[i / PLANE]);
                nearest = nearest < low ? low : nearest;
                nearest = nearest > high ? high : nearest;
                code[j] = (uint8_t)((int8_t)(int32_t)nearest - shard->low); /* of a NaN 0's, as in PyTorch */
            }
        pack_block(codes + block * BLOCK * shard->bits / 8, code, shard->bits);
    }
}

void lowbit_pack(const int8_t *restrict levels, uint8_t *restrict codes, const Shard *shard) {
#pragma omp parallel for schedule(static) num_threads(shard->n_threads) if (shard->n_blocks >= PARALLEL_BLOCKS)
    for (int64_t block = 0; block < shard->n_blocks; block++) {
        uint8_t code[BLOCK] __attribute__((aligned(64)));
        for (int j = 0; j < BLOCK; j++) code[j] = (uint8_t)(levels[block * BLOCK + j] - shard->low);
        pack_block(codes + block * BLOCK * shard->bits / 8, code, shard->bits);
    }
}

void lowbit_unpack(const uint8_t *restrict codes, int8_t *restrict levels, const Shard *shard) {
#pragma omp parallel for schedule(static) num_threads(shard->n_threads) if (shard->n_blocks >= PARALLEL_BLOCKS)
    for (int64_t block = 0; block < shard->n_blocks; block++) {
        uint8_t code[BLOCK] __attribute__((aligned(64)));
        unpack_block(codes + block * BLOCK * shard->bits / 8, code, shard->bits);
        for (int j = 0; j < BLOCK; j++) levels[block * BLOCK + j] = (int8_t)(code[j] + shard->low);
    }
}

/* Adds to counts[high - low + 1] how often each level occurs. */
void lowbit_code_counts(const uint8_t *codes, int64_t *counts, const Shard *shard) {
    for (int64_t block = 0; block < shard->n_blocks; block++) {
        uint8_t code[BLOCK] __attribute__((aligned(64)));
        unpack_block(codes + block * BLOCK * shard->bits / 8, code, shard->bits);
        if (shard->bits <= 4) {
            for (int wanted = 0; wanted <= shard->high - shard->low; wanted++) {
                int32_t count = 0;
                for (int j = 0; j < BLOCK; j++) count += code[j] == wanted;
                counts[wanted] += count;
            }
        } else {
            for (int j = 0; j < BLOCK; j++) counts[code[j]]++;
        }
    }
}
