#include "worker/model/tokenizer_split.h"

#include "common/base/alloc.h"
#include "worker/model/tokenizer.h"

#include <inttypes.h>
#include <string.h>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

/* Unicode's White_Space, as the inside of a class: PCRE2's own \s also has U+180E. */
#define SPACES                                                                                     \
    "\\x09-\\x0d \\x85\\xa0\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}"       \
    "\\x{3000}"
#define S "[" SPACES "]"

/* The ends that most patterns share: runs of marks, line ends, and white space, of which the last
 * one before a word belongs to the word. */
#define MARKS       " ?[^" SPACES "\\p{L}\\p{N}]+"
#define SPACE_RUNS  S "+(?![^" SPACES "])"
#define LINES_ENDS  S "*[\\r\\n]+|" SPACE_RUNS "|" S "+"
#define SHORT_FORMS "'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])"
#define WORDS       "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
#define GPT2        "'(?:[stmd]|re|ve|ll)| ?\\p{L}+| ?\\p{N}+|" MARKS "|" SPACE_RUNS

/* Tekken's words: capitals and then small letters, letters without case among both. */
#define CAPITALS "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
#define SMALLS   "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
#define CASED                                                                                      \
    "[^\\r\\n\\p{L}\\p{N}]?" CAPITALS "*" SMALLS "+|[^\\r\\n\\p{L}\\p{N}]?" CAPITALS "+" SMALLS "*"

#define STAGES_MAX 4u

/* Each stage cuts what the one before has left: what a pattern matches is a piece, and so is what
 * lies between two matches. */
static const struct {
    uint32_t pre;
    const char *stages[STAGES_MAX];
} patterns[] = {
    {TOKENIZER_PRE_DEFAULT, {"[\\p{P}$+<=>^~|]+", GPT2, "\\p{N}+", "[0-9][0-9][0-9]"}},
    {TOKENIZER_PRE_GPT2, {GPT2}},
    {TOKENIZER_PRE_LLAMA3, {SHORT_FORMS "|" WORDS "|\\p{N}{1,3}|" MARKS "[\\r\\n]*|" LINES_ENDS}},
    {TOKENIZER_PRE_QWEN2, {SHORT_FORMS "|" WORDS "|\\p{N}|" MARKS "[\\r\\n]*|" LINES_ENDS}},
    {TOKENIZER_PRE_SMOLLM, {"\\p{N}", GPT2}},
    {TOKENIZER_PRE_TEKKEN, {CASED "|\\p{N}|" MARKS "[\\r\\n/]*|" LINES_ENDS}},
};

/* Names in files. A name that is not here may cut in another way, so it is no one's default. */
static const struct {
    const char *name;
    uint32_t pre;
    int ignore_merges, add_bos;
} names[] = {
    {"default", TOKENIZER_PRE_DEFAULT, 0, 0},        {"gpt-2", TOKENIZER_PRE_GPT2, 0, 0},
    {"llama-bpe", TOKENIZER_PRE_LLAMA3, 1, 1},       {"llama3", TOKENIZER_PRE_LLAMA3, 1, 1},
    {"llama-v3", TOKENIZER_PRE_LLAMA3, 1, 1},        {"dbrx", TOKENIZER_PRE_LLAMA3, 0, 0},
    {"smaug-bpe", TOKENIZER_PRE_LLAMA3, 0, 0},       {"qwen2", TOKENIZER_PRE_QWEN2, 0, 0},
    {"deepseek-r1-qwen", TOKENIZER_PRE_QWEN2, 0, 0}, {"smollm", TOKENIZER_PRE_SMOLLM, 0, 0},
    {"tekken", TOKENIZER_PRE_TEKKEN, 1, 1},
};

struct tokenizer_split {
    pcre2_general_context *memory;
    pcre2_code *stages[STAGES_MAX];
    uint32_t stage_count;
};

struct tokenizer_split_scratch {
    pcre2_general_context *memory;
    pcre2_match_context *limits;
    pcre2_match_data *match;
};

/* ---- opening -------------------------------------------------------------------------------- */

static void *pcre_alloc(size_t size, void *context)
{
    void *out = NULL;
    (void)context;
    return alloc_zeroed(&out, size, 1) == ODSI_OK ? out : NULL;
}

static void pcre_free(void *memory, void *context)
{
    (void)context;
    alloc_free(memory);
}

static enum odsi_err no_memory(void)
{
    return odsi_fail(ODSI_ERR_NO_MEMORY, "no memory for the pre-tokenizer of a model");
}

static enum odsi_err compile(struct tokenizer_split *self, const char *pattern)
{
    int error = 0;
    PCRE2_SIZE where = 0;
    pcre2_compile_context *context = pcre2_compile_context_create(self->memory);
    if (!context)
        return no_memory();
    pcre2_code *code = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED,
                                     PCRE2_UTF | PCRE2_UCP, &error, &where, context);
    pcre2_compile_context_free(context);
    if (!code && error == PCRE2_ERROR_HEAP_FAILED)
        return no_memory();
    if (!code)
        return odsi_fail(ODSI_ERR_INTERNAL, "pre-tokenizer: PCRE2 error %d at %zu of \"%s\"", error,
                         (size_t)where, pattern);
    self->stages[self->stage_count++] = code;
    /* Without it, where the processor or a policy forbids it, the interpreter does the same. */
    (void)pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
    return ODSI_OK;
}

