/* The inside of struct tokenizer, shared by the files whose names begin with tokenizer. */
#ifndef ODSI_WORKER_MODEL_TOKENIZER_PARTS_H
#define ODSI_WORKER_MODEL_TOKENIZER_PARTS_H
#include "common/base/err.h"
#include "worker/model/tokenizer.h"
#include "worker/model/tokenizer_special.h"
#include "worker/model/tokenizer_split.h"
#include "worker/model/tokenizer_table.h"

#include <stddef.h>
#include <stdint.h>

/* Token types, as in GGUF. */
enum {
    TOKENIZER_NORMAL = 1,
    TOKENIZER_UNKNOWN,
    TOKENIZER_CONTROL,
    TOKENIZER_USER_DEFINED,
    TOKENIZER_UNUSED,
    TOKENIZER_BYTE
};

/* The upper bits of a type byte. */
#define TOKENIZER_STRIP_LEFT  0x40u
#define TOKENIZER_STRIP_RIGHT 0x80u

struct tokenizer_token {
    uint32_t offset;   /* of its text in texts; of its piece for a token that is not shown */
    uint32_t priority; /* SPM: of two pairs the one that makes the lower joins first */
    uint16_t size;     /* of its text or piece */
    uint8_t type;      /* without the strip bits */
    uint8_t strip;     /* TOKENIZER_STRIP_LEFT, TOKENIZER_STRIP_RIGHT */
    uint8_t is_shown;  /* the text is what it adds to an answer; 0: it adds nothing */
    uint8_t is_end;
};

struct tokenizer {
    uint32_t kind, pre;
    uint32_t bos, eos, unknown; /* TOKENIZER_NONE: there is none */
    int add_bos, add_eos, add_space_prefix, ignore_merges;
    uint32_t end_count;
    uint32_t ends[TOKENIZER_ENDS_MAX];
    uint32_t count;
    struct tokenizer_token *tokens;   /* [count] */
    char *texts;                      /* of all tokens, one after the other */
    struct tokenizer_table table;     /* normal tokens by text */
    struct tokenizer_merges merges;   /* empty for SPM */
    struct tokenizer_special special; /* control and user-defined tokens by text */
    struct tokenizer_split *split;    /* NULL unless the kind is byte-level BPE */
    uint32_t byte_tokens[256];        /* TOKENIZER_NONE where the vocabulary has none */
    uint8_t pairs[65536 / 8];         /* bit 256*a+b: some normal text has byte b behind byte a */
    char *chat_template;
    uint32_t template_size;
};

/* Where ids go: counts on when there is no more room. */
struct tokenizer_ids {
    uint32_t *ids;
    uint32_t capacity;
    uint32_t count;
};

static inline void tokenizer_ids_add(struct tokenizer_ids *self, uint32_t id)
{
    if (self->count < self->capacity)
        self->ids[self->count] = id;
    self->count++;
}

static inline int tokenizer_has_pair(const struct tokenizer *self, uint8_t a, uint8_t b)
{
    const uint32_t bit = 256u * a + b;
    return self->pairs[bit / 8] >> bit % 8 & 1;
}

/* Length of the character at text; 0 when it is cut off by the end, -1 when no character starts
 * with these bytes (RFC 3629: no overlong forms, no surrogates, nothing above U+10FFFF). */
static inline int tokenizer_utf8_length(const uint8_t *text, size_t size)
{
    const uint8_t lead = text[0];
    if (lead < 0x80)
        return 1;
    if (lead < 0xc2 || lead > 0xf4)
        return -1;
    const int length = lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    uint8_t low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80; /* of the second byte only */
    uint8_t high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    for (int i = 1; i < length; i++) {
        if ((size_t)i == size)
            return 0;
        if (text[i] < low || text[i] > high)
            return -1;
        low = 0x80;
        high = 0xbf;
    }
    return length;
}

/* Adds the ids of the tokens, or the unknown token, that spell these bytes one by one. */
void tokenizer_spell(const struct tokenizer *self, const char *text, size_t size,
                     struct tokenizer_ids *list);
#endif
