/* The ops of reference.py and states.py for CPU workers, with the rules of optim/adamw.py and optim/lion.py fused in:
 * the same bytes; see there for what they mean.
 *
 * Work goes block by block (256 elements), through arrays that stay in the first-level cache. Loops over a block are
 * plain ones that compilers turn into vector code; where that is slow, AVX-512 is written out beside (HAS_MASKS). Slots
 * are in slots.h, random words in philox.h. Two things keep the bytes those of the reference: no
 * contraction into fused multiply-adds (-ffp-contract=off) and IEEE division and square root.
 *
 * What a block goes through is written once; `rule`, `states` and `grad_is_bf16` are arguments of functions that are
 * always inlined, and constants where those are called.
 */
#include "philox.h"
#include "slots.h"


#define LARGEST_STEP_BITS 0x47800000u /* of 65536.0f */

/* A call on fewer blocks than this is not worth waking threads. */
#define PARALLEL_BLOCKS 512
/* Blocks that a thread takes at a time. */
#define RUN 64

/* Element e of the whole tensor has scale[e / scale_every]; a shard begins at block `first_block`. */
typedef struct {
    int32_t low, high, bits, n_threads;
    int64_t n_blocks, first_block, scale_every, n_scales;
} Shard;

/* A block's codes between storage and work, where each is a byte. */
INLINE void unpack_block(const uint8_t *restrict packed, uint8_t *restrict code, int bits) {
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

INLINE void pack_block(uint8_t *restrict packed, const uint8_t *restrict code, int bits) {
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
#if defined(HAS_MASKS)
    int64_t sum = 0;
    for (int j = 0; j < BLOCK; j += 64)
        sum += __builtin_popcountll(_mm512_cmpneq_epu8_mask(_mm512_load_si512(old + j), _mm512_load_si512(new + j)));
    return sum;
#else
    uint8_t changes[PLANE];
    int32_t sum = 0;
    for (int j = 0; j < PLANE; j++)
        changes[j] = (uint8_t)((old[j] != new[j]) + (old[j + 64] != new[j + 64]) + (old[j + 128] != new[j + 128]) +
                               (old[j + 192] != new[j + 192]));
    for (int j = 0; j < PLANE; j++) sum += changes[j];
    return sum;
#endif
}

/* The direction of element j, which the weight goes against. AdamW: m-hat / (sqrt(v-hat) + eps). Others: what was
 * computed or given, u[j]. */
INLINE float direction(const Work *restrict work, const float *u, int j, const Step *now, int rule) {
    if (rule != ADAMW) return u[j];
    return (work->m[j] * now->correction1) / (sqrtf(work->v[j] * now->correction2) + now->eps);
}

/* Rounds the stepped levels to the grid. Words are drawn a span ahead of the elements that they round: a core then
 * multiplies for the one while it divides for the other. At first those of counters q to q + SPAN - 1 are there.
 *
 * Codes are widened before and narrowed after: loops over numbers of one width make better vector code. */
INLINE void round_any(Work *restrict work, Words *restrict words, const float *u, uint64_t q, const Step *step,
                      const Stream *stream, const float *per_unit_of, int low, int high, int rule,
                      int towards_nearest) {
    const Step now = *step;
    int32_t levels[BLOCK] __attribute__((aligned(64)));
    for (int j = 0; j < BLOCK; j++) levels[j] = work->level[j];
    for (int start = 0; start < COUNTERS; start += SPAN) {
        for (int i = 0; i < 4; i++) {
            const uint32_t *restrict word = words->of[i];
            const float per_unit = per_unit_of[i];
            for (int k = 0; k < SPAN; k++) {
                int j = start + COUNTERS * i + k;
                float unit = direction(work, u, j, &now, rule);
                int32_t level = levels[j];
                float d = per_unit * unit - now.decay * (float)level;
                uint32_t size = bits_of(d) & 0x7FFFFFFF;
                float a = float_of(size < LARGEST_STEP_BITS ? size : LARGEST_STEP_BITS);
                int32_t whole = (int32_t)a;
                float chance = a - (float)whole;
                if (towards_nearest) {
                    chance = (chance - now.nearest_from) * now.nearest_slope;
                    chance = chance < 0 ? 0 : chance;
                    whole += chance >= 1;
                    chance = chance < 1 ? chance : 0;
                }
                uint32_t threshold = (uint32_t)(chance * 0x1p32f);
                int32_t moved = word[k] < threshold ? whole + 1 : whole;
                int32_t next = d < 0 ? level - moved : level + moved;
                next = next < low ? low : next;
                levels[j] = next > high ? high : next;
            }
        }
        draw(words, stream, q + (uint64_t)(start + SPAN));
    }
    for (int j = 0; j < BLOCK; j++) work->next[j] = (uint8_t)(levels[j] - low);
}

#if defined(HAS_MASKS)

/* Steps of a level and more: their whole levels are taken here, in bytes that saturate; which of the rests move is
 * returned. `size` is in 2^-32 levels. */
INLINE __mmask16 take_whole(uint8_t *next, __m512 size, __m512i word, __mmask16 down) {
    const __m512 a = _mm512_mul_ps(size, _mm512_set1_ps(0x1p-32f));
    const __m512i whole = _mm512_cvttps_epi32(a); /* what is too large for it becomes 2^31, unsigned */
    const __m512 rest = _mm512_mul_ps(_mm512_sub_ps(a, _mm512_cvtepi32_ps(whole)), _mm512_set1_ps(0x1p32f));
    const __m128i levels = _mm512_cvtusepi32_epi8(whole), old = _mm_loadu_si128((const __m128i *)next);
    const __m128i up = _mm_adds_epu8(old, levels);
    _mm_storeu_si128((__m128i *)next, _mm_mask_subs_epu8(up, down, old, levels));
    return _mm512_cmplt_epu32_mask(word, _mm512_cvttps_epu32(rest));
}

/* The same in units of 2^-32 levels, where a step's bits are its threshold and most steps are below a level: which
 * elements move is a mask, and bytes that saturate at the grid's ends move by it. Every 16 elements a round of the next
 * words is mixed. */
INLINE void round_fast(Work *restrict work, Words *restrict words, const float *u, uint64_t q, const Step *step,
                       const Stream *stream, const float *per_unit_of, int low, int high, int rule) {
    uint64_t moves[4] = {0}, falls[4] = {0};
    const __m512 level = _mm512_set1_ps(0x1p32f), decay = _mm512_set1_ps(step->decay * 0x1p32f);
    memcpy(work->next, work->code, BLOCK);
    for (int start = 0; start < COUNTERS; start += SPAN) {
        Drawing drawing;
        begin_drawing(&drawing, stream, q + (uint64_t)(start + SPAN));
#pragma GCC unroll 8
        for (int round = 0; round < 8; round++) {
            mix(&drawing, stream, round);
            const int i = round / 2, k = round % 2 * 16, at = start + k, j = PLANE * i + at;
            const __m512 per_unit = _mm512_set1_ps(per_unit_of[i] * 0x1p32f);
            __m512 unit;
            if (rule == ADAMW) {
                const __m512 v_hat = _mm512_mul_ps(_mm512_load_ps(work->v + j), _mm512_set1_ps(step->correction2));
                const __m512 m_hat = _mm512_mul_ps(_mm512_load_ps(work->m + j), _mm512_set1_ps(step->correction1));
                unit = _mm512_div_ps(m_hat, _mm512_add_ps(_mm512_sqrt_ps(v_hat), _mm512_set1_ps(step->eps)));
            } else {
                unit = _mm512_loadu_ps(u + j);
            }
            const __m512i old = _mm512_cvtepi8_epi32(_mm_load_si128((const __m128i *)(work->level + j)));
            const __m512 d = per_unit * unit - decay * _mm512_cvtepi32_ps(old), size = _mm512_abs_ps(d);
            const __m512i word = _mm512_load_si512(words->of[i] + k);
            const __mmask16 down = _mm512_movepi32_mask(_mm512_castps_si512(d));
            __mmask16 moved = _mm512_cmplt_epu32_mask(word, _mm512_cvttps_epu32(size));
            if (__builtin_expect(_mm512_cmp_ps_mask(size, level, _CMP_GE_OQ) != 0, 0))
                moved = take_whole(work->next + j, size, word, down);
            moves[i] |= (uint64_t)moved << at;
            falls[i] |= (uint64_t)down << at;
        }
        mix(&drawing, stream, 8);
        end_drawing(&drawing, stream, words);
    }
    const __m512i one = _mm512_set1_epi8(1), top = _mm512_set1_epi8((char)(high - low));
    for (int i = 0; i < 4; i++) {
        __m512i next = _mm512_load_si512(work->next + PLANE * i);
        next = _mm512_mask_adds_epu8(next, moves[i] & ~falls[i], next, one);
        next = _mm512_mask_subs_epu8(next, moves[i] & falls[i], next, one);
        _mm512_store_si512(work->next + PLANE * i, _mm512_min_epu8(next, top));
    }
}

#endif

static void round_slowly(Work *restrict work, Words *restrict words, const float *u, uint64_t q, const Step *step,
                         const Stream *stream, const float *per_unit_of, int low, int high, int rule) {
    if (step->nearest_from == 0)
        round_any(work, words, u, q, step, stream, per_unit_of, low, high, rule, 0);
    else
        round_any(work, words, u, q, step, stream, per_unit_of, low, high, rule, 1);
}

INLINE void update_levels(Work *restrict work, Words *restrict words, const float *u, uint64_t q, const Step *step,
                          const Stream *stream, const float *minus_levels_per_unit /* [4] */, int low, int high,
                          int rule) {
#if defined(HAS_MASKS)
    int fits = step->nearest_from == 0;
    for (int i = 0; i < 4; i++) /* times 2^32, each is a float */
        fits &= fabsf(minus_levels_per_unit[i]) < 0x1p90f;
    if (__builtin_expect(fits, 1)) {
        round_fast(work, words, u, q, step, stream, minus_levels_per_unit, low, high, rule);
        return;
    }
#endif
    round_slowly(work, words, u, q, step, stream, minus_levels_per_unit, low, high, rule);
}

/* How codes keep their residuals; see `Accumulator` in targets.py. */
typedef struct {
    void *values; /* of the shard: int8 counts, or levels in bfloat16 */
    float kept, per_level; /* levels that a value of 1 is still worth; the value of a level */
    float reach, threshold; /* levels */
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

/* Moves level + residual by -lr u: the level changes where the sum is beyond its threshold. Words as in round_any. */
INLINE void accumulate(Work *restrict work, Words *restrict words, void *restrict values, const float *restrict u,
                       uint64_t q, const Step *step, const Stream *stream, const Residual *kept, const float *of_plane,
                       int low, int high, int is_bf16) {
    const Step now = *step;
    const Residual by = *kept;
    for (int start = 0; start < COUNTERS; start += SPAN) {
        for (int i = 0; i < 4; i++) {
            const uint32_t *restrict word = words->of[i];
            const float levels_per_unit = now.lr / of_plane[i];
            for (int k = 0; k < SPAN; k++) {
                int j = start + COUNTERS * i + k;
                float level = (float)work->level[j];
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
                work->next[j] = (uint8_t)((int32_t)next - low);
            }
        }
        draw(words, stream, q + (uint64_t)(start + SPAN));
    }
}

static void accumulate_levels(Work *restrict work, Words *restrict words, const float *u, int64_t block, uint64_t q,
                              const Step *step, const Stream *stream, const Residual *kept, const float *of_plane,
                              int low, int high) {
    char *values = (char *)kept->values + block * BLOCK * (kept->is_bf16 ? 2 : 1);
    if (kept->is_bf16)
        accumulate(work, words, values, u, q, step, stream, kept, of_plane, low, high, 1);
    else
        accumulate(work, words, values, u, q, step, stream, kept, of_plane, low, high, 0);
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

INLINE int64_t step_codes(uint8_t *codes, const float *scale, const State *state, const Residual *kept,
                          const Shard *shard, const Step *now, const Stream *stream, Words *restrict words,
                          int64_t block, int rule) {
    Work work;
    const int64_t place = shard->first_block + block;
    const uint64_t q = (uint64_t)place * COUNTERS;
    const int low = shard->low, high = shard->high;
    uint8_t *packed = codes + block * BLOCK * shard->bits / 8;
    const Inputs in = inputs_of(state, block, rule);
    prefetch_inputs(&in, state, rule);
    prefetch(packed, BLOCK * shard->bits / 8);
    float of_plane[4], per_unit[4];
    scales_of_block(of_plane, scale, shard, place);
    for (int i = 0; i < 4; i++) per_unit[i] = -(now->lr / of_plane[i]);
    unpack_block(packed, work.code, shard->bits);
    for (int j = 0; j < BLOCK; j++) work.level[j] = (int8_t)(work.code[j] + low);
    move_block(&work, &in, now, state->states, state->grad_is_bf16, rule);
    const Scales scales = scales_of_slots(&work, state->states, rule);
    const float *u = rule == APPLY ? (const float *)in.grad : work.u;
    if (kept) {
        for (int j = 0; rule == ADAMW && j < BLOCK; j++) work.u[j] = direction(&work, u, j, now, rule);
        accumulate_levels(&work, words, u, block, q, now, stream, kept, of_plane, low, high);
    } else {
        update_levels(&work, words, u, q, now, stream, per_unit, low, high, rule);
    }
    pack_block(packed, work.next, shard->bits);
    store_slots(&work, state, &scales, block, rule);
    return count_changes(work.code, work.next);
}

INLINE void step_weights(float *restrict weight, const State *state, const Step *step, int64_t block, int rule) {
    Work work;
    const Inputs in = inputs_of(state, block, rule);
    prefetch_inputs(&in, state, rule);
    prefetch(weight, BLOCK * sizeof(float));
    move_block(&work, &in, step, state->states, state->grad_is_bf16, rule);
    const Scales scales = scales_of_slots(&work, state->states, rule);
    const float *u = rule == APPLY ? (const float *)in.grad : work.u;
    const Step now = *step;
    for (int j = 0; j < BLOCK; j++) weight[j] = weight[j] * now.keep - direction(&work, u, j, &now, rule) * now.lr;
    store_slots(&work, state, &scales, block, rule);
}

/* A run of blocks by each rule. */
#define SPECIALISED(NAME, RULE) \
    static int64_t NAME##_codes(uint8_t *codes, const float *scale, const State *state, const Residual *kept, \
                                const Shard *shard, const Step *now, const Stream *stream, int64_t block, \
                                int64_t end) { \
        int64_t flips = 0; \
        Words words; \
        draw(&words, stream, (uint64_t)(shard->first_block + block) * COUNTERS); \
        for (; block < end; block++) \
            flips += step_codes(codes, scale, state, kept, shard, now, stream, &words, block, RULE); \
        return flips; \
    } \
    static void NAME##_weights(float *weight, const State *state, const Step *now, int64_t block, int64_t end) { \
        for (; block < end; block++) step_weights(weight + block * BLOCK, state, now, block, RULE); \
    }
SPECIALISED(adamw, ADAMW)
SPECIALISED(lion, LION)
SPECIALISED(apply, APPLY)

typedef int64_t StepCodes(uint8_t *, const float *, const State *, const Residual *, const Shard *, const Step *,
                          const Stream *, int64_t, int64_t);
typedef void StepWeights(float *, const State *, const Step *, int64_t, int64_t);

INLINE int64_t end_of(int64_t block, int64_t n_blocks) { return block + RUN < n_blocks ? block + RUN : n_blocks; }

/* One step of the codes of a shard, which are rounded or, if `kept` is not NULL, keep residuals; how many changed. */
int64_t lowbit_step_codes(uint8_t *codes, const float *scale, const State *state, const Residual *kept,
                          const Shard *shard, const Step *now, int32_t rule) {
    StepCodes *const step_run =
        (StepCodes *[]){[ADAMW] = adamw_codes, [LION] = lion_codes, [APPLY] = apply_codes}[rule];
    const Stream stream = stream_of(now->key0, now->key1, now->step, now->tensor);
    int64_t flips = 0;
#pragma omp parallel for schedule(static) reduction(+ : flips) num_threads(shard->n_threads) \
    if (shard->n_blocks >= PARALLEL_BLOCKS)
    for (int64_t block = 0; block < shard->n_blocks; block += RUN)
        flips += step_run(codes, scale, state, kept, shard, now, &stream, block, end_of(block, shard->n_blocks));
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
