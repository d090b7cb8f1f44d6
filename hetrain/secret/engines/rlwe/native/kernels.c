/* The client's two kernels: encrypt and decrypt a block of rows in one pass over memory that fits the cache.
 *
 *     encrypt   b_k = a_k·s + e_k + round(x_k / scale)      modulo 2^32
 *     decrypt   y_j = scale·(b'_j·2^16 - a'_j·s)            modulo 2^32, signed
 *
 * The product with the secret is the negacyclic FFT of hetrain/secret/engines/rlwe/negacyclic.py: the twisted folding
 * z_t = (a_t + i·a_{t+N/2})·zeta^t, a complex FFT of length M = N/2, and back. Eight rows go side by side, one in
 * each lane of a vector, so every butterfly is plain vector arithmetic. The spectrum's order is that of an
 * FFT without reordering (decimation in frequency forward, in time backward): only the secret's spectrum has
 * to have the same one, and it is made by the same code.
 *
 * Nothing branches on, or indexes by, a secret. Torch's versions of all this are the reference
 * (tests/test_native.py compares them exactly).
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define LANES 8
#define SLOTS 2048
#define MAX_POINTS (SLOTS / 2)
/* 1.5·2^52: adding it to |v| < 2^51 leaves round(v) modulo 2^32 in the low word of the double. */
#define ROUND_TO_LOW_WORD 6755399441055744.0

#define INLINE static inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) && __GNUC__ >= 12
#define FOR_EVERY_CPU __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define FOR_EVERY_CPU
#endif

typedef double vec __attribute__((vector_size(LANES * sizeof(double))));
typedef int64_t words __attribute__((vector_size(LANES * sizeof(int64_t))));
typedef int32_t ints __attribute__((vector_size(LANES * sizeof(int32_t))));
typedef float floats __attribute__((vector_size(LANES * sizeof(float))));

typedef uint64_t lanes8 __attribute__((aligned(1), may_alias));

typedef struct {
    vec re, im;
} point;

/* A transform of M points. twist: cos, sin of pi·t/N for t < M. twiddles: for each radix-4 stage from the
 * largest to the smallest, six numbers for each j: cos and sin of -2·pi·j/L, of twice and of three times that. */
typedef struct {
    size_t points;
    const double *twist;
    const double *twiddles;
} transform;

INLINE void forward_butterfly(point *z0, point *z1, point *z2, point *z3, const double *w)
{
    const vec t0r = z0->re + z2->re, t0i = z0->im + z2->im, t1r = z0->re - z2->re, t1i = z0->im - z2->im;
    const vec t2r = z1->re + z3->re, t2i = z1->im + z3->im;
    const vec t3r = z1->im - z3->im, t3i = z3->re - z1->re; /* -i·(z1 - z3) */
    const vec y1r = t1r + t3r, y1i = t1i + t3i, y2r = t0r - t2r, y2i = t0i - t2i;
    const vec y3r = t1r - t3r, y3i = t1i - t3i;
    z0->re = t0r + t2r, z0->im = t0i + t2i;
    z1->re = y1r * w[0] - y1i * w[1], z1->im = y1r * w[1] + y1i * w[0];
    z2->re = y2r * w[2] - y2i * w[3], z2->im = y2r * w[3] + y2i * w[2];
    z3->re = y3r * w[4] - y3i * w[5], z3->im = y3r * w[5] + y3i * w[4];
}

INLINE void inverse_butterfly(point *z0, point *z1, point *z2, point *z3, const double *w)
{
    const vec y1r = z1->re * w[0] + z1->im * w[1], y1i = z1->im * w[0] - z1->re * w[1];
    const vec y2r = z2->re * w[2] + z2->im * w[3], y2i = z2->im * w[2] - z2->re * w[3];
    const vec y3r = z3->re * w[4] + z3->im * w[5], y3i = z3->im * w[4] - z3->re * w[5];
    const vec s0r = z0->re + y2r, s0i = z0->im + y2i, s1r = z0->re - y2r, s1i = z0->im - y2i;
    const vec s2r = y1r + y3r, s2i = y1i + y3i;
    const vec s3r = y3i - y1i, s3i = y1r - y3r; /* i·(y1 - y3) */
    z0->re = s0r + s2r, z0->im = s0i + s2i;
    z1->re = s1r + s3r, z1->im = s1i + s3i;
    z2->re = s0r - s2r, z2->im = s0i - s2i;
    z3->re = s1r - s3r, z3->im = s1i - s3i;
}

