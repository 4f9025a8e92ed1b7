/* The layouts are those that kernels/quant.h and quant.c read. */
#include "worker/model/quantizer_block.h"

#include "common/base/assert.h"
#include "kernels/det.h"
#include "worker/model/quantizer_fit.h"

#include <string.h>

#define COLS       256u
#define GROUPS_MAX 16u

/* The nearest f16 that is finite. */
static float round_f16(float value)
{
    const float max = 65504.0f;
    const float bounded = value < -max ? -max : value > max ? max : value;
    return det_f32_from_f16(det_f16_from_f32(bounded));
}

static void store_f16(uint8_t *to, float value)
{
    const uint16_t half = det_f16_from_f32(value);
    to[0] = (uint8_t)half;
    to[1] = (uint8_t)(half >> 8);
}

/* ---- blocks of 32 ---------------------------------------------------------------------------- */

static void write_q8_0(const float *x, uint8_t *out)
{
    float top = 0.0f;
    for (uint32_t i = 0; i < 32; i++) {
        const float magnitude = x[i] < 0.0f ? -x[i] : x[i];
        top = magnitude > top ? magnitude : top;
    }
    const float d = round_f16(top / 127.0f);
    float q[32];
    quantizer_fit_round(x, 32, d, 0.0f, -127, 127, q);
    store_f16(out, d);
    for (uint32_t i = 0; i < 32; i++)
        out[2 + i] = (uint8_t)(int8_t)(int32_t)q[i];
}

/* Four bits of each column into qs, the fifth into qh where there is one (NULL: not). */
static void pack_small(const uint8_t *q, uint8_t *qh, uint8_t *qs)
{
    for (uint32_t i = 0; i < 16; i++)
        qs[i] = (uint8_t)((q[i] & 15) | (q[i + 16] & 15) << 4);
    if (!qh)
        return;
    memset(qh, 0, 4);
    for (uint32_t i = 0; i < 32; i++)
        qh[i / 8] = (uint8_t)(qh[i / 8] | (q[i] >> 4) << (i % 8));
}

/* Q4_0, Q5_0: bits 4 or 5. */
static void write_scaled(const float *x, uint32_t bits, uint8_t *out)
{
    const int low = -(1 << (bits - 1));
    float importance[32], fitted[32];
    uint8_t q[32];
    quantizer_fit_importance(x, 32, importance);
    const float d = round_f16(quantizer_fit_scale(x, importance, 32, low));
    quantizer_fit_round(x, 32, d, 0.0f, low, -low - 1, fitted);
    for (uint32_t i = 0; i < 32; i++)
        q[i] = (uint8_t)((int32_t)fitted[i] - low);
    store_f16(out, d);
    pack_small(q, bits == 5 ? out + 2 : NULL, out + (bits == 5 ? 6 : 2));
}

/* Q4_1, Q5_1. */
static void write_line(const float *x, uint32_t bits, uint8_t *out)
{
    const int high = (1 << bits) - 1;
    float importance[32], fitted[32], scale, min;
    uint8_t q[32];
    quantizer_fit_importance(x, 32, importance);
    quantizer_fit_line(x, importance, 32, high, 0, &scale, &min);
    const float d = round_f16(scale);
    const float m = round_f16(min);
    quantizer_fit_round(x, 32, d, m, 0, high, fitted);
    for (uint32_t i = 0; i < 32; i++)
        q[i] = (uint8_t)(int32_t)fitted[i];
    store_f16(out, d);
    store_f16(out + 2, m);
    pack_small(q, bits == 5 ? out + 4 : NULL, out + (bits == 5 ? 8 : 4));
}

void quantizer_block_small(enum tensor_type type, const float *x, uint8_t *out)
{
    switch (type) {
    case TENSOR_Q4_0:
        write_scaled(x, 4, out);
        return;
    case TENSOR_Q5_0:
        write_scaled(x, 5, out);
        return;
    case TENSOR_Q4_1:
        write_line(x, 4, out);
        return;
    case TENSOR_Q5_1:
        write_line(x, 5, out);
        return;
    default:
        ODSI_ASSERT(type == TENSOR_Q8_0);
        write_q8_0(x, out);
        return;
    }
}

