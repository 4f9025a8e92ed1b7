#include "worker/model/gguf_value.h"

#include <inttypes.h>
#include <stdio.h>

#define SHOWN_TEXT_SIZE 400u /* bytes of a text before it is cut */
#define SHOWN_ELEMENTS  8u   /* of an array */
#define SHOWN_ELEMENT   60u  /* bytes of a text in an array */

/* The names carry their article, as they are used in sentences ("key x is a text, not ..."). */
static const struct {
    const char *name;
    const char *sentence;
    uint32_t size; /* bytes of one; 0: has a length of its own */
} types[] = {
    [GGUF_U8] = {"u8", "a u8", 1},       [GGUF_I8] = {"i8", "an i8", 1},
    [GGUF_U16] = {"u16", "a u16", 2},    [GGUF_I16] = {"i16", "an i16", 2},
    [GGUF_U32] = {"u32", "a u32", 4},    [GGUF_I32] = {"i32", "an i32", 4},
    [GGUF_F32] = {"f32", "an f32", 4},   [GGUF_BOOL] = {"bool", "a bool", 1},
    [GGUF_TEXT] = {"text", "a text", 0}, [GGUF_ARRAY] = {"array", "an array", 0},
    [GGUF_U64] = {"u64", "a u64", 8},    [GGUF_I64] = {"i64", "an i64", 8},
    [GGUF_F64] = {"f64", "an f64", 8},
};
#define TYPE_COUNT (sizeof types / sizeof types[0])

const char *gguf_value_type_name(uint32_t type)
{
    return type < TYPE_COUNT ? types[type].sentence : "of an unknown type";
}

int gguf_value_take_text(struct reader *cursor, struct gguf_text *out)
{
    uint64_t size;
    const size_t start = cursor->at;
    const uint8_t *data = NULL;
    if (reader_u64(cursor, &size))
        data = reader_take(cursor, size);
    if (!data) {
        cursor->at = start;
        return 0;
    }
    *out = (struct gguf_text){.data = (const char *)data, .size = (size_t)size};
    return 1;
}

static enum odsi_err ends_early(void)
{
    return odsi_fail(ODSI_ERR_CORRUPT, "the file ends inside its value");
}

/* count elements of out->element_type; leaves out->data and size. */
static enum odsi_err take_elements(struct reader *cursor, struct gguf_value *out)
{
    const size_t start = cursor->at;
    const uint32_t size = types[out->element_type].size;
    uint64_t total;
    if (size > 0) {
        if (__builtin_mul_overflow(out->count, (uint64_t)size, &total) ||
            !reader_take(cursor, total))
            return ends_early();
    } else {
        struct gguf_text text;
        for (uint64_t i = 0; i < out->count; i++) /* each takes 8 bytes or ends the loop */
            if (!gguf_value_take_text(cursor, &text))
                return ends_early();
    }
    out->data = cursor->data + start;
    out->size = cursor->at - start;
    if (out->element_type == GGUF_BOOL)
        for (size_t i = 0; i < out->size; i++)
            if (out->data[i] > 1)
                return odsi_fail(ODSI_ERR_CORRUPT, "a bool that is neither 0 nor 1");
    return ODSI_OK;
}

enum odsi_err gguf_value_take(struct reader *cursor, struct gguf_value *out)
{
    *out = (struct gguf_value){.count = 1};
    if (!reader_u32(cursor, &out->type))
        return ends_early();
    if (out->type >= TYPE_COUNT)
        return odsi_fail(ODSI_ERR_CORRUPT, "value type %" PRIu32 " does not exist", out->type);
    if (out->type == GGUF_TEXT) {
        struct gguf_text text;
        if (!gguf_value_take_text(cursor, &text))
            return ends_early();
        out->data = (const uint8_t *)text.data;
        out->size = text.size;
        return ODSI_OK;
    }
    out->element_type = out->type;
    if (out->type == GGUF_ARRAY) {
        if (!reader_u32(cursor, &out->element_type) || !reader_u64(cursor, &out->count))
            return ends_early();
        if (out->element_type >= TYPE_COUNT)
            return odsi_fail(ODSI_ERR_CORRUPT, "element type %" PRIu32 " does not exist",
                             out->element_type);
        if (out->element_type == GGUF_ARRAY)
            return odsi_fail(ODSI_ERR_UNSUPPORTED, "arrays of arrays are not supported");
    }
    return take_elements(cursor, out);
}

/* ---- numbers -------------------------------------------------------------------------------- */

/* The integer at from, sign-extended; *is_negative tells whether it is below 0. */
static uint64_t load_integer(uint32_t type, const uint8_t *from, int *is_negative)
{
    const uint32_t size = types[type].size;
    uint64_t bits = 0;
    for (uint32_t i = 0; i < size; i++)
        bits |= (uint64_t)from[i] << (8 * i);
    const int is_signed =
        type == GGUF_I8 || type == GGUF_I16 || type == GGUF_I32 || type == GGUF_I64;
    *is_negative = is_signed && (from[size - 1] & 0x80);
    if (*is_negative && size < 8)
        bits |= ~UINT64_C(0) << (8 * size);
    return bits;
}

