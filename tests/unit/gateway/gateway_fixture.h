/* What the gateway's tests share: a small tokenizer, repeatable chance, temporary folders. */
#ifndef ODSI_TESTS_UNIT_GATEWAY_GATEWAY_FIXTURE_H
#define ODSI_TESTS_UNIT_GATEWAY_GATEWAY_FIXTURE_H
#include "common/base/buf.h"
#include "worker/gateway/path.h"
#include "worker/model/tokenizer.h"

#include <stdint.h>

/* Ids of the fixture's tokenizer. 0 is unknown, FIXTURE_BYTE + b is the byte b. */
enum {
    FIXTURE_BOS = 1,
    FIXTURE_EOS = 2,
    FIXTURE_BYTE = 3,
    FIXTURE_HELLO = 259, /* " hello" */
    FIXTURE_WORLD,       /* " world" */
    FIXTURE_ST,          /* "ST" */
    FIXTURE_OP,          /* "OP" */
    FIXTURE_EURO,        /* the euro sign, three bytes */
    FIXTURE_LONG,        /* 300 letters x */
    FIXTURE_VOCAB,
};

/* The chat template of Zephyr, and what is rendered for one message. */
#define FIXTURE_TEMPLATE                                                                           \
    "{{ '<|user|>\\n' + message['content'] + eos_token }}\n{% elif x %}"                           \
    "{{ '<|system|>\\n' + message['content'] + eos_token }}\n{% elif y %}"                         \
    "{{ '<|assistant|>\\n' + message['content'] + eos_token }}\n{% endif %}"                       \
    "{{ '<|assistant|>' }}\n{% endfor %}"

/* Its canonical bytes, and the tokenizer made of them (to be closed). */
void fixture_tokenizer_bytes(struct buf *out);
struct tokenizer *fixture_tokenizer(void);
/* A model without tensors, as a worker would send it; seed makes different ones. */
void fixture_model(struct buf *manifest, struct buf *tokenizer, uint32_t seed, uint32_t vocab_size);

/* Numbers from a seed (xorshift), the same on every machine. */
struct fixture_random {
    uint64_t state;
};
uint32_t fixture_random_next(void *context);
/* Below limit. */
uint32_t fixture_random_below(struct fixture_random *self, uint32_t limit);

/* An empty folder, removed with everything in it by fixture_folder_remove. */
void fixture_folder_make(char out[256]);
void fixture_folder_remove(const char *folder);
/* "folder/name" in out. */
void fixture_path(char out[512], const char *folder, const char *name);
#endif