/* Sum and difference: its own inverse up to the factor 2. */
INLINE void radix_two(point *z, size_t count)
{
    for (size_t i = 0; i < count; i += 2) {
        const point a = z[i], b = z[i + 1];
        z[i].re = a.re + b.re, z[i].im = a.im + b.im;
        z[i + 1].re = a.re - b.re, z[i + 1].im = a.im - b.im;
    }
}

/* All stages of length `length` and below, over `length` points. */
INLINE void forward_stages(point *z, size_t length, const double *w)
{
    size_t size = length;
    for (; size >= 4; size /= 4) {
        const size_t quarter = size / 4;
        for (point *block = z; block < z + length; block += size)
            for (size_t j = 0; j < quarter; j++)
                forward_butterfly(block + j, block + j + quarter, block + j + 2 * quarter,
                                  block + j + 3 * quarter, w + 6 * j);
        w += 6 * quarter;
    }
    if (size == 2)
        radix_two(z, length);
}

/* The stages of `forward_stages` undone, the last first. `end` is behind their twiddles. */
INLINE void inverse_stages(point *z, size_t length, const double *end)
{
    size_t size = length;
    while (size > 4)
        size /= 4;
    if (size == 2) {
        radix_two(z, length);
        size = 8;
    }
    for (; size <= length; size *= 4) {
        const size_t quarter = size / 4;
        end -= 6 * quarter;
        for (point *block = z; block < z + length; block += size)
            for (size_t j = 0; j < quarter; j++)
                inverse_butterfly(block + j, block + j + quarter, block + j + 2 * quarter,
                                  block + j + 3 * quarter, end + 6 * j);
    }
}

INLINE size_t twiddle_count(size_t points)
{
    size_t count = 0;
    for (size_t size = points; size >= 4; size /= 4)
        count += 6 * (size / 4);
    return count;
}

/* Rows become lanes and lanes rows: three rounds of exchanging halves of pairs. */
INLINE void transpose(ints v[LANES])
{
    const ints even = {0, 8, 2, 10, 4, 12, 6, 14}, odd = {1, 9, 3, 11, 5, 13, 7, 15};
    const ints even2 = {0, 1, 8, 9, 4, 5, 12, 13}, odd2 = {2, 3, 10, 11, 6, 7, 14, 15};
    const ints even4 = {0, 1, 2, 3, 8, 9, 10, 11}, odd4 = {4, 5, 6, 7, 12, 13, 14, 15};
    ints u[LANES];
    for (int i = 0; i < LANES; i += 2) {
        u[i] = __builtin_shuffle(v[i], v[i + 1], even);
        u[i + 1] = __builtin_shuffle(v[i], v[i + 1], odd);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = i; j < i + 2; j++) {
            v[j] = __builtin_shuffle(u[j], u[j + 2], even2);
            v[j + 2] = __builtin_shuffle(u[j], u[j + 2], odd2);
        }
    for (int j = 0; j < 4; j++) {
        u[j] = __builtin_shuffle(v[j], v[j + 4], even4);
        u[j + 4] = __builtin_shuffle(v[j], v[j + 4], odd4);
    }
    memcpy(v, u, sizeof u);
}

/* Where a block of masks comes from: whole words, or their two upper parts as results bring them. */
typedef struct {
    const int32_t *whole;
    const int16_t *high;
    const uint8_t *low;
} masks;

typedef int16_t shorts __attribute__((vector_size(LANES * sizeof(int16_t))));
typedef uint8_t bytes __attribute__((vector_size(LANES * sizeof(uint8_t))));

