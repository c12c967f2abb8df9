/* int8 activations times packed codes, y = Q(x) . W^T, as reference.py's `matmul`: the same bytes.
 *
 * The codes of a few rows are spread to bytes in a buffer that stays in a cache, and multiplied with the rounded
 * tokens; no weight is ever a float. A code is level - low, not negative, which is what the instructions for 8-bit
 * products want of one factor; so low times the sum of a token's integers is added in the end:
 *
 *     sum of level * q  =  sum of code * q  +  low * sum of q
 *
 * Sums of integers are exact in any order. They wrap around in 32 bits, where only the last one must fit.
 */
#include <stdlib.h>

#include "cpu.h"

#define ROWS 4
#define TOKENS 4
#define LEAST_MAXIMUM 1e-5f /* as in tokens.py */
#define STRIDE 64 /* rounded tokens are as long as a multiple of it, filled up with zeros */
#define PANEL 262144 /* bytes of spread codes that many tokens are multiplied with: they stay in the second-level cache */
#define PARALLEL_PRODUCTS 1048576 /* fewer products are not worth waking threads */

/* Filled by cpu.py. Element e of the weight [out_features, in_features] has scale[e / scale_every], or scale[0] if that
 * is more than a row; `group` is how many elements of a row share one. */
typedef struct {
    const void *x;        /* [tokens, in_features] float or bfloat16 */
    void *y;              /* [tokens, out_features], in the type of x */
    const uint8_t *codes;
    const float *scale;
    int8_t *rounded;      /* [tokens, stride] */
    float *per_unit;      /* [tokens]: integers per 1 */
    int32_t *sums;        /* [tokens, groups]: of a token's integers */
    int64_t tokens, in_features, out_features, stride, group, groups, row_scales;
    int32_t is_bf16, low, bits, n_threads;
} Product;

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define WIDTH 64
typedef __m512i Sum;

INLINE Sum none(void) { return _mm512_setzero_si512(); }

/* Compilers copy each sum around the intrinsic, and load q anew for each row. */
INLINE Sum dot(Sum sum, const uint8_t *code, const int8_t *q, int bits) {
    (void)bits;
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(_mm512_loadu_si512(code)), "v"(_mm512_loadu_si512(q)));
    return sum;
}

INLINE void totals(int32_t *total, const Sum *sum) {
    const __m512i a = _mm512_add_epi32(_mm512_unpacklo_epi32(sum[0], sum[1]), _mm512_unpackhi_epi32(sum[0], sum[1]));
    const __m512i b = _mm512_add_epi32(_mm512_unpacklo_epi32(sum[2], sum[3]), _mm512_unpackhi_epi32(sum[2], sum[3]));
    const __m512i c = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    const __m256i d = _mm256_add_epi32(_mm512_castsi512_si256(c), _mm512_extracti64x4_epi64(c, 1));
    _mm_storeu_si128((__m128i *)total, _mm_add_epi32(_mm256_castsi256_si128(d), _mm256_extracti128_si256(d, 1)));
}
#elif defined(__AVX2__)
#define WIDTH 32
typedef __m256i Sum;

INLINE Sum none(void) { return _mm256_setzero_si256(); }

INLINE Sum dot(Sum sum, const uint8_t *code, const int8_t *q, int bits) {
    const __m256i c = _mm256_loadu_si256((const __m256i *)code), x = _mm256_loadu_si256((const __m256i *)q);
#if defined(__AVXVNNI__)
    (void)bits;
    return _mm256_dpbusd_avx_epi32(sum, c, x);
#else
    if (bits < 8) /* two products fit into 16 bits */
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(c, x), _mm256_set1_epi16(1)));
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(c, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(c, 8), _mm256_srai_epi16(x, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
#endif
}

INLINE void totals(int32_t *total, const Sum *sum) {
    const __m256i c = _mm256_hadd_epi32(_mm256_hadd_epi32(sum[0], sum[1]), _mm256_hadd_epi32(sum[2], sum[3]));
    _mm_storeu_si128((__m128i *)total, _mm_add_epi32(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1)));
}
#else
#define WIDTH 16
typedef uint32_t Sum;

