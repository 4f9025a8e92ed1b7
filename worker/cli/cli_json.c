#include "worker/cli/cli_json.h"

#include "common/base/buf.h"
#include "worker/cli/cli_text.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <string.h>

#define TEXT_SIZE_MAX (256u << 20)

json_t *cli_json_text(const char *text, size_t size)
{
    json_t *value = json_stringn(text, size);
    if (value)
        return value;
    struct buf clean;
    buf_init(&clean, TEXT_SIZE_MAX);
    for (size_t at = 0; at < size;) {
        const size_t length = cli_text_utf8(text, size, at);
        if (length > 0)
            buf_append(&clean, text + at, length);
        else
            buf_append_text(&clean, "\xef\xbf\xbd");
        at += length ? length : 1;
    }
    if (buf_status(&clean) == ODSI_OK)
        value = json_stringn(buf_text_view(&clean), clean.size);
    buf_free(&clean);
    return value;
}

json_t *cli_json_u64(uint64_t value)
{
    char text[CLI_TEXT_SIZE];
    if (value <= INT64_MAX)
        return json_integer((json_int_t)value);
    snprintf(text, sizeof text, "%" PRIu64, value);
    return json_string(text);
}

json_t *cli_json_f64(double value)
{
    return isfinite(value) ? json_real(value) : json_null();
}

json_t *cli_json_digest(const struct digest *digest)
{
    char hex[DIGEST_HEX_SIZE];
    digest_to_hex(hex, digest);
    return json_string(hex);
}

json_t *cli_json_ids(const uint32_t *ids, uint32_t count)
{
    json_t *list = json_array();
    int bad = 0;
    for (uint32_t i = 0; i < count; i++)
        bad |= json_array_append_new(list, json_integer(ids[i]));
    if (!bad)
        return list;
    json_decref(list);
    return NULL;
}

/* The best id that comes after `after` in (logit descending, id ascending) order; vocab_size when
 * there is none. after == vocab_size: the very best. */
static uint32_t next_best(const float *logits, uint32_t vocab_size, uint32_t after)
{
    uint32_t best = vocab_size;
    for (uint32_t id = 0; id < vocab_size; id++) {
        const int is_left = after == vocab_size || logits[id] < logits[after] ||
                            (logits[id] == logits[after] && id > after);
        if (is_left && (best == vocab_size || logits[id] > logits[best]))
            best = id;
    }
    return best;
}

json_t *cli_json_top(const float *logits, uint32_t vocab_size, uint32_t count)
{
    json_t *list = json_array();
    int bad = 0;
    uint32_t id = vocab_size;
    for (uint32_t i = 0; i < count && !bad; i++) {
        id = next_best(logits, vocab_size, id);
        if (id == vocab_size)
            break;
        bad |= json_array_append_new(
            list, json_pack("[I, o]", (json_int_t)id, cli_json_f64((double)logits[id])));
    }
    if (!bad)
        return list;
    json_decref(list);
    return NULL;
}

json_t *cli_json_layers(uint32_t first, uint32_t end)
{
    char text[CLI_TEXT_SIZE];
    cli_text_layers(text, first, end);
    return json_string(text);
}

enum odsi_err cli_json_print(json_t *object, FILE *to)
{
    if (!object)
        return odsi_fail(ODSI_ERR_NO_MEMORY, "no memory for the JSON output");
    const int refused = json_dumpf(object, to, JSON_REAL_PRECISION(9));
    json_decref(object);
    if (refused || fputc('\n', to) == EOF || fflush(to) != 0)
        return odsi_fail(ODSI_ERR_IO, "writing the JSON output failed: %s", strerror(errno));
    return ODSI_OK;
}