/* ---- blocks of 256: groups with integer scales ----------------------------------------------- */

/* How the groups of a K type look; those without minimums have min_max 0 and q from q_low. */
struct form {
    uint32_t group_cols;
    int q_low, q_high;
    int scale_low, scale_high;
};

struct groups {
    struct form form;
    uint32_t count;
    const float *x;
    float importance[COLS];
    float q[COLS];
    float scale[GROUPS_MAX]; /* integers, as found in the block */
    float min[GROUPS_MAX];   /* likewise; 0 for types that have none */
    float d, dmin;           /* f16 values; weight = d * scale * q - dmin * min */
};

static void groups_init(struct groups *self, const float *x, struct form form)
{
    self->form = form;
    self->count = COLS / form.group_cols;
    self->x = x;
    self->d = self->dmin = 0.0f;
    for (uint32_t g = 0; g < self->count; g++) {
        self->scale[g] = self->min[g] = 0.0f;
        quantizer_fit_importance(x + (size_t)g * form.group_cols, form.group_cols,
                                 self->importance + (size_t)g * form.group_cols);
    }
}

static void groups_round(struct groups *self)
{
    const struct form *form = &self->form;
    for (uint32_t g = 0; g < self->count; g++) {
        const size_t at = (size_t)g * form->group_cols;
        quantizer_fit_round(self->x + at, form->group_cols, self->d * self->scale[g],
                            -(self->dmin * self->min[g]), form->q_low, form->q_high, self->q + at);
    }
}

/* value / unit, rounded and kept within low to high. */
static float ratio(float value, float unit, int low, int high)
{
    if (unit == 0.0f)
        return 0.0f;
    const float part = value / unit;
    return det_rint(part < (float)low ? (float)low : part > (float)high ? (float)high : part);
}

/* For the integers that are there, each group's best minimum, then its best scale, both as whole
 * multiples of dmin and d; then the integers again. None of these makes the error larger. */
static void groups_adjust(struct groups *self)
{
    const struct form *form = &self->form;
    for (uint32_t g = 0; g < self->count; g++) {
        const size_t at = (size_t)g * form->group_cols;
        struct quantizer_sums sums;
        quantizer_fit_sums(self->x + at, self->importance + at, self->q + at, form->group_cols,
                           &sums);
        if (self->dmin > 0.0f && sums.w > 0.0f)
            self->min[g] = ratio((self->d * self->scale[g] * sums.q - sums.x) / sums.w, self->dmin,
                                 0, form->scale_high);
        if (sums.qq > 0.0f)
            self->scale[g] = ratio((sums.xq + self->dmin * self->min[g] * sums.q) / sums.qq,
                                   self->d, form->scale_low, form->scale_high);
    }
    groups_round(self);
}

/* The d and dmin of least squares for the integers that are there now, then the integers again. */
static void groups_refine(struct groups *self)
{
    float ss = 0.0f, sm = 0.0f, mm = 0.0f, xs = 0.0f, xm = 0.0f;
    for (uint32_t g = 0; g < self->count; g++) {
        const size_t at = (size_t)g * self->form.group_cols;
        const float scale = self->scale[g], min = self->min[g];
        struct quantizer_sums sums;
        quantizer_fit_sums(self->x + at, self->importance + at, self->q + at, self->form.group_cols,
                           &sums);
        ss = ss + scale * scale * sums.qq;
        sm = sm + scale * min * sums.q;
        mm = mm + min * min * sums.w;
        xs = xs + scale * sums.xq;
        xm = xm + min * sums.x;
    }
    /* x ~ d * s - dmin * m: the normal equations, or of d alone where no group has a minimum. */
    const float determinant = ss * mm - sm * sm;
    float d = self->d, dmin = self->dmin;
    if (mm > 0.0f && determinant > 0.0f) {
        d = (mm * xs - sm * xm) / determinant;
        dmin = (sm * xs - ss * xm) / determinant;
    } else if (mm <= 0.0f && ss > 0.0f) {
        d = xs / ss;
    }
    d = round_f16(d);
    dmin = round_f16(dmin);
    /* Sums that lost their digits may give anything: only a small step is an improvement. */
    const float change = d / self->d;
    if (self->d == 0.0f || !(change > 0.5f && change < 2.0f) || dmin < 0.0f ||
        dmin > 2.0f * self->dmin)
        return;
    self->d = d;
    self->dmin = dmin;
    groups_round(self);
}