INLINE Sum none(void) { return 0; }

INLINE Sum dot(Sum sum, const uint8_t *code, const int8_t *q, int bits) {
    (void)bits;
    int32_t products = 0;
    for (int i = 0; i < WIDTH; i++) products += code[i] * q[i];
    return sum + (uint32_t)products;
}

INLINE void totals(int32_t *total, const Sum *sum) { memcpy(total, sum, ROWS * sizeof(int32_t)); }
#endif

/* A token in integers, zeros behind it, and its sums. */
static void round_token(const Product *p, int64_t token) {
    const int64_t n = p->in_features;
    int8_t *q = p->rounded + token * p->stride;
    lowbit_round_token((const char *)p->x + token * n * (p->is_bf16 ? 2 : 4), p->is_bf16, n, 127, LEAST_MAXIMUM, q,
                       p->per_unit + token);
    memset(q + n, 0, (size_t)(p->stride - n));
    for (int64_t g = 0; g < p->groups; g++) {
        const int64_t end = (g + 1) * p->group; /* or of the zeros behind the row */
        int32_t sum = 0;
        for (int64_t k = g * p->group; k < end; k++) sum += q[k];
        p->sums[token * p->groups + g] = sum;
    }
}

/* The codes of a block, each in a byte. */
static void spread(const uint8_t *restrict packed, uint8_t *restrict code, int bits) {
    if (bits == 8) {
        memcpy(code, packed, BLOCK);
    } else if (bits == 4 || bits == 6) {
        for (int j = 0; j < 128; j++) {
            code[j] = packed[j] & 15;
            code[j + 128] = packed[j] >> 4;
        }
        if (bits == 6)
            for (int j = 0; j < 64; j++)
                for (int i = 0; i < 4; i++) code[j + 64 * i] |= (uint8_t)(((packed[128 + j] >> (2 * i)) & 3) << 4);
    } else {
        for (int j = 0; j < 64; j++) {
            code[j] = packed[j] & 3;
            code[j + 64] = (packed[j] >> 2) & 3;
            code[j + 128] = (packed[j] >> 4) & 3;
            code[j + 192] = packed[j] >> 6;
        }
        if (bits == 3)
            for (int i = 0; i < 8; i++)
                for (int j = 0; j < 32; j++) code[j + 32 * i] |= (uint8_t)(((packed[64 + j] >> i) & 1) << 2);
    }
}

/* y for ROWS rows, of which `n_rows` are there, and `n` tokens. */
INLINE void multiply(const Product *p, const uint8_t *code, int64_t row, int64_t n_rows, int64_t token, int n, int bits) {
    const uint8_t *of_row[ROWS];
    const float *scale[ROWS];
    float y[TOKENS][ROWS];
    for (int r = 0; r < ROWS; r++) {
        const int64_t there = r < n_rows ? r : n_rows - 1;
        of_row[r] = code + there * p->in_features;
        scale[r] = p->scale + (row + there) * p->row_scales;
    }
    const int8_t *q = p->rounded + token * p->stride;
    for (int64_t g = 0; g < p->groups; g++) {
        Sum sum[TOKENS][ROWS];
        for (int t = 0; t < n; t++)
            for (int r = 0; r < ROWS; r++) sum[t][r] = none();
        const int64_t end = (g + 1) * p->group;
        for (int64_t k = g * p->group; k < end; k += WIDTH)
            for (int t = 0; t < n; t++)
                for (int r = 0; r < ROWS; r++) sum[t][r] = dot(sum[t][r], of_row[r] + k, q + t * p->stride + k, bits);
        for (int t = 0; t < n; t++) {
            int32_t total[ROWS];
            totals(total, sum[t]);
            const uint32_t shift = (uint32_t)p->low * (uint32_t)p->sums[(token + t) * p->groups + g];
            for (int r = 0; r < ROWS; r++) {
                const float part = (float)(int32_t)((uint32_t)total[r] + shift) * scale[r][g];
                y[t][r] = g ? y[t][r] + part : part;
            }
        }
    }
    for (int t = 0; t < n; t++) {
        const int64_t at = (token + t) * p->out_features + row;
        uint16_t half[ROWS];
        for (int r = 0; r < ROWS; r++) y[t][r] = y[t][r] / p->per_unit[token + t];
        for (int r = 0; r < ROWS; r++) half[r] = to_bf16(y[t][r]);
        if (p->is_bf16)
            memcpy((uint16_t *)p->y + at, half, (size_t)n_rows * sizeof(uint16_t));
        else
            memcpy((float *)p->y + at, y[t], (size_t)n_rows * sizeof(float));
    }
}

