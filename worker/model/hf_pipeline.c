#include "worker/model/hf_pipeline.h"

#include <string.h>

#define SPACE_MARK "\xe2\x96\x81" /* U+2581 */
#define STEPS_MAX  16u            /* of one sequence */

/* The patterns of the models' own files, character by character. */
static const struct {
    uint32_t pre;
    const char *pattern;
} patterns[] = {
    {TOKENIZER_PRE_LLAMA3,
     "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| "
     "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},
    {TOKENIZER_PRE_QWEN2, "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| "
                          "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},
    {TOKENIZER_PRE_TEKKEN,
     "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+|"
     "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*|"
     "\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},
    {TOKENIZER_PRE_GPT2,
     "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+"},
};

/* What the steps in front of the merges add up to. */
struct steps {
    int marks_spaces; /* " " becomes U+2581 */
    int prefix;       /* enum tokenizer_prefix */
    int has_bytes;    /* ByteLevel: bytes as characters of its alphabet */
    int cuts_digits;  /* each digit is a word */
    uint32_t pre;
};

static const char *text_of(const json_t *object, const char *key)
{
    const char *text = json_string_value(json_object_get(object, key));
    return text ? text : "";
}

static int is(const json_t *object, const char *key, const char *wanted)
{
    return strcmp(text_of(object, key), wanted) == 0;
}

/* A flag that may be left out. */
static int flag_of(const json_t *object, const char *key, int fallback)
{
    const json_t *value = json_object_get(object, key);
    return json_is_boolean(value) ? json_is_true(value) : fallback;
}

/* The steps of a sequence, or the one step itself; nothing for null. */
static enum odsi_err list_steps(const json_t *step, const char *list_key,
                                const json_t *out[STEPS_MAX], size_t *count)
{
    *count = 0;
    if (!step || json_is_null(step))
        return ODSI_OK;
    if (!is(step, "type", "Sequence")) {
        out[(*count)++] = step;
        return ODSI_OK;
    }
    const json_t *list = json_object_get(step, list_key);
    if (!json_is_array(list) || json_array_size(list) > STEPS_MAX)
        return odsi_fail(ODSI_ERR_CORRUPT, "tokenizer.json: a Sequence without %s, or too long",
                         list_key);
    for (size_t i = 0; i < json_array_size(list); i++)
        out[(*count)++] = json_array_get(list, i);
    return ODSI_OK;
}

/* The step as short text for a sentence. */
static enum odsi_err unsupported(const char *what, const json_t *step)
{
    char *text = json_dumps(step, JSON_COMPACT | JSON_ENSURE_ASCII | JSON_ENCODE_ANY);
    const enum odsi_err err = odsi_fail(
        ODSI_ERR_UNSUPPORTED, "tokenizer.json: the %s %.300s is not supported by this build", what,
        text ? text : "?");
    json_free_t free_text;
    json_get_alloc_funcs(NULL, &free_text);
    free_text(text);
    return err;
}

/* ---- the normalizer ------------------------------------------------------------------------- */

static enum odsi_err read_normalizer(const json_t *root, struct steps *out)
{
    const json_t *steps[STEPS_MAX];
    size_t count;
    const enum odsi_err err =
        list_steps(json_object_get(root, "normalizer"), "normalizers", steps, &count);
    if (err != ODSI_OK)
        return err;
    for (size_t i = 0; i < count; i++) {
        const json_t *pattern = json_object_get(steps[i], "pattern");
        if (is(steps[i], "type", "NFC"))
            continue;
        if (is(steps[i], "type", "Prepend") && is(steps[i], "prepend", SPACE_MARK))
            out->prefix = TOKENIZER_PREFIX_ALWAYS;
        else if (is(steps[i], "type", "Replace") && is(pattern, "String", " ") &&
                 is(steps[i], "content", SPACE_MARK))
            out->marks_spaces = 1;
        else
            return unsupported("normalizer", steps[i]);
    }
    return ODSI_OK;
}

/* ---- the pre-tokenizer ---------------------------------------------------------------------- */

/* Cutting at every space is not what models do that join words: "split" must be off. */
static int read_metaspace(const json_t *step, struct steps *out)
{
    const json_t *scheme = json_object_get(step, "prepend_scheme");
    if (!is(step, "replacement", SPACE_MARK) || flag_of(step, "split", 1))
        return 0;
    out->marks_spaces = 1;
    if (!json_is_string(scheme))
        out->prefix =
            flag_of(step, "add_prefix_space", 1) ? TOKENIZER_PREFIX_ALWAYS : TOKENIZER_PREFIX_NEVER;
    else if (is(step, "prepend_scheme", "always"))
        out->prefix = TOKENIZER_PREFIX_ALWAYS;
    else if (is(step, "prepend_scheme", "first"))
        out->prefix = TOKENIZER_PREFIX_START;
    else if (is(step, "prepend_scheme", "never"))
        out->prefix = TOKENIZER_PREFIX_NEVER;
    else
        return 0;
    return 1;
}

static int read_split(const json_t *step, struct steps *out)
{
    const json_t *pattern = json_object_get(step, "pattern");
    /* Gemma's: there are no spaces any more where this looks for them. */
    if (is(pattern, "String", " ") && out->marks_spaces)
        return 1;
    if (!is(step, "behavior", "Isolated") || flag_of(step, "invert", 0) ||
        out->pre != TOKENIZER_PRE_NONE || out->cuts_digits)
        return 0;
    for (size_t i = 0; i < sizeof patterns / sizeof patterns[0]; i++)
        if (is(pattern, "Regex", patterns[i].pattern))
            out->pre = patterns[i].pre;
    return out->pre != TOKENIZER_PRE_NONE;
}

static int read_byte_level(const json_t *step, struct steps *out)
{
    const int has_pattern = flag_of(step, "use_regex", 1);
    if (flag_of(step, "add_prefix_space", 1) || out->has_bytes ||
        has_pattern == (out->pre != TOKENIZER_PRE_NONE))
        return 0;
    out->has_bytes = 1;
    if (has_pattern)
        out->pre = out->cuts_digits ? TOKENIZER_PRE_SMOLLM : TOKENIZER_PRE_GPT2;
    return 1;
}

static enum odsi_err read_pre_tokenizer(const json_t *root, struct steps *out)
{
    const json_t *steps[STEPS_MAX];
    size_t count;
    const enum odsi_err err =
        list_steps(json_object_get(root, "pre_tokenizer"), "pretokenizers", steps, &count);
    if (err != ODSI_OK)
        return err;
    for (size_t i = 0; i < count; i++) {
        int known = 0;
        if (is(steps[i], "type", "Metaspace"))
            known = read_metaspace(steps[i], out);
        else if (is(steps[i], "type", "Split"))
            known = read_split(steps[i], out);
        else if (is(steps[i], "type", "ByteLevel"))
            known = read_byte_level(steps[i], out);
        else if (is(steps[i], "type", "Digits"))
            known = out->cuts_digits = i == 0 && flag_of(steps[i], "individual_digits", 0);
        if (!known)
            return unsupported("pre-tokenizer", steps[i]);
    }
    return ODSI_OK;
}

/* ---- the post-processor --------------------------------------------------------------------- */

/* [bos] text [eos], in "single" of a TemplateProcessing. */
static enum odsi_err read_template(const json_t *step, struct hf_pipeline_ends *out)
{
    const json_t *single = json_object_get(step, "single");
    int seen_text = 0;
    for (size_t i = 0; i < json_array_size(single); i++) {
        const json_t *part = json_array_get(single, i);
        const char *id =
            json_string_value(json_object_get(json_object_get(part, "SpecialToken"), "id"));
        if (json_object_get(part, "Sequence") && !seen_text)
            seen_text = 1;
        else if (id && !seen_text && !out->first)
            out->first = id;
        else if (id && seen_text && !out->last)
            out->last = id;
        else
            return unsupported("post-processor", step);
    }
    return seen_text ? ODSI_OK : unsupported("post-processor", step);
}

static enum odsi_err read_post_processor(const json_t *root, struct hf_pipeline_ends *out)
{
    const json_t *steps[STEPS_MAX];
    size_t count;
    enum odsi_err err =
        list_steps(json_object_get(root, "post_processor"), "processors", steps, &count);
    for (size_t i = 0; err == ODSI_OK && i < count; i++) {
        if (is(steps[i], "type", "ByteLevel"))
            continue; /* it only moves offsets */
        err = is(steps[i], "type", "TemplateProcessing") ? read_template(steps[i], out)
                                                         : unsupported("post-processor", steps[i]);
    }
    return err;
}

/* ---- the model ------------------------------------------------------------------------------ */

static enum odsi_err check_model(const json_t *model)
{
    if (!json_is_object(model))
        return odsi_fail(ODSI_ERR_CORRUPT, "tokenizer.json has no model");
    if (!is(model, "type", "BPE"))
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "tokenizer.json: a model of type \"%.60s\" is not supported, only BPE is",
                         text_of(model, "type"));
    if (json_number_value(json_object_get(model, "dropout")) > 0.0)
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "tokenizer.json: dropout makes the ids of a text random");
    if (text_of(model, "continuing_subword_prefix")[0] || text_of(model, "end_of_word_suffix")[0])
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "tokenizer.json: a continuing_subword_prefix or end_of_word_suffix is not "
                         "supported");
    return ODSI_OK;
}