/* Words index .. index+7 of the rows that begin at `at`: vector j has word index+j of each row in a lane. */
INLINE void gather(ints out[LANES], const masks *m, const size_t *at, size_t index)
{
    for (int lane = 0; lane < LANES; lane++) {
        const size_t place = at[lane] + index;
        if (m->whole) {
            memcpy(&out[lane], m->whole + place, sizeof out[lane]);
        } else {
            shorts high;
            bytes low;
            memcpy(&high, m->high + place, sizeof high);
            memcpy(&low, m->low + place, sizeof low);
            out[lane] = (__builtin_convertvector(high, ints) << 16) | (__builtin_convertvector(low, ints) << 8);
        }
    }
    transpose(out);
}

/* z = twist·(low + i·high) */
INLINE void fold(point *z, const transform *t, const masks *m, const size_t *at, size_t offset)
{
    const size_t n = t->points;
    for (size_t first = 0; first < n; first += LANES) {
        ints low[LANES], high[LANES];
        gather(low, m, at, offset + first);
        gather(high, m, at, offset + n + first);
        for (size_t i = 0; i < LANES; i++) {
            const size_t j = first + i;
            const double c = t->twist[2 * j], s = t->twist[2 * j + 1];
            const vec re = __builtin_convertvector(low[i], vec), im = __builtin_convertvector(high[i], vec);
            z[j].re = re * c - im * s;
            z[j].im = re * s + im * c;
        }
    }
}

/* acc (+)= z·spectrum */
INLINE void multiply(point *acc, const point *z, const double *spectrum, size_t count, int first)
{
    for (size_t j = 0; j < count; j++) {
        const double c = spectrum[2 * j], s = spectrum[2 * j + 1];
        const vec re = z[j].re * c - z[j].im * s, im = z[j].re * s + z[j].im * c;
        acc[j].re = first ? re : acc[j].re + re;
        acc[j].im = first ? im : acc[j].im + im;
    }
}

/* One stage over everything, then each quarter to the end of its stages: a quarter fits the innermost cache. */
INLINE void product(point *z, point *acc, const transform *t, const masks *m, const size_t *at, size_t rank,
                    const double *spectrum)
{
    const size_t n = t->points, quarter = n / 4;
    const double *rest = t->twiddles + 6 * quarter, *end = t->twiddles + twiddle_count(n);
    for (size_t i = 0; i < rank; i++, spectrum += 2 * n) {
        fold(z, t, m, at, 2 * n * i);
        for (size_t j = 0; j < quarter; j++)
            forward_butterfly(z + j, z + j + quarter, z + j + 2 * quarter, z + j + 3 * quarter, t->twiddles + 6 * j);
        for (size_t start = 0; start < n; start += quarter) {
            forward_stages(z + start, quarter, rest);
            multiply(acc + start, z + start, spectrum + 2 * start, quarter, i == 0);
            if (i + 1 == rank)
                inverse_stages(acc + start, quarter, end);
        }
    }
    for (size_t j = 0; j < quarter; j++)
        inverse_butterfly(acc + j, acc + j + quarter, acc + j + 2 * quarter, acc + j + 3 * quarter,
                          t->twiddles + 6 * j);
}

/* Coefficients j .. j+7 of the product, then j+M .. j+M+7, modulo 2^32: a row of the block in each lane. */
INLINE void unfold(ints out[2][LANES], const point *z, const double *twist)
{
    for (size_t i = 0; i < LANES; i++) {
        const double c = twist[2 * i], s = twist[2 * i + 1];
        const vec re = z[i].re * c + z[i].im * s + ROUND_TO_LOW_WORD;
        const vec im = z[i].im * c - z[i].re * s + ROUND_TO_LOW_WORD;
        out[0][i] = __builtin_convertvector((words)re, ints);
        out[1][i] = __builtin_convertvector((words)im, ints);
    }
}

