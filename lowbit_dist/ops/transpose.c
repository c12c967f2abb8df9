/* A matrix of 16-bit elements by columns. Products of bfloat16 on a CPU take twice as long if their first operand lies
 * by columns, as an output's gradient does in the gradient of a weight; to lay it by rows takes a tenth of that.
 */
#include "cpu.h"

#define SIDE 8     /* of a tile, which registers hold */
#define ROWS 64    /* of a block */
#define COLUMNS 32 /* a cache line of it */

#if defined(__SSE2__)
INLINE void tile(const uint16_t *x, int64_t n, uint16_t *out, int64_t rows) {
    __m128i row[SIDE], pair[SIDE], four[SIDE];
    for (int i = 0; i < SIDE; i++) row[i] = _mm_loadu_si128((const __m128i *)(x + i * n));
    for (int i = 0; i < SIDE; i += 2) {
        pair[i] = _mm_unpacklo_epi16(row[i], row[i + 1]);
        pair[i + 1] = _mm_unpackhi_epi16(row[i], row[i + 1]);
    }
    for (int half = 0; half < SIDE; half += 4)
        for (int i = 0; i < 2; i++) {
            four[half + 2 * i] = _mm_unpacklo_epi32(pair[half + i], pair[half + 2 + i]);
            four[half + 2 * i + 1] = _mm_unpackhi_epi32(pair[half + i], pair[half + 2 + i]);
        }
    for (int i = 0; i < 4; i++) {
        _mm_storeu_si128((__m128i *)(out + 2 * i * rows), _mm_unpacklo_epi64(four[i], four[i + 4]));
        _mm_storeu_si128((__m128i *)(out + (2 * i + 1) * rows), _mm_unpackhi_epi64(four[i], four[i + 4]));
    }
}
#else
INLINE void tile(const uint16_t *x, int64_t n, uint16_t *out, int64_t rows) {
    for (int j = 0; j < SIDE; j++)
        for (int i = 0; i < SIDE; i++) out[j * rows + i] = x[i * n + j];
}
#endif

/* Whole cache lines are read, and whole ones written: where `rows` or `n` is a power of two, lines of one column lie in
 * the same few places of a cache, which keeps none of them until its next element is asked for.
 */
INLINE void block(const uint16_t *restrict x, uint16_t *restrict out, int64_t rows, int64_t n) {
    uint16_t turned[COLUMNS][ROWS] __attribute__((aligned(64)));
    for (int64_t t = 0; t < ROWS; t += SIDE)
        for (int64_t k = 0; k < COLUMNS; k += SIDE) tile(x + t * n + k, n, turned[k] + t, ROWS);
    for (int64_t k = 0; k < COLUMNS; k++) memcpy(out + k * rows, turned[k], sizeof turned[k]);
}

INLINE void strip(const uint16_t *restrict x, uint16_t *restrict out, int64_t rows, int64_t n, int64_t height) {
    const int64_t whole = height < ROWS ? 0 : n / COLUMNS * COLUMNS;
    for (int64_t k = 0; k < whole; k += COLUMNS) block(x + k, out + k * rows, rows, n);
    for (int64_t k = whole; k < n; k++) /* what no block has */
        for (int64_t t = 0; t < height; t++) out[k * rows + t] = x[t * n + k];
}

void lowbit_transpose(const uint16_t *restrict x, uint16_t *restrict out, int64_t rows, int64_t n, int32_t n_threads) {
#pragma omp parallel for schedule(static) num_threads(n_threads) if (rows * n >= PARALLEL_ELEMENTS)
    for (int64_t t = 0; t < rows; t += ROWS) strip(x + t * n, out + t, rows, n, rows - t < ROWS ? rows - t : ROWS);
}