enum odsi_err hf_pipeline_read(const json_t *root, struct tokenizer_head *head,
                               struct hf_pipeline_ends *ends)
{
    const json_t *model = json_object_get(root, "model");
    struct steps steps = {.prefix = TOKENIZER_PREFIX_NEVER};
    *ends = (struct hf_pipeline_ends){.first = NULL};
    enum odsi_err err = check_model(model);
    if (err == ODSI_OK)
        err = read_normalizer(root, &steps);
    if (err == ODSI_OK)
        err = read_pre_tokenizer(root, &steps);
    if (err == ODSI_OK)
        err = read_post_processor(root, ends);
    if (err != ODSI_OK)
        return err;
    head->ignore_merges = 0;
    head->pre = TOKENIZER_PRE_NONE;
    head->add_space_prefix = TOKENIZER_PREFIX_NEVER;
    if (steps.has_bytes && !steps.marks_spaces && steps.prefix == TOKENIZER_PREFIX_NEVER) {
        head->kind = TOKENIZER_BYTE_BPE;
        head->pre = steps.pre;
        head->ignore_merges = (uint8_t)flag_of(model, "ignore_merges", 0);
        return ODSI_OK;
    }
    if (!steps.marks_spaces || steps.has_bytes || steps.pre != TOKENIZER_PRE_NONE ||
        steps.cuts_digits || flag_of(model, "ignore_merges", 0))
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "tokenizer.json: its normalizer and pre_tokenizer together are neither "
                         "byte-level BPE nor SentencePiece BPE as this build knows them");
    head->kind = TOKENIZER_SPM_MERGES;
    head->add_space_prefix = (uint8_t)steps.prefix;
    return ODSI_OK;
}
