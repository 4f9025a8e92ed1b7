#include "worker/model/tokenizer_write.h"

#include <inttypes.h>
#include <string.h>

int tokenizer_write_is_end_name(const char *piece, size_t size)
{
    static const char *const names[] = {
        "</s>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|end|>",
        "<|endoftext|>",
        "<end_of_turn>",
        "<|eot|>",
        "<|eom|>",
        "<EOT>",
        "<|end_of_turn|>",
        "<end_of_utterance>",
        "<\xef\xbd\x9c"
        "end\xe2\x96\x81of\xe2\x96\x81sentence\xef\xbd\x9c>", /* full-width bars */
    };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strlen(names[i]) == size && memcmp(names[i], piece, size) == 0)
            return 1;
    return 0;
}

enum odsi_err tokenizer_write_add_end(struct tokenizer_head *head, uint32_t id)
{
    uint32_t at = 0;
    if (id == TOKENIZER_NONE)
        return ODSI_OK;
    while (at < head->end_count && head->ends[at] < id)
        at++;
    if (at < head->end_count && head->ends[at] == id)
        return ODSI_OK;
    if (head->end_count == TOKENIZER_ENDS_MAX)
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "the tokenizer has more than %u tokens that end an answer",
                         TOKENIZER_ENDS_MAX);
    memmove(head->ends + at + 1, head->ends + at, (head->end_count - at) * sizeof head->ends[0]);
    head->ends[at] = id;
    head->end_count++;
    return ODSI_OK;
}

void tokenizer_write_head(struct buf *out, const struct tokenizer_head *head, uint32_t token_count)
{
    (void)buf_append(out, "ODSITOK2", 8);
    (void)buf_append_u32(out, head->kind);
    (void)buf_append_u32(out, head->pre);
    (void)buf_append_u32(out, head->bos);
    (void)buf_append_u32(out, head->eos);
    (void)buf_append_u32(out, head->unknown);
    (void)buf_append_u8(out, head->add_bos);
    (void)buf_append_u8(out, head->add_eos);
    (void)buf_append_u8(out, head->add_space_prefix);
    (void)buf_append_u8(out, head->ignore_merges);
    (void)buf_append_u32(out, head->end_count);
    for (uint32_t i = 0; i < head->end_count; i++)
        (void)buf_append_u32(out, head->ends[i]);
    (void)buf_append_u32(out, token_count);
}

enum odsi_err tokenizer_write_token(struct buf *out, float score, uint8_t type, const char *piece,
                                    size_t size)
{
    uint32_t bits;
    if (size > TOKENIZER_PIECE_SIZE_MAX)
        return odsi_fail(ODSI_ERR_CORRUPT, "a token of the vocabulary is a text of %zu bytes",
                         size);
    memcpy(&bits, &score, sizeof bits);
    const uint8_t size_bytes[2] = {(uint8_t)size, (uint8_t)(size >> 8)};
    (void)buf_append_u32(out, bits);
    (void)buf_append_u8(out, type);
    (void)buf_append(out, size_bytes, 2);
    return buf_append(out, piece, size);
}

void tokenizer_write_merge_count(struct buf *out, uint32_t merge_count)
{
    (void)buf_append_u32(out, merge_count);
}

void tokenizer_write_merge(struct buf *out, uint32_t left, uint32_t right)
{
    (void)buf_append_u32(out, left);
    (void)buf_append_u32(out, right);
}

enum odsi_err tokenizer_write_template(struct buf *out, const char *text, size_t size)
{
    if (size > TOKENIZER_TEMPLATE_SIZE_MAX)
        return odsi_fail(ODSI_ERR_UNSUPPORTED, "the chat template has %zu bytes; %u is the most",
                         size, TOKENIZER_TEMPLATE_SIZE_MAX);
    (void)buf_append_u32(out, (uint32_t)size);
    if (size > 0)
        (void)buf_append(out, text, size);
    const enum odsi_err err = buf_status(out);
    if (err == ODSI_ERR_RANGE)
        return odsi_fail(ODSI_ERR_UNSUPPORTED, "the tokenizer takes more than %zu bytes",
                         out->size_max);
    return err;
}

/* The byte that a character of the alphabet stands for, or -1: the printable ones of Latin-1 stand
 * for themselves, and the other 68 bytes, in order, for U+0100 to U+0143. */
static int byte_of_character(uint32_t character)
{
    uint32_t spare = 0x100;
    if ((character >= 0x21 && character <= 0x7e) || (character >= 0xa1 && character <= 0xac) ||
        (character >= 0xae && character <= 0xff))
        return (int)character;
    for (int byte = 0; byte < 256; byte++) {
        if ((byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae)
            continue;
        if (spare++ == character)
            return byte;
    }
    return -1;
}

int tokenizer_write_undo_alphabet(char *out, size_t *out_size, const char *piece, size_t size)
{
    size_t written = 0;
    for (size_t at = 0; at < size;) {
        const uint8_t lead = (uint8_t)piece[at];
        uint32_t character = lead;
        if (lead >= 0xc2 && lead <= 0xc5 && size - at >= 2 &&
            ((uint8_t)piece[at + 1] & 0xc0) == 0x80) {
            character = (lead & 0x1fu) << 6 | ((uint8_t)piece[at + 1] & 0x3fu);
            at++;
        } else if (lead >= 0x80) {
            return 0;
        }
        at++;
        const int byte = byte_of_character(character);
        if (byte < 0)
            return 0;
        out[written++] = (char)byte;
    }
    *out_size = written;
    return 1;
}