static int is_integer(uint32_t type)
{
    return type <= GGUF_I32 || type == GGUF_U64 || type == GGUF_I64;
}

int gguf_value_u32(const struct gguf_value *self, uint32_t *out)
{
    if (!is_integer(self->type))
        return 0;
    int is_negative;
    const uint64_t value = load_integer(self->type, self->data, &is_negative);
    if (is_negative || value > UINT32_MAX)
        return 0;
    *out = (uint32_t)value;
    return 1;
}

static double load_float(uint32_t type, const uint8_t *from)
{
    if (type == GGUF_F32) {
        const uint32_t bits = bytes_load_u32(from);
        float value;
        memcpy(&value, &bits, sizeof value);
        return (double)value;
    }
    const uint64_t bits = bytes_load_u64(from);
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

int gguf_value_f32(const struct gguf_value *self, float *out)
{
    if (self->type != GGUF_F32 && self->type != GGUF_F64)
        return 0;
    const double value = load_float(self->type, self->data);
    if (value > 3.4028234663852886e38 || value < -3.4028234663852886e38)
        return 0; /* the conversion of an f64 beyond f32 is undefined in C; infinities go too */
    *out = (float)value;
    return 1;
}

/* ---- showing -------------------------------------------------------------------------------- */

/* Text that stops growing where its room ends. */
struct line {
    char *text;
    size_t size;
};

static void line_add(struct line *self, const char *text, size_t size)
{
    for (size_t i = 0; i < size && self->size + 1 < GGUF_VALUE_TEXT_SIZE; i++)
        self->text[self->size++] = text[i];
    self->text[self->size] = '\0';
}

static void line_add_escaped(struct line *self, const char *text, size_t size, size_t size_max)
{
    const size_t shown = size < size_max ? size : size_max;
    for (size_t i = 0; i < shown; i++) {
        const unsigned char byte = (unsigned char)text[i];
        char escape[8];
        if (byte == '\n')
            line_add(self, "\\n", 2);
        else if (byte < 0x20 || byte == 0x7f)
            line_add(self, escape, (size_t)snprintf(escape, sizeof escape, "\\x%02x", byte));
        else
            line_add(self, text + i, 1);
    }
    if (shown < size)
        line_add(self, "...", 3);
}

static void line_add_scalar(struct line *self, uint32_t type, const uint8_t *from)
{
    char text[40];
    int size = 0;
    int is_negative;
    if (type == GGUF_BOOL) {
        size = snprintf(text, sizeof text, "%s", from[0] ? "true" : "false");
    } else if (type == GGUF_F32 || type == GGUF_F64) {
        size = snprintf(text, sizeof text, "%.9g", load_float(type, from));
    } else {
        const uint64_t value = load_integer(type, from, &is_negative);
        size = is_negative ? snprintf(text, sizeof text, "-%" PRIu64, UINT64_C(0) - value)
                           : snprintf(text, sizeof text, "%" PRIu64, value);
    }
    line_add(self, text, (size_t)size);
}

static void line_add_array(struct line *self, const struct gguf_value *value)
{
    const struct gguf_array array = {.type = value->element_type,
                                     .count = value->count,
                                     .data = value->data,
                                     .size = value->size};
    char head[64];
    size_t cursor = 0;
    line_add(self, head,
             (size_t)snprintf(head, sizeof head, "%" PRIu64 " x %s: [", value->count,
                              types[value->element_type].name));
    for (uint64_t i = 0; i < value->count && i < SHOWN_ELEMENTS; i++) {
        struct gguf_text text;
        if (i > 0)
            line_add(self, ", ", 2);
        if (gguf_array_text(&array, &cursor, &text))
            line_add_escaped(self, text.data, text.size, SHOWN_ELEMENT);
        else
            line_add_scalar(self, value->element_type,
                            value->data + i * types[value->element_type].size);
    }
    line_add(self, value->count > SHOWN_ELEMENTS ? ", ...]" : "]",
             value->count > SHOWN_ELEMENTS ? 6 : 1);
}

void gguf_value_show(const struct gguf_value *self, char out[GGUF_VALUE_TEXT_SIZE])
{
    struct line line = {.text = out};
    out[0] = '\0';
    if (self->type == GGUF_TEXT)
        line_add_escaped(&line, (const char *)self->data, self->size, SHOWN_TEXT_SIZE);
    else if (self->type == GGUF_ARRAY)
        line_add_array(&line, self);
    else
        line_add_scalar(&line, self->type, self->data);
}