/* Q2_K, Q4_K, Q5_K. */
static void groups_fit_lines(struct groups *self)
{
    const struct form *form = &self->form;
    float scales[GROUPS_MAX], mins[GROUPS_MAX];
    float scale_top = 0.0f, min_top = 0.0f;
    for (uint32_t g = 0; g < self->count; g++) {
        const size_t at = (size_t)g * form->group_cols;
        float min;
        quantizer_fit_line(self->x + at, self->importance + at, form->group_cols, form->q_high, 1,
                           &scales[g], &min);
        mins[g] = -min;
        scale_top = scales[g] > scale_top ? scales[g] : scale_top;
        min_top = mins[g] > min_top ? mins[g] : min_top;
    }
    self->d = round_f16(scale_top / (float)form->scale_high);
    self->dmin = round_f16(min_top / (float)form->scale_high);
    for (uint32_t g = 0; g < self->count; g++) {
        self->scale[g] = ratio(scales[g], self->d, 0, form->scale_high);
        self->min[g] = ratio(mins[g], self->dmin, 0, form->scale_high);
    }
    groups_round(self);
    groups_adjust(self);
    groups_refine(self);
}

/* Q3_K, Q6_K. */
static void groups_fit_scales(struct groups *self)
{
    const struct form *form = &self->form;
    float scales[GROUPS_MAX];
    float top = 0.0f;
    for (uint32_t g = 0; g < self->count; g++) {
        const size_t at = (size_t)g * form->group_cols;
        scales[g] =
            quantizer_fit_scale(self->x + at, self->importance + at, form->group_cols, form->q_low);
        const float magnitude = scales[g] < 0.0f ? -scales[g] : scales[g];
        if (magnitude > (top < 0.0f ? -top : top))
            top = scales[g];
    }
    self->d = round_f16(top / (float)form->scale_low);
    for (uint32_t g = 0; g < self->count; g++)
        self->scale[g] = ratio(scales[g], self->d, form->scale_low, form->scale_high);
    groups_round(self);
    groups_adjust(self);
    groups_refine(self);
}

/* ---- blocks of 256: the bytes ---------------------------------------------------------------- */

static void write_q2_k(const struct groups *self, const uint8_t *q, uint8_t *out)
{
    memset(out + 16, 0, 64);
    for (uint32_t g = 0; g < 16; g++)
        out[g] = (uint8_t)((uint32_t)self->scale[g] | (uint32_t)self->min[g] << 4);
    for (uint32_t i = 0; i < COLS; i++) {
        uint8_t *byte = &out[16 + i / 128 * 32 + i % 32];
        *byte = (uint8_t)(*byte | q[i] << (2 * (i % 128 / 32)));
    }
    store_f16(out + 80, self->d);
    store_f16(out + 82, self->dmin);
}

static void write_q3_k(const struct groups *self, const uint8_t *q, uint8_t *out)
{
    memset(out, 0, 108);
    for (uint32_t i = 0; i < COLS; i++) {
        uint8_t *mask = &out[i % 32];
        uint8_t *byte = &out[32 + i / 128 * 32 + i % 32];
        *mask = (uint8_t)(*mask | (q[i] >> 2) << (i / 32));
        *byte = (uint8_t)(*byte | (q[i] & 3) << (2 * (i % 128 / 32)));
    }
    for (uint32_t g = 0; g < 16; g++) {
        const uint32_t scale = (uint32_t)((int32_t)self->scale[g] + 32);
        uint8_t *low = &out[96 + g % 8];
        uint8_t *high = &out[104 + g % 4];
        *low = (uint8_t)(*low | (scale & 15) << (g < 8 ? 0 : 4));
        *high = (uint8_t)(*high | (scale >> 4) << (2 * (g / 4)));
    }
    store_f16(out + 108, self->d);
}