/* Where eight rows from `row` on begin, and how many of them there are: the last one stands for those missing. */
INLINE size_t places(size_t at[LANES], size_t row, size_t rows, size_t width)
{
    const size_t valid = rows - row < LANES ? rows - row : LANES;
    for (size_t lane = 0; lane < LANES; lane++)
        at[lane] = (row + (lane < valid ? lane : valid - 1)) * width;
    return valid;
}

/* Ones among the bits `kept` of three words, in each of eight bytes. */
INLINE uint64_t count_ones(uint64_t first, uint64_t second, uint64_t third, const uint64_t *kept)
{
    uint64_t w[3] = {first & kept[0], second & kept[1], third & kept[2]}, nibbles = 0;
    for (int position = 0; position < 3; position++) {
        w[position] -= (w[position] >> 1) & 0x5555555555555555u;
        nibbles += (w[position] & 0x3333333333333333u) + ((w[position] >> 2) & 0x3333333333333333u);
    }
    return (nibbles & 0x0f0f0f0f0f0f0f0fu) + ((nibbles >> 4) & 0x0f0f0f0f0f0f0f0fu);
}

/* 8·n centred binomial values, in byte lanes: ones of the first eta bits of side 0 minus those of side 1.
 * The keystream is seen as words [2, 3, stride], of which the first n columns are used. */
INLINE void centred_binomial(lanes8 *restrict out, const lanes8 *restrict stream, size_t n, size_t stride, int eta)
{
    uint64_t kept[3];
    for (int position = 0; position < 3; position++) {
        const int left = eta - 8 * position, width = left < 0 ? 0 : left > 8 ? 8 : left;
        kept[position] = 0x0101010101010101u * (uint64_t)((1u << width) - 1);
    }
    for (size_t i = 0; i < n; i++) {
        const lanes8 *column = stream + i;
        const uint64_t a = count_ones(column[0], column[stride], column[2 * stride], kept);
        const uint64_t b = count_ones(column[3 * stride], column[4 * stride], column[5 * stride], kept);
        /* The difference of each pair of bytes, without a borrow between them. */
        out[i] = ((a | 0x8080808080808080u) - b) ^ 0x8080808080808080u;
    }
}

/* round(v), half to even, no further than limit from zero. */
INLINE ints rounded(floats v, int32_t limit)
{
    const vec shifted = __builtin_convertvector(v, vec) + ROUND_TO_LOW_WORD;
    ints q = __builtin_convertvector((words)shifted, ints);
    const ints top = (ints){0} + limit, over = q > top, under = q < -top;
    return (over & top) | (under & -top) | (~(over | under) & q);
}

/* spectrum [rank, M] of a secret [rank, N] of bytes, times 1/M: what the inverse transform leaves out. */
void hetrain_spectrum(double *spectrum, const int8_t *secret, size_t rank, size_t points, const double *twist,
                      const double *twiddles, void *workspace)
{
    point *z = workspace;
    for (size_t i = 0; i < rank; i++, secret += 2 * points, spectrum += 2 * points) {
        for (size_t j = 0; j < points; j++) {
            const double low = secret[j], high = secret[j + points], c = twist[2 * j], s = twist[2 * j + 1];
            z[j].re = (vec){0} + (low * c - high * s);
            z[j].im = (vec){0} + (low * s + high * c);
        }
        forward_stages(z, points, twiddles);
        for (size_t j = 0; j < points; j++) {
            spectrum[2 * j] = z[j].re[0] / (double)points;
            spectrum[2 * j + 1] = z[j].im[0] / (double)points;
        }
    }
}

/* b for rows k0 .. k0+rows of an operand.
 *
 * out        int32 [rows, N]
 * mask_words int32 [rows, rank·N]
 * keystream  uint8 [2, 3, rows·N], fresh: the noise
 * x          float [tokens, width], the whole operand; inverse: float [tokens], 1/scale of each token
 * limit      the largest entry after scaling
 */
