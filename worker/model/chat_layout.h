/* The layouts of chat prompts that this build knows, as data: what stands before and after a
 * message of each role, where a system message goes, and by which words a template of this layout
 * is recognized. worker/model/chat_template.h renders them. Constant; any thread.
 *
 * Texts of a layout are written as the template prints them. "{bos}" and "{eos}" are the model's
 * tokens of that name. */
#ifndef ODSI_WORKER_MODEL_CHAT_LAYOUT_H
#define ODSI_WORKER_MODEL_CHAT_LAYOUT_H
#include <stddef.h>

enum chat_role { CHAT_SYSTEM, CHAT_USER, CHAT_ASSISTANT };
#define CHAT_ROLE_COUNT 3

enum chat_system {
    CHAT_SYSTEM_TURN,       /* a turn of its own, anywhere */
    CHAT_SYSTEM_REFUSED,    /* the template has no place for it */
    CHAT_SYSTEM_FIRST_USER, /* in front of the first user message, inside its turn */
    CHAT_SYSTEM_LAST_USER,  /* in front of the last one */
};

enum chat_layout_flag {
    CHAT_ALTERNATES = 1,    /* user and assistant in turn, whatever the template says */
    CHAT_TRIMS = 2,         /* white space around every message goes */
    CHAT_TRIMS_ANSWERS = 4, /* around those of the assistant */
    CHAT_TRIMS_FOLDED = 8,  /* around a user message together with the system message in front */
    CHAT_SKIPS_EMPTY = 16,  /* an empty system message is no turn */
    CHAT_DATED_SYSTEM = 32, /* the first turn is the system's, and begins with two dates */
};

#define CHAT_LAYOUT_NEEDS   5
#define CHAT_LAYOUT_ANSWERS 2

/* Where the assistant begins, and the words by which the template prints it. */
struct chat_answer {
    const char *text;
    const char *words;
};

struct chat_layout {
    const char *name; /* "llama-2", "mistral-v3-tekken": for people */
    /* In the spelling of worker/model/chat_source.h: all of needs and none of lacks. */
    const char *needs[CHAT_LAYOUT_NEEDS];
    const char *lacks[CHAT_LAYOUT_NEEDS];
    const char *before[CHAT_ROLE_COUNT];
    const char *after[CHAT_ROLE_COUNT];
    struct chat_answer answers[CHAT_LAYOUT_ANSWERS]; /* one of them is needed */
    enum chat_system system;
    const char *fold_before; /* around a system message inside a user turn */
    const char *fold_after;
    /* A template that brings a system message of its own has it between these two; with
     * CHAT_DATED_SYSTEM the date of today is there. */
    const char *default_from;
    const char *default_to;
    unsigned flags;
};

/* The layout whose words are all in source (NUL-terminated, spelled by chat_source_spell), with
 * the text of the answer's beginning; NULL when it is none of them. */
const struct chat_layout *chat_layout_find(const char *source, const char **answer);
/* By index, for tests; NULL behind the last one. */
const struct chat_layout *chat_layout_at(size_t index);
#endif
