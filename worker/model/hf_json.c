#include "worker/model/hf_json.h"

#include "common/base/buf.h"
#include "common/base/io.h"

#include <stdio.h>
#include <string.h>

/* At most how many values the text holds: one, and one more behind each comma and each opening
 * bracket outside strings. A parsed value takes some tens of times the bytes of its text. */
static size_t count_values(const char *text, size_t size)
{
    size_t count = 1;
    int in_string = 0;
    for (size_t i = 0; i < size; i++) {
        if (in_string && text[i] == '\\')
            i++;
        else if (text[i] == '"')
            in_string = !in_string;
        else if (!in_string && (text[i] == ',' || text[i] == '[' || text[i] == '{'))
            count++;
    }
    return count;
}

enum odsi_err hf_json_parse(json_t **out, const void *text, size_t size)
{
    json_error_t error;
    *out = NULL;
    if (count_values(text, size) > HF_JSON_VALUES_MAX)
        return odsi_fail(ODSI_ERR_CORRUPT, "JSON of more than %u values", HF_JSON_VALUES_MAX);
    json_t *root = json_loadb(text, size, JSON_REJECT_DUPLICATES, &error);
    if (!root && json_error_code(&error) == json_error_out_of_memory)
        return odsi_fail(ODSI_ERR_NO_MEMORY, "no memory for %zu bytes of JSON", size);
    if (!root) {
        char shown[HF_JSON_SHOWN_SIZE];
        return odsi_fail(ODSI_ERR_CORRUPT, "not JSON: line %d, column %d: %s", error.line,
                         error.column, hf_json_shown(shown, error.text));
    }
    if (!json_is_object(root)) {
        json_decref(root);
        return odsi_fail(ODSI_ERR_CORRUPT, "not a JSON object");
    }
    *out = root;
    return ODSI_OK;
}

enum odsi_err hf_json_load(json_t **out, const char *folder, const char *name, size_t size_max)
{
    char path[IO_PATH_SIZE];
    struct buf text;
    *out = NULL;
    if ((size_t)snprintf(path, sizeof path, "%s/%s", folder, name) >= sizeof path)
        return odsi_fail(ODSI_ERR_RANGE, "a path of more than %u bytes", IO_PATH_SIZE - 1);
    buf_init(&text, size_max);
    enum odsi_err err = io_read_file(path, &text);
    if (err == ODSI_OK) {
        err = hf_json_parse(out, text.data ? (const char *)text.data : "", text.size);
        if (err != ODSI_OK)
            err = odsi_fail_prefix(err, "%s", path);
    }
    buf_free(&text);
    return err;
}

const char *hf_json_shown(char *out, const char *text)
{
    size_t i = 0;
    for (; text[i] && i < HF_JSON_SHOWN_SIZE - 1; i++)
        out[i] = text[i] >= ' ' && text[i] <= '~' ? text[i] : '?';
    out[i] = '\0';
    return out;
}

/* ---- members --------------------------------------------------------------------------------- */

/* NULL when it is missing, null, or something went wrong before. */
static const json_t *member(const struct hf_json *self, const char *key)
{
    const json_t *value = self->err == ODSI_OK ? json_object_get(self->object, key) : NULL;
    return json_is_null(value) ? NULL : value;
}

static void refuse(struct hf_json *self, const char *key, const char *wanted)
{
    self->err = odsi_fail(ODSI_ERR_CORRUPT, "%s is not %s", key, wanted);
}

uint32_t hf_json_u32(struct hf_json *self, const char *key, uint32_t fallback)
{
    const json_t *value = member(self, key);
    if (!value)
        return fallback;
    const double number = json_number_value(value);
    if (json_is_number(value) && number >= 0.0 && number <= 4294967295.0 &&
        number == (double)(uint32_t)number)
        return (uint32_t)number;
    refuse(self, key, "a whole number of 32 bits");
    return fallback;
}

double hf_json_f64(struct hf_json *self, const char *key, double fallback)
{
    const json_t *value = member(self, key);
    if (value && !json_is_number(value))
        refuse(self, key, "a number");
    return json_is_number(value) ? json_number_value(value) : fallback;
}

int hf_json_bool(struct hf_json *self, const char *key, int fallback)
{
    const json_t *value = member(self, key);
    if (value && !json_is_boolean(value))
        refuse(self, key, "true or false");
    return json_is_boolean(value) ? json_is_true(value) : fallback;
}

const char *hf_json_text_view(struct hf_json *self, const char *key, const char *fallback)
{
    const json_t *value = member(self, key);
    if (value && !json_is_string(value))
        refuse(self, key, "a text");
    return json_is_string(value) ? json_string_value(value) : fallback;
}

const json_t *hf_json_object_view(struct hf_json *self, const char *key)
{
    const json_t *value = member(self, key);
    if (value && !json_is_object(value))
        refuse(self, key, "an object");
    return json_is_object(value) ? value : NULL;
}

const json_t *hf_json_array_view(struct hf_json *self, const char *key)
{
    const json_t *value = member(self, key);
    if (value && !json_is_array(value))
        refuse(self, key, "an array");
    return json_is_array(value) ? value : NULL;
}

static void require(struct hf_json *self, const char *key)
{
    if (self->err == ODSI_OK && !member(self, key))
        self->err = odsi_fail(ODSI_ERR_CORRUPT, "%s is missing", key);
}

uint32_t hf_json_required_u32(struct hf_json *self, const char *key)
{
    require(self, key);
    return hf_json_u32(self, key, 0);
}

double hf_json_required_f64(struct hf_json *self, const char *key)
{
    require(self, key);
    return hf_json_f64(self, key, 0.0);
}

int hf_json_has(const struct hf_json *self, const char *key)
{
    return json_object_get(self->object, key) != NULL;
}
