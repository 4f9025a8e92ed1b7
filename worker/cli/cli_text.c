#include "worker/cli/cli_text.h"

#include <inttypes.h>
#include <string.h>

#define WORD_SIZE_MAX 31u

void cli_text_duration(char out[CLI_TEXT_SIZE], int64_t duration_us)
{
    const char *sign = duration_us < 0 ? "-" : "";
    const uint64_t value = duration_us < 0 ? 0 - (uint64_t)duration_us : (uint64_t)duration_us;
    if (value < 1000)
        snprintf(out, CLI_TEXT_SIZE, "%s%" PRIu64 " us", sign, value);
    else if (value < 1000000)
        snprintf(out, CLI_TEXT_SIZE, "%s%.2f ms", sign, (double)value / 1e3);
    else
        snprintf(out, CLI_TEXT_SIZE, "%s%.2f s", sign, (double)value / 1e6);
}

void cli_text_bytes(char out[CLI_TEXT_SIZE], uint64_t size)
{
    static const char *const units[] = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    if (size < 1024) {
        snprintf(out, CLI_TEXT_SIZE, "%" PRIu64 " B", size);
        return;
    }
    double value = (double)size / 1024;
    unsigned unit = 0;
    for (; value >= 1023.95; unit++) /* what %.1f would print as 1024.0 */
        value /= 1024;
    snprintf(out, CLI_TEXT_SIZE, "%.1f %s", value, units[unit]);
}

void cli_text_layers(char out[CLI_TEXT_SIZE], uint32_t first, uint32_t end)
{
    if (end <= first)
        snprintf(out, CLI_TEXT_SIZE, "-");
    else
        snprintf(out, CLI_TEXT_SIZE, "%" PRIu32 "-%" PRIu32, first, end - 1);
}

/* A decimal number; returns 0 when there is none or it does not fit. */
static int read_u32(const char **text, uint32_t *out)
{
    const char *at = *text;
    uint64_t value = 0;
    for (; *at >= '0' && *at <= '9'; at++) {
        value = value * 10 + (uint64_t)(*at - '0');
        if (value > UINT32_MAX)
            return 0;
    }
    if (at == *text)
        return 0;
    *out = (uint32_t)value;
    *text = at;
    return 1;
}

enum odsi_err cli_text_read_layers(const char **text, uint32_t *first, uint32_t *end)
{
    const char *at = *text;
    uint32_t last = 0;
    if (!read_u32(&at, first))
        goto fail;
    last = *first;
    if (*at == '-') {
        at++;
        if (!read_u32(&at, &last))
            goto fail;
    }
    if (last < *first || last == UINT32_MAX)
        goto fail;
    *end = last + 1;
    *text = at;
    return ODSI_OK;
fail:
    return odsi_fail(ODSI_ERR_INVALID,
                     "'%.32s' is not a range of layers: write FIRST-LAST, such as 0-11", *text);
}

enum odsi_err cli_text_read_ids(const char *text, uint32_t *ids, uint32_t *count)
{
    const uint32_t count_max = *count;
    const char *at = text;
    *count = 0;
    while (*at) {
        if (*count == count_max)
            return odsi_fail(ODSI_ERR_RANGE, "more than %" PRIu32 " token ids", count_max);
        if (!read_u32(&at, &ids[*count]) || (*at != ',' && *at != '\0') ||
            (*at == ',' && at[1] == '\0'))
            return odsi_fail(ODSI_ERR_INVALID,
                             "'%.64s' is not a list of token ids: write them as 1,5,7", text);
        ++*count;
        if (*at == ',')
            at++;
    }
    return ODSI_OK;
}

static unsigned min3(unsigned a, unsigned b, unsigned c)
{
    const unsigned ab = a < b ? a : b;
    return ab < c ? ab : c;
}

unsigned cli_text_distance(const char *a, const char *b)
{
    const size_t a_size = strlen(a), b_size = strlen(b);
    unsigned cost[WORD_SIZE_MAX + 1][WORD_SIZE_MAX + 1]; /* of turning a[0..i) into b[0..j) */
    if (a_size > WORD_SIZE_MAX || b_size > WORD_SIZE_MAX)
        return WORD_SIZE_MAX + 1;
    for (size_t i = 0; i <= a_size; i++) {
        for (size_t j = 0; j <= b_size; j++) {
            if (i == 0 || j == 0) {
                cost[i][j] = (unsigned)(i + j);
                continue;
            }
            cost[i][j] = min3(cost[i - 1][j] + 1, cost[i][j - 1] + 1,
                              cost[i - 1][j - 1] + (a[i - 1] != b[j - 1]));
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] &&
                cost[i - 2][j - 2] + 1 < cost[i][j])
                cost[i][j] = cost[i - 2][j - 2] + 1;
        }
    }
    return cost[a_size][b_size];
}

size_t cli_text_utf8(const char *text, size_t size, size_t at)
{
    const uint8_t *byte = (const uint8_t *)text + at;
    const size_t left = size - at;
    size_t length = 0;
    uint32_t smallest = 0, code = 0;
    if (left == 0)
        return 0;
    if (byte[0] < 0x80)
        return 1;
    if (byte[0] >= 0xc2 && byte[0] < 0xe0) {
        length = 2, smallest = 0x80, code = byte[0] & 0x1fu;
    } else if (byte[0] >= 0xe0 && byte[0] < 0xf0) {
        length = 3, smallest = 0x800, code = byte[0] & 0x0fu;
    } else if (byte[0] >= 0xf0 && byte[0] < 0xf5) {
        length = 4, smallest = 0x10000, code = byte[0] & 0x07u;
    }
    if (length == 0 || length > left)
        return 0;
    for (size_t i = 1; i < length; i++) {
        if ((byte[i] & 0xc0u) != 0x80)
            return 0;
        code = code << 6 | (byte[i] & 0x3fu);
    }
    if (code < smallest || code > 0x10ffff || (code >= 0xd800 && code < 0xe000))
        return 0;
    return length;
}

void cli_text_show(FILE *to, int is_terminal, const char *text, size_t size)
{
    if (!is_terminal) {
        fwrite(text, 1, size, to);
        return;
    }
    for (size_t at = 0; at < size;) {
        const size_t length = cli_text_utf8(text, size, at);
        const uint8_t *byte = (const uint8_t *)text + at;
        const int is_control = length == 1 && (byte[0] < 0x20 || byte[0] == 0x7f) &&
                               byte[0] != '\n' && byte[0] != '\t';
        const int is_c1 = length == 2 && byte[0] == 0xc2 && byte[1] < 0xa0;
        if (length == 0 || is_control || is_c1)
            fputs("\xef\xbf\xbd", to);
        else
            fwrite(text + at, 1, length, to);
        at += length ? length : 1;
    }
}