/* The 12 bytes of eight 6-bit scales and minimums, Q4_K and Q5_K; and d and dmin before them. */
static void write_scales_and_mins(const struct groups *self, uint8_t *out)
{
    uint8_t *to = out + 4;
    store_f16(out, self->d);
    store_f16(out + 2, self->dmin);
    for (uint32_t g = 0; g < 4; g++) {
        const uint32_t scale = (uint32_t)self->scale[g], min = (uint32_t)self->min[g];
        const uint32_t scale_4 = (uint32_t)self->scale[g + 4], min_4 = (uint32_t)self->min[g + 4];
        to[g] = (uint8_t)(scale | (scale_4 >> 4) << 6);
        to[g + 4] = (uint8_t)(min | (min_4 >> 4) << 6);
        to[g + 8] = (uint8_t)((scale_4 & 15) | (min_4 & 15) << 4);
    }
}

static void write_nibbles(const uint8_t *q, uint8_t *out)
{
    for (uint32_t i = 0; i < COLS / 2; i++) {
        const uint32_t low = i / 32 * 64 + i % 32;
        out[i] = (uint8_t)((q[low] & 15) | (q[low + 32] & 15) << 4);
    }
}

static void write_q4_k(const struct groups *self, const uint8_t *q, uint8_t *out)
{
    write_scales_and_mins(self, out);
    write_nibbles(q, out + 16);
}

static void write_q5_k(const struct groups *self, const uint8_t *q, uint8_t *out)
{
    write_scales_and_mins(self, out);
    memset(out + 16, 0, 32);
    for (uint32_t i = 0; i < COLS; i++)
        out[16 + i % 32] = (uint8_t)(out[16 + i % 32] | (q[i] >> 4) << (i / 32));
    write_nibbles(q, out + 48);
}

static void write_q6_k(const struct groups *self, const uint8_t *q, uint8_t *out)
{
    for (uint32_t half = 0; half < 2; half++) {
        const uint8_t *from = q + (size_t)half * 128;
        for (uint32_t i = 0; i < 64; i++)
            out[half * 64 + i] = (uint8_t)((from[i] & 15) | (from[i + 64] & 15) << 4);
        for (uint32_t i = 0; i < 32; i++)
            out[128 + half * 32 + i] =
                (uint8_t)(from[i] >> 4 | (from[i + 32] >> 4) << 2 | (from[i + 64] >> 4) << 4 |
                          (from[i + 96] >> 4) << 6);
    }
    for (uint32_t g = 0; g < 16; g++)
        out[192 + g] = (uint8_t)(int8_t)(int32_t)self->scale[g];
    store_f16(out + 208, self->d);
}

void quantizer_block_k(enum tensor_type type, const float *x, uint8_t *out)
{
    static const struct {
        enum tensor_type type;
        struct form form;
        void (*fit)(struct groups *self);
        void (*write)(const struct groups *self, const uint8_t *q, uint8_t *out);
    } kinds[] = {
        {TENSOR_Q2_K, {16, 0, 3, 0, 15}, groups_fit_lines, write_q2_k},
        {TENSOR_Q3_K, {16, -4, 3, -32, 31}, groups_fit_scales, write_q3_k},
        {TENSOR_Q4_K, {32, 0, 15, 0, 63}, groups_fit_lines, write_q4_k},
        {TENSOR_Q5_K, {32, 0, 31, 0, 63}, groups_fit_lines, write_q5_k},
        {TENSOR_Q6_K, {16, -32, 31, -128, 127}, groups_fit_scales, write_q6_k},
    };
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        if (kinds[i].type != type)
            continue;
        struct groups groups;
        uint8_t q[COLS];
        groups_init(&groups, x, kinds[i].form);
        kinds[i].fit(&groups);
        for (uint32_t k = 0; k < COLS; k++)
            q[k] = (uint8_t)((int32_t)groups.q[k] - kinds[i].form.q_low);
        kinds[i].write(&groups, q, out);
        return;
    }
    ODSI_ASSERT(!"a type with blocks of 256");
}
