/* A conversation as the text that a model was trained to go on with.
 *
 * The chat template of a model file is a program (Jinja). It is not run: its words tell which of
 * the layouts of worker/model/chat_layout.h it prints, and the layout is rendered. A template
 * whose words fit none of them is refused, so what is rendered is what the template prints:
 *   Llama 2, Llama 3, Llama 3.1 to 3.3, Mistral (v0.1 to v7), ChatML (Qwen 1.5 to 3, SmolLM2),
 *   Gemma 1 to 3, Phi-3 and 3.5, Zephyr and TinyLlama.
 * Three things differ, all for prompts that do not change from day to day: where Llama 3.1 to 3.3
 * can ask for today's date the one written in the template is taken, as the template itself does
 * without a clock; the default system messages of Mistral v7, which hold a date, are left out; and
 * the last message must be the user's.
 *
 * What people wrote can never become a control token: the texts of messages are segments of their
 * own, which the tokenizer takes as plain text whatever they spell.
 * Pure functions over immutable objects; any thread. */
#ifndef ODSI_WORKER_MODEL_CHAT_TEMPLATE_H
#define ODSI_WORKER_MODEL_CHAT_TEMPLATE_H
#include "common/base/buf.h"
#include "common/base/err.h"
#include "worker/model/chat_layout.h"
#include "worker/model/tokenizer.h"

#include <stddef.h>
#include <stdint.h>

struct chat_template;

struct chat_message {
    enum chat_role role;
    const char *content; /* [size] bytes */
    size_t size;
};

/* text (Jinja, size bytes, not kept) is tokenizer_template_view of the model.
 * Errors: ODSI_ERR_UNSUPPORTED (there is none, or none that this build knows), ODSI_ERR_RANGE
 * (longer than TOKENIZER_TEMPLATE_SIZE_MAX), ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err chat_template_open(struct chat_template **out, const char *text,
                                               size_t size);
/* *self may be NULL. */
void chat_template_close(struct chat_template **self);
/* The name of its layout, as chat_layout.h has it. */
const char *chat_template_name(const struct chat_template *self);

/* "system", "user", "assistant". Errors: ODSI_ERR_INVALID. */
ODSI_MUST_USE enum odsi_err chat_template_role(const char *name, enum chat_role *out);

/* Part of a rendered prompt. */
struct chat_segment {
    size_t size;    /* bytes; they follow the segment before */
    int is_special; /* the template's, where control tokens count; else what people wrote */
};

/* Zero-initialize; ended with chat_template_prompt_free. */
struct chat_prompt {
    struct buf text;
    struct chat_segment *segments; /* [segment_count]; none is empty, no two neighbours alike */
    uint32_t segment_count;
    uint32_t segment_capacity;
};
void chat_template_prompt_free(struct chat_prompt *prompt);

/* Renders messages[count] into out, up to where the assistant begins. bos and eos are the texts of
 * the model's tokens ("<s>"; "": there is none).
 * Errors: ODSI_ERR_INVALID (no message, more than LIMIT_CHAT_MESSAGES, more than LIMIT_PROMPT_SIZE
 * in all, the last one not the user's, an order of roles that the template refuses),
 * ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err chat_template_render(const struct chat_template *self, const char *bos,
                                                 const char *eos,
                                                 const struct chat_message *messages,
                                                 uint32_t count, struct chat_prompt *out);

/* The ids of messages[message_count] for the model of tokenizer, by its own template. The bos
 * stands in front where the template prints it or the model wants it. *count is capacity on entry
 * and the number written on return.
 * Errors: those of chat_template_open and chat_template_render; ODSI_ERR_INVALID also when a
 * message holds a border of turns that this vocabulary takes for one in any text; ODSI_ERR_RANGE
 * (more than *count tokens; *count then holds how many there are). */
ODSI_MUST_USE enum odsi_err chat_template_encode(const struct tokenizer *tokenizer,
                                                 const struct chat_message *messages,
                                                 uint32_t message_count, uint32_t *tokens,
                                                 uint32_t *count);
#endif
