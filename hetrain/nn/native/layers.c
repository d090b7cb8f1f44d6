/* The client's own layers over rows of float32, each in as few passes over memory as there are operands.
 *
 *     rms_norm            y = w∘x·r, r = 1/sqrt(mean(x^2) + epsilon)
 *     rms_norm_backward   dx = r·(w∘dy - x'·mean(w∘dy∘x')), x' = x·r
 *     gate                y = act(g)∘u
 *     gate_backward       dg = dy∘u∘act'(g), du = dy∘act(g)
 *     exponentials        z becomes e^(z - m), m = max z; and its sum
 *
 * act(g) = g·sigmoid(p(g)): SiLU with p(g) = g, or GELU by tanh, since (1 + tanh(z))/2 = sigmoid(2z), with
 * p(g) = sqrt(8/pi)·(g + 0.044715·g^3).
 *
 * Norms are the same to the bit at all levels: their sums have 32 parts whatever a vector's width. Gates differ in the
 * last bits where there is an instruction for a·b + c. What is not finite stays so, as in torch. The reference is in
 * hetrain/nn/fused.py.
 */

#include "lanes.h"

#include <math.h>

#define SUMS 32 /* parts of a sum */
#define GELU_LINEAR 1.5957691216f
#define GELU_CUBIC 0.044715f

/* Rows of what is read are `..._stride` values apart, and contiguous each. */
typedef struct {
    int64_t level, rows, width, x_stride;
    const float *x, *weight; /* [rows, width], [width] */
    float epsilon;
    float *y; /* [rows, width], contiguous, written */
} rms_norm_arguments;

typedef struct {
    int64_t level, rows, width, x_stride, dy_stride;
    const float *x, *weight, *dy;
    float epsilon;
    float *dx; /* [rows, width], contiguous, written */
} rms_norm_backward_arguments;

typedef struct {
    int64_t level, rows, width, g_stride, u_stride, is_gelu;
    const float *g, *u;
    float *y; /* [rows, width], contiguous, written */
} gate_arguments;

typedef struct {
    int64_t level, rows, width, g_stride, u_stride, dy_stride, is_gelu;
    const float *g, *u, *dy;
    float *both; /* [rows, 2·width], contiguous, written: dg beside du */
} gate_backward_arguments;

typedef struct {
    int64_t level, rows, width, z_stride;
    float *z;              /* [rows, width], changed */
    float *largest, *sums; /* [rows], written */
} exponentials_arguments;

#define BODY "layers_body.h"
#include "levels.h"

DISPATCH(rms_norm)
DISPATCH(rms_norm_backward)
DISPATCH(gate)
DISPATCH(gate_backward)
DISPATCH(exponentials)

/* Changes with every structure above: layers_library.py refuses another one. */
int hetrain_interface(void)
{
    return 2;
}