enum odsi_err tokenizer_split_open(struct tokenizer_split **out, uint32_t pre)
{
    struct tokenizer_split *self = NULL;
    const char *const *stages = NULL;
    *out = NULL;
    for (size_t i = 0; i < sizeof patterns / sizeof patterns[0]; i++)
        if (patterns[i].pre == pre)
            stages = patterns[i].stages;
    if (!stages)
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "tokenizer: pre-tokenizer %" PRIu32 " is not supported", pre);
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->memory = pcre2_general_context_create(pcre_alloc, pcre_free, NULL);
    if (!self->memory)
        err = no_memory();
    for (uint32_t i = 0; err == ODSI_OK && i < STAGES_MAX && stages[i]; i++)
        err = compile(self, stages[i]);
    if (err != ODSI_OK)
        goto fail;
    *out = self;
    return ODSI_OK;
fail:
    tokenizer_split_close(&self);
    return err;
}

void tokenizer_split_close(struct tokenizer_split **self)
{
    struct tokenizer_split *split = *self;
    if (!split)
        return;
    for (uint32_t i = 0; i < split->stage_count; i++)
        pcre2_code_free(split->stages[i]);
    pcre2_general_context_free(split->memory);
    alloc_free(split);
    *self = NULL;
}

uint32_t tokenizer_split_by_name(const char *name, size_t size, int *ignore_merges, int *add_bos)
{
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strlen(names[i].name) == size && memcmp(names[i].name, name, size) == 0) {
            *ignore_merges = names[i].ignore_merges;
            *add_bos = names[i].add_bos;
            return names[i].pre;
        }
    return TOKENIZER_PRE_NONE;
}

/* ---- cutting -------------------------------------------------------------------------------- */

enum odsi_err tokenizer_split_scratch_open(struct tokenizer_split_scratch **out, size_t size_max)
{
    struct tokenizer_split_scratch *self = NULL;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->memory = pcre2_general_context_create(pcre_alloc, pcre_free, NULL);
    if (self->memory) {
        self->limits = pcre2_match_context_create(self->memory);
        self->match = pcre2_match_data_create(1, self->memory);
    }
    if (!self->limits || !self->match) {
        err = no_memory();
        goto fail;
    }
    /* The patterns look at a byte a few times at most; nothing may take longer than that. */
    const size_t limit = 1000 + 16 * size_max;
    (void)pcre2_set_match_limit(self->limits, limit < UINT32_MAX ? (uint32_t)limit : UINT32_MAX);
    (void)pcre2_set_depth_limit(self->limits, 1000);
    *out = self;
    return ODSI_OK;
fail:
    tokenizer_split_scratch_close(&self);
    return err;
}

void tokenizer_split_scratch_close(struct tokenizer_split_scratch **self)
{
    struct tokenizer_split_scratch *scratch = *self;
    if (!scratch)
        return;
    pcre2_match_data_free(scratch->match);
    pcre2_match_context_free(scratch->limits);
    pcre2_general_context_free(scratch->memory);
    alloc_free(scratch);
    *self = NULL;
}

/* The next match at or behind from: [*start, *end). Both are size when there is none. */
static enum odsi_err next_match(const pcre2_code *code, struct tokenizer_split_scratch *scratch,
                                const char *text, size_t size, size_t from, size_t *start,
                                size_t *end)
{
    uint32_t options = PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY;
    int got =
        pcre2_match(code, (PCRE2_SPTR)text, size, from, options, scratch->match, scratch->limits);
    if (got == PCRE2_ERROR_JIT_STACKLIMIT)
        got = pcre2_match(code, (PCRE2_SPTR)text, size, from, options | PCRE2_NO_JIT,
                          scratch->match, scratch->limits);
    *start = *end = size;
    if (got == PCRE2_ERROR_NOMATCH)
        return ODSI_OK;
    if (got == PCRE2_ERROR_NOMEMORY)
        return no_memory();
    if (got < 0)
        return odsi_fail(ODSI_ERR_INTERNAL, "pre-tokenizer: PCRE2 error %d in a text of %zu bytes",
                         got, size);
    const PCRE2_SIZE *ends = pcre2_get_ovector_pointer(scratch->match);
    *start = ends[0];
    *end = ends[1];
    return ODSI_OK;
}

struct cutting {
    const struct tokenizer_split *split;
    struct tokenizer_split_scratch *scratch;
    enum odsi_err (*on_word)(void *context, const char *word, size_t size);
    void *context;
};

/* Cuts a piece by stage and those behind it: at most STAGES_MAX calls inside each other. */
static enum odsi_err cut(const struct cutting *self, uint32_t stage, const char *text, size_t size)
{
    if (stage == self->split->stage_count)
        return self->on_word(self->context, text, size);
    const pcre2_code *code = self->split->stages[stage];
    enum odsi_err err = ODSI_OK;
    for (size_t at = 0; err == ODSI_OK && at < size;) {
        size_t start, end;
        err = next_match(code, self->scratch, text, size, at, &start, &end);
        if (err == ODSI_OK && start > at)
            err = cut(self, stage + 1, text + at, start - at);
        if (err == ODSI_OK && end > start)
            err = cut(self, stage + 1, text + start, end - start);
        at = end;
    }
    return err;
}

enum odsi_err
tokenizer_split_words(const struct tokenizer_split *self, struct tokenizer_split_scratch *scratch,
                      const char *text, size_t size,
                      enum odsi_err (*on_word)(void *context, const char *word, size_t size),
                      void *context)
{
    const struct cutting cutting = {self, scratch, on_word, context};
    return size > 0 ? cut(&cutting, 0, text, size) : ODSI_OK;
}
