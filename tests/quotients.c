/* Whether the roots and quotients of `adaptive` (device_functions.py) are the correctly rounded ones, for the approximate
 * roots that a GPU begins them with.  Powers of two change nothing but exponents.
 */
#include <math.h>
#include <stdint.h>

#define ONE (1u << 23)

/* How many roots of the x from 1 to 4 are wrong; near[i] is about 1 / sqrt(x) of the i-th float. */
int64_t wrong_roots(const float *near) {
    int64_t wrong = 0, i = 0;
    for (float x = 1; x < 4; x = nextafterf(x, INFINITY), i++) {
        const float root = x * near[i];
        wrong += fmaf(fmaf(-root, root, x), 0.5f * near[i], root) != sqrtf(x);
    }
    return wrong;
}

/* x * 2^-n modulo an odd b, x below b */
static uint32_t halved(uint32_t x, uint32_t b, int n) {
    for (; n; n--) x = (x % 2 ? x + b : x) / 2;
    return x;
}

/* How many quotients A / B are wrong; near[i] is about 2^23 / B of B = 2^23 + i; both are integers of 24 bits.
 *
 * With an inverse that differs from 1 / B by at most 2^-24 (1 + 2^-20) of it, q differs from the quotient Q by 1.5 units
 * in its last place, and so the sum before its rounding by 2^-23.4 of them. It is rounded as Q is unless a midpoint
 * between two floats is that near to Q: unless Q = A / B is (M + 1/2) 2^-k + e and |2^(k+1) A - (2 M + 1) B| =
 * 2^(k+1) |e| B is 1, 2 or 3, where k is 23 if A >= B, else 24. These few A are tried; of a B whose inverse is further
 * off, all.
 */
int64_t wrong_quotients(const float *near) {
    int64_t wrong = 0;
    for (uint32_t B = ONE; B < 2 * ONE; B++) {
        const float b = (float)B / ONE, y = near[B - ONE], inverse = fmaf(fmaf(-b, y, 1.0f) + 0x1p-43f, y, y);
        if (fabs((double)inverse * b - 1) > 0x1p-24 * (1 + 0x1p-20)) {
            for (uint32_t A = ONE; A < 2 * ONE; A++) {
                const float a = (float)A / ONE, q = a * inverse;
                wrong += fmaf(fmaf(-q, b, a), inverse, q) != a / b;
            }
            continue;
        }
        const int twos = __builtin_ctz(B);
        if (twos > 1) continue; /* the rest below would be a multiple of 4 */
        const uint32_t odd = B >> twos;
        for (uint32_t rest = 1; rest <= 3; rest++) {
            if (rest % (1u << twos)) continue;
            for (int k = 23; k <= 24; k++) {
                const uint32_t up = halved(rest >> twos, odd, k + 1 - twos);
                for (int sign = 0; sign < 2; sign++)
                    for (uint32_t A = sign ? odd - up : up; A < 2 * ONE; A += odd) {
                        if (A < ONE || (A >= B) != (k == 23)) continue;
                        const float a = (float)A / ONE, q = a * inverse;
                        wrong += fmaf(fmaf(-q, b, a), inverse, q) != a / b;
                    }
            }
        }
    }
    return wrong;
}

/* How many values of rounded tokens, of 8 bits, are wrong for a number b of units from 1 to 2. */
int64_t wrong_values(void) {
    int64_t wrong = 0;
    for (uint32_t i = 0; i < ONE; i++) {
        const float b = 1 + (float)i / ONE, inverse = 1 / b;
        for (int a = 1; a < 128; a += 2) {
            const float q = (float)a * inverse;
            wrong += fmaf(fmaf(-q, b, (float)a), inverse, q) != (float)a / b;
        }
    }
    return wrong;
}
