/* The exact sums behind a gradient's norm, in one pass each, as reference.py's `largest` and `square_sum`: integers, so
 * the same however elements are spread over threads and workers.
 */
#include "cpu.h"

/* The sum of rint((x / largest)^2 unit). Compilers make vector code of a conversion to int64_t only if it stands apart
 * from the rint. */
INLINE int64_t squares_of(const float *wide, const uint16_t *half, int is_bf16, int64_t n, double largest, double unit) {
    double part[BLOCK] __attribute__((aligned(64)));
    int64_t sum = 0;
    for (int64_t k = 0; k < n; k++) {
        const double q = (double)(is_bf16 ? from_bf16(half[k]) : wide[k]) / largest;
        part[k] = rint(q * q * unit);
    }
    for (int64_t k = 0; k < n; k++) sum += (int64_t)part[k];
    return sum;
}

INLINE int64_t rest(int64_t start, int64_t n) { return n - start < BLOCK ? n - start : BLOCK; }

uint32_t lowbit_largest(const void *x, int32_t is_bf16, int64_t n, int32_t n_threads) {
    const float *wide = x;
    const uint16_t *half = x;
    uint32_t largest = 0;
#pragma omp parallel for schedule(static) reduction(max : largest) num_threads(n_threads) if (n >= PARALLEL_ELEMENTS)
    for (int64_t start = 0; start < n; start += BLOCK) {
        const int64_t m = rest(start, n);
        const uint32_t here = is_bf16 ? largest_of(NULL, half + start, 1, m) : largest_of(wide + start, NULL, 0, m);
        largest = here > largest ? here : largest;
    }
    return largest;
}

int64_t lowbit_square_sum(const void *x, int32_t is_bf16, int64_t n, double largest, double unit, int32_t n_threads) {
    const float *wide = x;
    const uint16_t *half = x;
    int64_t sum = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum) num_threads(n_threads) if (n >= PARALLEL_ELEMENTS)
    for (int64_t start = 0; start < n; start += BLOCK) {
        const int64_t m = rest(start, n);
        sum += is_bf16 ? squares_of(NULL, half + start, 1, m, largest, unit)
                       : squares_of(wide + start, NULL, 0, m, largest, unit);
    }
    return sum;
}
