/* The examples and constants of kernels/NUMERICS.md against the code that they describe.
 *
 * The page has examples in fences of the language "check": "name inputs = results", where | parts
 * lists and an indented line goes on with the one before; and tables whose rows are
 * | `NAME` | decimal | `bits` |. What a name takes and gives is said at its function below. */
#include "common/base/alloc.h"
#include "common/base/buf.h"
#include "common/crypto/digest.h"
#include "kernels/det.h"
#include "kernels/quant.h"
#include "kernels/ref/ref.h"
#include "kernels/rope_table.h"
#include "tests/kernels/kernel_fixture.h"
#include "worker/engine/sampler.h"

#include <criterion/criterion.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAGE      "kernels/NUMERICS.md"
#define TEXT_SIZE 4096u
#define LIST_MAX  600u

/* One line of a "check" fence under way. */
struct example {
    char text[TEXT_SIZE];
    char *next;     /* the next word; NULL after the last */
    struct buf got; /* results in the page's form */
    uint32_t line;
};

/* ---- words ----------------------------------------------------------------------------------- */

static char *word_next(struct example *self)
{
    char *word = self->next;
    cr_assert(word, "line %u: a word is missing", self->line);
    char *end = strchr(word, ' ');
    self->next = end ? end + 1 : NULL;
    if (end)
        *end = '\0';
    return word;
}

/* Whether more words come before the next |. Takes the | away. */
static int list_goes_on(struct example *self)
{
    if (!self->next)
        return 0;
    if (self->next[0] != '|')
        return 1;
    self->next = self->next[1] ? self->next + 2 : NULL;
    return 0;
}

static uint64_t hex_next(struct example *self, size_t digits)
{
    const char *word = word_next(self);
    char *end = NULL;
    cr_assert_eq(strlen(word), digits, "line %u: %s has not %zu digits", self->line, word, digits);
    const uint64_t value = strtoull(word, &end, 16);
    cr_assert_eq(*end, '\0', "line %u: %s is no hexadecimal number", self->line, word);
    return value;
}

static float f32_next(struct example *self)
{
    return det_from_bits((uint32_t)hex_next(self, 8));
}

static uint64_t integer_next(struct example *self)
{
    const char *word = word_next(self);
    char *end = NULL;
    const uint64_t value = strtoull(word, &end, 10);
    cr_assert(end != word && *end == '\0', "line %u: %s is no number", self->line, word);
    return value;
}

