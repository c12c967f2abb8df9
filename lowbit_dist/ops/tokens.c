/* Tokens in integers, and what these stand for, in one pass each, as reference.py's `round_tokens` and `token_values`:
 * the same bytes.
 *
 * A level is divided by `per_unit` as a product with its reciprocal, which multiply-adds then correct to the quotient,
 * as in device_functions.py; or, at the ends of float's range and on processors without them, in double, rounded to
 * float. For a level has at most 7 binary digits and `per_unit` 24, so that their quotient is at least 2^-49 of itself
 * away from the middle between two floats; the product in double is at most 2^-52 of it away from the quotient.
 */
#include "cpu.h"

#if defined(__FMA__)
#define CORRECTS(per_unit) ((per_unit) > 1e-30f && (per_unit) < 1e30f)
#else
#define CORRECTS(per_unit) 0
#endif

/* Of one that is no NaN. */
INLINE uint16_t number_to_bf16(float x) {
    const uint32_t bits = bits_of(x);
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

INLINE float corrected(float level, float per_unit, float inverse) {
    const float q = level * inverse;
    return fmaf(fmaf(-q, per_unit, level), inverse, q);
}

INLINE void round_row(const float *wide, const uint16_t *half, int is_bf16, int64_t n, int32_t top, float least,
                      int8_t *restrict levels, float *restrict per_unit) {
    const uint32_t largest = largest_of(wide, half, is_bf16, n);
    if (largest >= 0x7F800000) { /* not finite: NaN, whatever the levels */
        *per_unit = float_of(0x7FC00000);
        memset(levels, 0, (size_t)n);
        return;
    }
    const float most = float_of(largest), scale = 1.0f / (most < least ? least : most) * (float)top;
    *per_unit = scale;
    for (int64_t k = 0; k < n; k++) {
        const float x = is_bf16 ? from_bf16(half[k]) : wide[k];
        levels[k] = (int8_t)(int32_t)rintf(x * scale);
    }
}

static void round_floats(const void *x, int64_t n, int32_t top, float least, int8_t *levels, float *per_unit) {
    round_row(x, NULL, 0, n, top, least, levels, per_unit);
}

static void round_halves(const void *x, int64_t n, int32_t top, float least, int8_t *levels, float *per_unit) {
    round_row(NULL, x, 1, n, top, least, levels, per_unit);
}

void lowbit_round_token(const void *x, int32_t is_bf16, int64_t n, int32_t top, float least, int8_t *levels,
                        float *per_unit) {
    (is_bf16 ? round_halves : round_floats)(x, n, top, least, levels, per_unit);
}

/* What a token's levels stand for; `out` begins at the token. */
static void values_of(const int8_t *restrict level, float units, void *restrict out, int32_t is_bf16, int64_t n) {
    const float inverse = 1.0f / units;
    const double unit = 1.0 / (double)units;
    uint16_t *restrict half = out;
    float *restrict wide = out;
    if (CORRECTS(units) && is_bf16)
        for (int64_t k = 0; k < n; k++) half[k] = number_to_bf16(corrected((float)level[k], units, inverse));
    else if (CORRECTS(units))
        for (int64_t k = 0; k < n; k++) wide[k] = corrected((float)level[k], units, inverse);
    else if (is_bf16)
        for (int64_t k = 0; k < n; k++) half[k] = to_bf16((float)((double)level[k] * unit));
    else
        for (int64_t k = 0; k < n; k++) wide[k] = (float)((double)level[k] * unit);
}

/* `values`: what the levels stand for, in the type of x, or NULL. */
void lowbit_round_tokens(const void *x, int32_t is_bf16, int8_t *levels, float *per_unit, void *values, int64_t tokens,
                         int64_t n, int32_t top, float least, int32_t n_threads) {
    const int64_t bytes = n * (is_bf16 ? 2 : 4);
#pragma omp parallel for schedule(static) num_threads(n_threads) if (tokens * n >= PARALLEL_ELEMENTS)
    for (int64_t t = 0; t < tokens; t++) {
        lowbit_round_token((const char *)x + t * bytes, is_bf16, n, top, least, levels + t * n, per_unit + t);
        if (values) values_of(levels + t * n, per_unit[t], (char *)values + t * bytes, is_bf16, n);
    }
}

void lowbit_token_values(const int8_t *levels, const float *per_unit, void *out, int32_t is_bf16, int64_t tokens,
                         int64_t n, int32_t n_threads) {
    const int64_t bytes = n * (is_bf16 ? 2 : 4);
#pragma omp parallel for schedule(static) num_threads(n_threads) if (tokens * n >= PARALLEL_ELEMENTS)
    for (int64_t t = 0; t < tokens; t++)
        values_of(levels + t * n, per_unit[t], (char *)out + t * bytes, is_bf16, n);
}

/* Sums of integers in numbers, as reference.py's `int8_product`. */
void lowbit_scaled_sums(const int32_t *restrict sums, const float *restrict scale, const float *restrict per_unit,
                        void *restrict out, int32_t has_row_scales, int32_t is_bf16, int64_t tokens, int64_t n,
                        int32_t n_threads) {
#pragma omp parallel for schedule(static) num_threads(n_threads) if (tokens * n >= PARALLEL_ELEMENTS)
    for (int64_t t = 0; t < tokens; t++) {
        const int32_t *restrict sum = sums + t * n;
        const float inverse = 1.0f / per_unit[t], one = scale[0];
        uint16_t *restrict half = (uint16_t *)out + t * n;
        float *restrict wide = (float *)out + t * n;
        if (has_row_scales && is_bf16)
            for (int64_t i = 0; i < n; i++) half[i] = to_bf16((float)sum[i] * scale[i] * inverse);
        else if (has_row_scales)
            for (int64_t i = 0; i < n; i++) wide[i] = (float)sum[i] * scale[i] * inverse;
        else if (is_bf16)
            for (int64_t i = 0; i < n; i++) half[i] = to_bf16((float)sum[i] * one * inverse);
        else
            for (int64_t i = 0; i < n; i++) wide[i] = (float)sum[i] * one * inverse;
    }
}
