/* Tokenizers: canonical bytes of strangers, and texts of strangers. The first byte of an input says
 * how the rest is used: as canonical bytes, or as a text for one of a few vocabularies of our own,
 * with and without special tokens. Whatever opens must encode any text, must give it back when its
 * vocabulary spells every byte, and segments must get the ids of the whole text.
 *
 * Run by `make fuzz`; the seeds are in tests/vectors/fuzz_tokenizer. */
#include "common/base/assert.h"
#include "common/base/buf.h"
#include "worker/model/tokenizer.h"
#include "worker/model/tokenizer_write.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define TEXT_SIZE_MAX 4096u

static const char sample[] =
    "Once  upon a time, \xe2\x96\x81 Zo\xc3\xab <s>\n\xff\x00 it's 123 \xf0\x9f\xa6\x8a";

/* A few merges that build on each other, and special tokens that begin alike. */
static void write_own(struct buf *out, uint32_t kind, uint32_t pre)
{
    static const char *const pieces[] = {"  ", "th",  "the",  "in",  "ing",
                                         " t", " th", " the", "\n\n"};
    static const uint32_t merges[][2] = {{' ', ' '}, {'t', 'h'}, {257, 'e'},
                                         {'i', 'n'}, {259, 'g'}, {' ', 't'},
                                         {' ', 257}, {' ', 258}, {'\n', '\n'}};
    static const struct {
        const char *piece;
        uint8_t type;
    } named[] = {{"<s>", 3}, {"<sx", 3 | 0x80}, {"<", 4}, {"the end", 4}, {"x>", 3 | 0x40}};
    const struct tokenizer_head head = {
        .kind = kind,
        .pre = pre,
        .bos = 265,
        .eos = TOKENIZER_NONE,
        .unknown = TOKENIZER_NONE,
        .add_bos = 1,
        .add_space_prefix = kind == TOKENIZER_BYTE_BPE ? 0 : TOKENIZER_PREFIX_ALWAYS,
    };
    tokenizer_write_head(out, &head, 270);
    for (uint32_t byte = 0; byte < 256; byte++) {
        char text[8] = {(char)byte};
        size_t text_size = 1;
        if (kind != TOKENIZER_BYTE_BPE) {
            static const char digits[] = "0123456789ABCDEF";
            const char name[] = {'<', '0', 'x', digits[byte >> 4], digits[byte & 15], '>'};
            memcpy(text, name, text_size = sizeof name);
        }
        (void)tokenizer_write_token(out, 0.0f, kind == TOKENIZER_BYTE_BPE ? 1 : 6, text, text_size);
    }
    for (size_t i = 0; i < 9; i++)
        (void)tokenizer_write_token(out, kind == TOKENIZER_SPM ? -(float)i : 0.0f, 1, pieces[i],
                                    strlen(pieces[i]));
    for (size_t i = 0; i < 5; i++)
        (void)tokenizer_write_token(out, 0.0f, named[i].type, named[i].piece,
                                    strlen(named[i].piece));
    tokenizer_write_merge_count(out, kind == TOKENIZER_BYTE_BPE ? 9 : 0);
    for (size_t i = 0; i < 9 && kind == TOKENIZER_BYTE_BPE; i++)
        tokenizer_write_merge(out, merges[i][0], merges[i][1]);
    ODSI_ASSERT(tokenizer_write_template(out, NULL, 0) == ODSI_OK);
}

static void try_text(const struct tokenizer *tokenizer, const char *text, size_t size,
                     unsigned flags)
{
    static uint32_t ids[3 * TEXT_SIZE_MAX + 4];
    static uint32_t again[3 * TEXT_SIZE_MAX + 4];
    static char back[3 * TEXT_SIZE_MAX];
    uint32_t count = 3 * TEXT_SIZE_MAX + 4;
    uint32_t again_count = count;
    size_t back_size = sizeof back;
    enum odsi_err err = tokenizer_encode(tokenizer, text, size, flags, ids, &count);
    ODSI_ASSERT(err == ODSI_OK);
    const int is_special = (flags & TOKENIZER_SPECIAL) != 0;
    if (!is_special) {
        const struct tokenizer_segment segments[] = {{text, size / 3, 0},
                                                     {text + size / 3, size - size / 3, 0}};
        err = tokenizer_encode_segments(tokenizer, segments, 2, flags, again, &again_count);
        ODSI_ASSERT(err == ODSI_OK);
        ODSI_ASSERT(again_count == count);
        ODSI_ASSERT(memcmp(again, ids, count * sizeof *ids) == 0);
    }
    err = tokenizer_decode(tokenizer, ids, count, back, &back_size);
    ODSI_ASSERT(err == ODSI_OK || err == ODSI_ERR_RANGE); /* a token's text may be long */
    if (!is_special && err == ODSI_OK && !memmem(back, back_size, "\xef\xbf\xbd", 3))
        ODSI_ASSERT(back_size == size && memcmp(back, text, size) == 0);
    ODSI_ASSERT(err != ODSI_OK || tokenizer_utf8_whole(back, back_size) <= back_size);
}

static void try_canonical(const uint8_t *data, size_t size)
{
    struct tokenizer *tokenizer = NULL;
    size_t template_size;
    if (tokenizer_open(&tokenizer, data, size) != ODSI_OK)
        return;
    const char *text = tokenizer_template_view(tokenizer, &template_size);
    ODSI_ASSERT(text != NULL && text[template_size] == '\0');
    ODSI_ASSERT(tokenizer_find(tokenizer, sample, 3) == TOKENIZER_NONE ||
                tokenizer_find(tokenizer, sample, 3) < tokenizer_vocab_size(tokenizer));
    for (unsigned flags = 0; flags < 4; flags++)
        try_text(tokenizer, sample, sizeof sample - 1, flags);
    try_text(tokenizer, (const char *)data, size < TEXT_SIZE_MAX ? size : TEXT_SIZE_MAX, 0);
    tokenizer_close(&tokenizer);
}

/* Opened once: compiling patterns takes longer than a text does. */
static const struct tokenizer *own(uint32_t choice)
{
    static struct tokenizer *opened[16];
    if (!opened[choice]) {
        struct buf bytes;
        buf_init(&bytes, 1u << 20);
        if (choice <= TOKENIZER_PRE_TEKKEN)
            write_own(&bytes, TOKENIZER_BYTE_BPE, choice);
        else
            write_own(&bytes, TOKENIZER_SPM, TOKENIZER_PRE_NONE);
        const enum odsi_err err = tokenizer_open(&opened[choice], bytes.data, bytes.size);
        ODSI_ASSERT(err == ODSI_OK);
        buf_free(&bytes);
    }
    return opened[choice];
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size == 0)
        return 0;
    const uint32_t choice = data[0] % 16;
    if (choice == 0) {
        try_canonical(data + 1, size - 1);
        return 0;
    }
    const size_t text_size = size - 1 < TEXT_SIZE_MAX ? size - 1 : TEXT_SIZE_MAX;
    for (unsigned flags = 0; flags < 4; flags++)
        try_text(own(choice), (const char *)data + 1, text_size, flags);
    return 0;
}