static double f64_next(struct example *self)
{
    const uint64_t bits = hex_next(self, 16);
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static enum tensor_type type_next(struct example *self)
{
    enum tensor_type type = TENSOR_F32;
    const char *name = word_next(self);
    cr_assert(quant_find(name, &type), "line %u: %s is no type", self->line, name);
    return type;
}

static uint32_t f32_list(struct example *self, float *out)
{
    uint32_t count = 0;
    while (list_goes_on(self)) {
        cr_assert(count < LIST_MAX);
        out[count++] = f32_next(self);
    }
    return count;
}

static uint32_t f16_list(struct example *self, uint16_t *out)
{
    uint32_t count = 0;
    while (list_goes_on(self)) {
        cr_assert(count < LIST_MAX);
        out[count++] = (uint16_t)hex_next(self, 4);
    }
    return count;
}

static void put(struct example *self, const char *format, uint64_t value)
{
    if (self->got.size > 0)
        buf_append_text(&self->got, " ");
    if (strcmp(format, "|") == 0)
        buf_append_text(&self->got, "|");
    else if (strcmp(format, "d") == 0)
        buf_printf(&self->got, "%" PRId64, (int64_t)value);
    else if (strcmp(format, "4") == 0)
        buf_printf(&self->got, "%04" PRIx64, value);
    else if (strcmp(format, "8") == 0)
        buf_printf(&self->got, "%08" PRIx64, value);
    else
        buf_printf(&self->got, "%016" PRIx64, value);
}

static void put_f32(struct example *self, float value)
{
    put(self, "8", det_bits(value));
}

static void put_f32s(struct example *self, const float *values, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        put_f32(self, values[i]);
}

static void put_f64(struct example *self, double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    put(self, "16", bits);
}

/* ---- functions of one number ----------------------------------------------------------------- */

/* x -> e^x */
static void check_exp(struct example *self)
{
    put_f32(self, det_exp(f32_next(self)));
}

static void check_tanh(struct example *self)
{
    put_f32(self, det_tanh(f32_next(self)));
}

/* gate up -> product */
static void check_silu(struct example *self)
{
    const float gate = f32_next(self);
    const float up = f32_next(self);
    float out;
    ref_act_mul(&out, &gate, &up, 1, ACT_SILU);
    put_f32(self, out);
}

static void check_gelu(struct example *self)
{
    const float gate = f32_next(self);
    const float up = f32_next(self);
    float out;
    ref_act_mul(&out, &gate, &up, 1, ACT_GELU_TANH);
    put_f32(self, out);
}

/* x cap -> capped */
static void check_softcap(struct example *self)
{
    float x = f32_next(self);
    ref_softcap(&x, 1, f32_next(self));
    put_f32(self, x);
}

static void check_f16(struct example *self)
{
    put(self, "4", det_f16_from_f32(f32_next(self)));
}

static void check_kv(struct example *self)
{
    put(self, "4", det_kv_from_f32(f32_next(self)));
}

static void check_f32(struct example *self)
{
    put_f32(self, det_f32_from_f16((uint16_t)hex_next(self, 4)));
}

/* ---- rows and products ----------------------------------------------------------------------- */

/* eps | x | weight -> out */
static void check_rmsnorm(struct example *self)
{
    float eps[LIST_MAX], x[LIST_MAX], weight[LIST_MAX];
    cr_assert_eq(f32_list(self, eps), 1u);
    const uint32_t cols = f32_list(self, x);
    cr_assert_eq(f32_list(self, weight), cols);
    ref_rmsnorm(x, x, weight, cols, eps[0]);
    put_f32s(self, x, cols);
}

/* weights | x -> dot product */
static void check_dot_f32(struct example *self)
{
    float weight[LIST_MAX], x[LIST_MAX];
    const uint32_t cols = f32_list(self, weight);
    cr_assert_eq(f32_list(self, x), cols);
    put_f32(self, ref_dot_f32(weight, x, cols));
}

static void check_dot_f16(struct example *self)
{
    uint16_t weight[LIST_MAX];
    float x[LIST_MAX];
    const uint32_t cols = f16_list(self, weight);
    cr_assert_eq(f32_list(self, x), cols);
    put_f32(self, ref_dot_f16(weight, x, cols));
}

/* 32 x -> d | q */
static void check_quantize(struct example *self)
{
    float x[LIST_MAX], d;
    int8_t q[OPS_BLOCK];
    cr_assert_eq(f32_list(self, x), OPS_BLOCK);
    ref_quantize(q, &d, x, OPS_BLOCK);
    put_f32(self, d);
    put(self, "|", 0);
    for (uint32_t i = 0; i < OPS_BLOCK; i++)
        put(self, "d", (uint64_t)(int64_t)q[i]);
}

/* The bytes that the page makes its blocks of: 37 j + 11, and 0.125, then 0.25 for the f16. */
static void pattern_fill(uint8_t *out, enum tensor_type type, uint32_t blocks)
{
    static const struct {
        enum tensor_type type;
        uint32_t d;
        uint32_t m; /* 0: none */
    } halves[] = {{TENSOR_Q4_0, 0, 0},   {TENSOR_Q4_1, 0, 2}, {TENSOR_Q5_0, 0, 0},
                  {TENSOR_Q5_1, 0, 2},   {TENSOR_Q8_0, 0, 0}, {TENSOR_Q2_K, 80, 82},
                  {TENSOR_Q3_K, 108, 0}, {TENSOR_Q4_K, 0, 2}, {TENSOR_Q5_K, 0, 2},
                  {TENSOR_Q6_K, 208, 0}};
    const uint32_t size = quant_block_size(type);
    for (uint32_t b = 0; b < blocks; b++)
        for (uint32_t j = 0; j < size; j++)
            out[b * size + j] = (uint8_t)(37 * j + 11);
    for (uint32_t i = 0; i < sizeof halves / sizeof *halves; i++)
        for (uint32_t b = 0; halves[i].type == type && b < blocks; b++) {
            const uint16_t d = 0x3000;
            const uint16_t m = 0x3400;
            memcpy(out + b * size + halves[i].d, &d, sizeof d);
            if (halves[i].m)
                memcpy(out + b * size + halves[i].m, &m, sizeof m);
        }
}

/* type part -> factors | minimums | q of 32 columns */
static void check_block(struct example *self)
{
    uint8_t block[QUANT_BLOCK_SIZE_MAX];
    struct quant_group group;
    const enum tensor_type type = type_next(self);
    pattern_fill(block, type, 1);
    quant_read(&group, type, block, (uint32_t)integer_next(self));
    const uint32_t groups = OPS_BLOCK / group.group_cols;
    put_f32s(self, group.scale, groups);
    put(self, "|", 0);
    if (group.has_min)
        put_f32s(self, group.min, groups);
    put(self, "|", 0);
    for (uint32_t i = 0; i < OPS_BLOCK; i++)
        put(self, "d", (uint64_t)(int64_t)group.q[i]);
}

/* type columns -> dot product with x[i] = ((i mod 7) - 3) / 4 */
static void check_dot(struct example *self)
{
    uint8_t row[2 * QUANT_BLOCK_SIZE_MAX + 34 * 16];
    float x[512], d[16];
    int8_t q[512];
    const enum tensor_type type = type_next(self);
    const uint32_t cols = (uint32_t)integer_next(self);
    cr_assert(cols <= 512 && quant_row_size(type, cols) <= sizeof row);
    pattern_fill(row, type, cols / quant_block_cols(type));
    for (uint32_t i = 0; i < cols; i++)
        x[i] = (float)((int)(i % 7) - 3) / 4.0f;
    ref_quantize(q, d, x, cols);
    put_f32(self, ref_dot_quant(type, row, q, d, cols));
}

/* ---- rotation -------------------------------------------------------------------------------- */

static void check_sin64(struct example *self)
{
    put_f64(self, rope_table_sin(f64_next(self)));
}

static void check_cos64(struct example *self)
{
    put_f64(self, rope_table_cos(f64_next(self)));
}

static void check_pow64(struct example *self)
{
    const double base = f64_next(self);
    put_f64(self, rope_table_pow(base, f64_next(self)));
}

/* base half_dim linear factor position pair -> cosine sine; factor divides that pair's frequency */
static void check_table(struct example *self)
{
    double frequency[64];
    float factors[64], cos[64], sin[64];
    const double base = (double)integer_next(self);
    const uint32_t half_dim = (uint32_t)integer_next(self);
    const double linear = (double)f32_next(self);
    const float factor = f32_next(self);
    const uint32_t position = (uint32_t)integer_next(self);
    const uint32_t pair = (uint32_t)integer_next(self);
    cr_assert(half_dim <= 64 && pair < half_dim);
    for (uint32_t i = 0; i < half_dim; i++)
        factors[i] = i == pair ? factor : 1.0f;
    rope_table_frequencies(frequency, half_dim, base, linear, factors);
    rope_table_fill_from(cos, sin, position, 1, half_dim, frequency, 1.0);
    put_f32(self, cos[pair]);
    put_f32(self, sin[pair]);
}

/* style | cosines | sines | one head -> the head, turned */
static void check_rope(struct example *self)
{
    float cos[LIST_MAX], sin[LIST_MAX], x[LIST_MAX];
    const int halves = strcmp(word_next(self), "halves") == 0;
    (void)list_goes_on(self);
    const uint32_t half_dim = f32_list(self, cos);
    cr_assert_eq(f32_list(self, sin), half_dim);
    const uint32_t head_dim = f32_list(self, x);
    ref_rope(x, cos, sin, half_dim, halves ? ROPE_HALVES : ROPE_PAIRS, 1, head_dim);
    put_f32s(self, x, head_dim);
}

/* ---- attention and experts ------------------------------------------------------------------- */

/* scale softcap | q | keys | values -> out, for positions 0 .. the last one given */
static void check_attention(struct example *self)
{
    static uint16_t page[2 * KV_PAGE_TOKENS * 8];
    float settings[LIST_MAX], q[LIST_MAX], out[8], scratch[KV_PAGE_TOKENS];
    uint16_t list[LIST_MAX];
    const uint32_t table[1] = {0};
    cr_assert_eq(f32_list(self, settings), 2u);
    const uint32_t head_dim = f32_list(self, q);
    cr_assert(head_dim <= 8);
    const struct kv_pool pool = {page, 1, 1, 1, head_dim};
    const struct attention_params params = {
        .heads = 1, .scale = settings[0], .softcap = settings[1]};
    uint32_t count = 0;
    for (uint32_t which = 0; which < 2; which++) {
        count = f16_list(self, list);
        memcpy(page + ref_kv_offset(&pool, 0, 0, which, 0), list, count * sizeof *list);
    }
    ref_attention(out, q, &pool, 0, 0, table, count / head_dim - 1, &params, scratch);
    put_f32s(self, out, head_dim);
}

/* used | logits -> ids | weights */
static void check_route(struct example *self)
{
    float logits[LIST_MAX], weights[LIST_MAX];
    uint32_t ids[LIST_MAX];
    const uint32_t used = (uint32_t)integer_next(self);
    (void)list_goes_on(self);
    const uint32_t experts = f32_list(self, logits);
    ref_route(ids, weights, logits, experts, used);
    for (uint32_t j = 0; j < used; j++)
        put(self, "d", ids[j]);
    put(self, "|", 0);
    put_f32s(self, weights, used);
}

/* weights | y of the first expert, then of the next ... -> out */
static void check_combine(struct example *self)
{
    float weights[LIST_MAX], y[LIST_MAX], out[LIST_MAX];
    const uint32_t used = f32_list(self, weights);
    const uint32_t cols = f32_list(self, y) / used;
    ref_combine(out, y, weights, used, cols);
    put_f32s(self, out, cols);
}

/* ---- sampling and hashes --------------------------------------------------------------------- */

/* counter | key -> four words */
static void check_philox(struct example *self)
{
    uint32_t counter[4], key[2], out[4];
    for (uint32_t i = 0; i < 4; i++)
        counter[i] = (uint32_t)hex_next(self, 8);
    (void)list_goes_on(self);
    for (uint32_t i = 0; i < 2; i++)
        key[i] = (uint32_t)hex_next(self, 8);
    sampler_philox(out, counter, key);
    for (uint32_t i = 0; i < 4; i++)
        put(self, "8", out[i]);
}

/* temperature top_k top_p min_p penalty window seed position | text so far | logits -> token */
static void check_sample(struct example *self)
{
    struct sampler_params params = {.temperature = f32_next(self)};
    struct sampler *sampler = NULL;
    uint32_t history[LIST_MAX];
    uint32_t history_count = 0;
    float logits[LIST_MAX], logprob;
    uint32_t token = 0;
    params.top_k = (uint32_t)integer_next(self);
    params.top_p = f32_next(self);
    params.min_p = f32_next(self);
    params.repetition_penalty = f32_next(self);
    params.penalty_window = (uint32_t)integer_next(self);
    params.seed = integer_next(self);
    const uint32_t position = (uint32_t)integer_next(self);
    (void)list_goes_on(self);
    while (list_goes_on(self))
        history[history_count++] = (uint32_t)integer_next(self);
    const uint32_t count = f32_list(self, logits);
    cr_assert_eq(sampler_open(&sampler, &params, count), ODSI_OK, "%s", odsi_err_text());
    for (uint32_t i = 0; i < history_count; i++)
        sampler_accept(sampler, history[i]);
    sampler_pick(sampler, logits, position, &token, &logprob);
    sampler_close(&sampler);
    put(self, "d", token);
}

/* numbers -> SHA-256 of their bytes in order, little-endian */
static void check_sha256(struct example *self)
{
    float values[LIST_MAX];
    uint8_t bytes[LIST_MAX * 4];
    struct digest digest;
    char text[DIGEST_HEX_SIZE];
    const uint32_t count = f32_list(self, values);
    for (uint32_t i = 0; i < count * 4; i++)
        bytes[i] = (uint8_t)(det_bits(values[i / 4]) >> (8 * (i % 4)));
    digest_of(&digest, bytes, (size_t)count * 4);
    digest_to_hex(text, &digest);
    buf_append_text(&self->got, text);
}

/* ---- the page -------------------------------------------------------------------------------- */

static const struct check {
    const char *name;
    void (*run)(struct example *self);
} checks[] = {{"exp", check_exp},         {"tanh", check_tanh},
              {"silu", check_silu},       {"gelu", check_gelu},
              {"softcap", check_softcap}, {"f16", check_f16},
              {"kv", check_kv},           {"f32", check_f32},
              {"rmsnorm", check_rmsnorm}, {"dot_f32", check_dot_f32},
              {"dot_f16", check_dot_f16}, {"quantize", check_quantize},
              {"block", check_block},     {"dot", check_dot},
              {"sin64", check_sin64},     {"cos64", check_cos64},
              {"pow64", check_pow64},     {"table", check_table},
              {"rope", check_rope},       {"attention", check_attention},
              {"route", check_route},     {"combine", check_combine},
              {"philox", check_philox},   {"sample", check_sample},
              {"sha256", check_sha256}};
#define CHECK_COUNT (sizeof checks / sizeof *checks)

/* Runs "name inputs = results"; counts it in seen. */
static void example_run(struct example *self, uint32_t seen[CHECK_COUNT])
{
    char *equals = strstr(self->text, " = ");
    cr_assert(equals, "line %u: no result", self->line);
    const char *want = equals + 3;
    *equals = '\0';
    self->next = self->text;
    const char *name = word_next(self);
    buf_init(&self->got, TEXT_SIZE);
    for (size_t i = 0; i < CHECK_COUNT; i++) {
        if (strcmp(checks[i].name, name) != 0)
            continue;
        checks[i].run(self);
        seen[i]++;
        cr_assert_null(self->next, "line %u: words are left over", self->line);
        cr_expect_str_eq(buf_text_view(&self->got), want, PAGE " line %u: %s gives %s, not %s",
                         self->line, name, buf_text_view(&self->got), want);
        buf_free(&self->got);
        return;
    }
    cr_assert_fail(PAGE " line %u: nothing is known of %s", self->line, name);
}

/* Adds a line to the example, with single spaces. */
static void example_add(struct example *self, const char *line)
{
    size_t size = strlen(self->text);
    for (; *line && *line != '\n'; line++) {
        if (*line == ' ' && (size == 0 || self->text[size - 1] == ' '))
            continue;
        cr_assert(size + 2 < TEXT_SIZE, "line %u is too long", self->line);
        self->text[size++] = *line;
    }
    while (size > 0 && self->text[size - 1] == ' ')
        size--;
    self->text[size] = '\0';
}

/* Goal: whoever computes by the page gets what the code gives. How: every example in it is run,
 * and every kind of example is there. */
Test(numerics_page, has_examples_that_the_reference_confirms)
{
    static struct example example;
    char line[1024];
    uint32_t seen[CHECK_COUNT] = {0};
    uint32_t number = 0;
    int inside = 0;
    FILE *page = fopen(PAGE, "r");
    cr_assert(page, "run it where " PAGE " is");
    while (fgets(line, sizeof line, page)) {
        number++;
        if (inside && line[0] == ' ') {
            example_add(&example, " ");
            example_add(&example, line);
            continue;
        }
        if (inside && example.text[0])
            example_run(&example, seen);
        example.text[0] = '\0';
        example.line = number;
        if (strncmp(line, "```", 3) == 0)
            inside = strcmp(line, "```check\n") == 0;
        else if (inside)
            example_add(&example, line);
    }
    fclose(page);
    for (size_t i = 0; i < CHECK_COUNT; i++)
        cr_expect_gt(seen[i], 0u, "the page has no example of %s", checks[i].name);
}

static const struct {
    const char *name;
    float value;
} constants[] = {
    {"EXP_MAX", DET_EXP_MAX},   {"EXP_MIN", DET_EXP_MIN},       {"LOG2_E", DET_LOG2_E},
    {"LN2_HIGH", DET_LN2_HIGH}, {"LN2_LOW", DET_LN2_LOW},       {"EXP_C2", DET_EXP_C2},
    {"EXP_C3", DET_EXP_C3},     {"EXP_C4", DET_EXP_C4},         {"EXP_C5", DET_EXP_C5},
    {"EXP_C6", DET_EXP_C6},     {"TANH_SMALL", DET_TANH_SMALL}, {"TANH_C0", DET_TANH_C0},
    {"TANH_C1", DET_TANH_C1},   {"TANH_C2", DET_TANH_C2},       {"TANH_C3", DET_TANH_C3},
    {"TANH_C4", DET_TANH_C4},   {"GELU_SCALE", DET_GELU_SCALE}, {"GELU_CUBE", DET_GELU_CUBE}};
#define CONSTANT_COUNT (sizeof constants / sizeof *constants)

/* One row of a table of constants: the decimal number means the bits, and they are the code's. */
static void constant_check(const char *name, const char *decimal, const char *bits,
                           uint32_t seen[CONSTANT_COUNT])
{
    const uint64_t want = strtoull(bits, NULL, 16);
    if (strlen(bits) == 16) {
        const double value = strtod(decimal, NULL);
        uint64_t got;
        memcpy(&got, &value, sizeof got);
        cr_expect_eq(got, want, "%s: %s is %016" PRIx64, name, decimal, got);
        return;
    }
    cr_expect_eq(det_bits(strtof(decimal, NULL)), (uint32_t)want, "%s: %s is %08x", name, decimal,
                 det_bits(strtof(decimal, NULL)));
    for (size_t i = 0; i < CONSTANT_COUNT; i++)
        if (strcmp(constants[i].name, name) == 0) {
            cr_expect_eq(det_bits(constants[i].value), (uint32_t)want, "%s", name);
            seen[i]++;
        }
}

Test(numerics_page, has_the_constants_of_the_code)
{
    char line[1024], name[40], decimal[60], bits[40];
    uint32_t seen[CONSTANT_COUNT] = {0};
    uint32_t rows = 0;
    FILE *page = fopen(PAGE, "r");
    cr_assert(page, "run it where " PAGE " is");
    while (fgets(line, sizeof line, page))
        if (sscanf(line, "| `%39[A-Z0-9_]` | %59[-+.0-9e] | `%39[0-9a-f]` |", name, decimal,
                   bits) == 3) {
            constant_check(name, decimal, bits, seen);
            rows++;
        }
    fclose(page);
    cr_expect_gt(rows, CONSTANT_COUNT, "the binary64 constants of the rotation are there too");
    for (size_t i = 0; i < CONSTANT_COUNT; i++)
        cr_expect_eq(seen[i], 1u, "%s is not on the page once", constants[i].name);
}