FOR_EVERY_CPU
void hetrain_encrypt(int32_t *out, const int32_t *mask_words, const uint8_t *keystream, const float *x,
                     const float *inverse, int32_t limit, size_t k0, size_t rows, size_t width, size_t tokens,
                     size_t rank, int eta, size_t points, const double *twist, const double *twiddles,
                     const double *spectrum, void *workspace)
{
    const transform t = {points, twist, twiddles};
    const masks m = {mask_words, NULL, NULL};
    const size_t degree = 2 * points;
    point *z = workspace, *acc = rank == 1 ? z : z + points;
    int8_t *noise = (int8_t *)workspace + 2 * MAX_POINTS * sizeof(point);
    for (size_t row = 0; row < rows; row += LANES) {
        size_t at[LANES];
        const size_t valid = places(at, row, rows, rank * degree);
        product(z, acc, &t, &m, at, rank, spectrum);
        centred_binomial((lanes8 *)noise, (const lanes8 *)(keystream + row * degree), valid * degree / 8,
                         rows * degree / 8, eta);
        for (size_t first = 0; first < points; first += LANES) {
            ints part[2][LANES];
            unfold(part, acc + first, twist + 2 * first);
            for (size_t half = 0; half < 2; half++) {
                const size_t begin = first + half * points;
                for (size_t token = begin; token < begin + LANES && token < tokens; token++) {
                    floats v = {0};
                    memcpy(&v, x + token * width + k0 + row, valid * sizeof(float));
                    part[half][token - begin] += rounded(v * inverse[token], limit);
                }
                transpose(part[half]);
                for (size_t lane = 0; lane < valid; lane++)
                    memcpy(out + (row + lane) * degree + begin, &part[half][lane], sizeof(ints));
            }
        }
        for (size_t i = 0; i < valid * degree; i++)
            out[row * degree + i] += noise[i];
    }
}

/* Rows of a result, decrypted and scaled.
 *
 * out     float [tokens, width]: columns j0 .. j0+rows are written
 * b       int16 [rows, N]: bits 16..31; high int16, low uint8 [rows, rank·N]: bits 16..31 and 8..15 of a'
 * scales  float [tokens]
 */
FOR_EVERY_CPU
void hetrain_decrypt(float *out, const int16_t *b, const int16_t *high, const uint8_t *low, const float *scales,
                     size_t j0, size_t rows, size_t width, size_t tokens, size_t rank, size_t points,
                     const double *twist, const double *twiddles, const double *spectrum, void *workspace)
{
    const transform t = {points, twist, twiddles};
    const masks m = {NULL, high, low};
    const size_t degree = 2 * points;
    point *z = workspace, *acc = rank == 1 ? z : z + points;
    for (size_t row = 0; row < rows; row += LANES) {
        size_t at[LANES];
        const size_t valid = places(at, row, rows, rank * degree);
        product(z, acc, &t, &m, at, rank, spectrum);
        for (size_t first = 0; first < points; first += LANES) {
            ints part[2][LANES];
            unfold(part, acc + first, twist + 2 * first);
            for (size_t half = 0; half < 2; half++) {
                const size_t begin = first + half * points;
                ints rows_of_b[LANES];
                for (size_t lane = 0; lane < LANES; lane++) {
                    shorts values;
                    memcpy(&values, b + at[lane] / rank + begin, sizeof values);
                    rows_of_b[lane] = __builtin_convertvector(values, ints) << 16;
                }
                transpose(rows_of_b);
                for (size_t token = begin; token < begin + LANES && token < tokens; token++) {
                    const ints value = rows_of_b[token - begin] - part[half][token - begin];
                    const floats y = __builtin_convertvector(value, floats) * scales[token];
                    memcpy(out + token * width + j0 + row, &y, valid * sizeof(float));
                }
            }
        }
    }
}

size_t hetrain_workspace_bytes(void)
{
    return 2 * MAX_POINTS * sizeof(point) + LANES * SLOTS;
}

/* Changes with every signature above: hetrain/secret/engines/rlwe/native/__init__.py refuses to call another version. */
int hetrain_interface(void)
{
    return 1;
}