/* The rows `first` to `last` - 1 of all tokens. */
INLINE void multiply_panel(const Product *p, uint8_t *code, int64_t first, int64_t last, int bits) {
    const int64_t start = first * p->in_features / BLOCK, end = (last * p->in_features + BLOCK - 1) / BLOCK;
    const uint8_t *of_first = code + first * p->in_features - start * BLOCK;
    if (bits == 8 && p->in_features == p->stride) /* they are bytes, and no vector ends beyond the last row */
        of_first = p->codes + first * p->in_features;
    else
        for (int64_t block = start; block < end; block++)
            spread(p->codes + block * BLOCK * p->bits / 8, code + (block - start) * BLOCK, p->bits);
    for (int64_t token = 0; token < p->tokens; token += TOKENS)
        for (int64_t row = first; row < last; row += ROWS) {
            const uint8_t *of_row = of_first + (row - first) * p->in_features;
            const int64_t n_rows = last - row < ROWS ? last - row : ROWS;
            switch (p->tokens - token) {
                case 1: multiply(p, of_row, row, n_rows, token, 1, bits); break;
                case 2: multiply(p, of_row, row, n_rows, token, 2, bits); break;
                case 3: multiply(p, of_row, row, n_rows, token, 3, bits); break;
                default: multiply(p, of_row, row, n_rows, token, TOKENS, bits);
            }
        }
}

static void multiply_narrow(const Product *p, uint8_t *code, int64_t first, int64_t last) {
    multiply_panel(p, code, first, last, 4);
}

static void multiply_bytes(const Product *p, uint8_t *code, int64_t first, int64_t last) {
    multiply_panel(p, code, first, last, 8);
}

/* 0, or 1 if there is no memory for the spread codes. */
int32_t lowbit_matmul(const Product *p) {
    const int64_t share = (p->out_features + p->n_threads - 1) / p->n_threads;
    int64_t rows = p->tokens > TOKENS ? PANEL / p->in_features : ROWS;
    rows = (rows < share ? rows : share) / ROWS * ROWS;
    rows = rows < ROWS ? ROWS : rows;
    /* A panel begins within a block, and the last vector of its last row ends beyond it, where tokens are 0. */
    const size_t room = (size_t)((rows * p->in_features / STRIDE + 1) * STRIDE + 2 * BLOCK + STRIDE);
    int32_t failed = 0;
#pragma omp parallel num_threads(p->n_threads) reduction(| : failed) \
    if (p->tokens * p->in_features * p->out_features >= PARALLEL_PRODUCTS)
    {
        uint8_t *code = aligned_alloc(STRIDE, room);
        failed = !code;
#pragma omp for schedule(static)
        for (int64_t token = 0; token < p->tokens; token++) round_token(p, token);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < p->out_features; row += rows) {
            const int64_t last = row + rows < p->out_features ? row + rows : p->out_features;
            if (code) (p->bits == 8 ? multiply_bytes : multiply_narrow)(p, code, row, last);
        }
        free(code);
    }
    return failed;
}
