#include "worker/cli/cli_inspect.h"

#include "common/base/bytes.h"
#include "kernels/quant.h"
#include "worker/cli/cli_json.h"
#include "worker/cli/cli_text.h"
#include "worker/model/arch.h"
#include "worker/model/chat_template.h"
#include "worker/model/gguf.h"
#include "worker/model/tokenizer.h"

#include <inttypes.h>
#include <string.h>

#define TYPES_MAX 64u /* numbers of tensor types */

/* What is counted over all tensors. */
struct totals {
    struct {
        uint32_t count;
        uint64_t size;
    } types[TYPES_MAX];
    uint64_t weight_count;
    uint64_t size;
};

static struct totals totals_of(const struct source *source)
{
    struct totals out = {0};
    for (uint32_t i = 0; i < source->tensor_count; i++) {
        const struct source_tensor *tensor = &source->tensors[i];
        out.types[(uint32_t)tensor->type % TYPES_MAX].count++;
        out.types[(uint32_t)tensor->type % TYPES_MAX].size += tensor->size;
        out.weight_count += tensor->dims[0] * tensor->dims[1] * tensor->dims[2];
        out.size += tensor->size;
    }
    return out;
}

static double bits_per_weight(const struct totals *totals)
{
    return totals->weight_count == 0 ? 0.0
                                     : 8.0 * (double)totals->size / (double)totals->weight_count;
}

/* Keys and values of all layers, in binary16. */
static uint64_t kv_size_of_token(const struct model_params *params)
{
    return UINT64_C(4) * params->layer_count * params->kv_head_count * params->head_dim;
}

static uint32_t windowed_count(const struct model_params *params)
{
    uint32_t count = 0;
    for (uint32_t layer = 0; layer < params->layer_count; layer++)
        count += model_layer_is_windowed(params, layer) != 0;
    return count;
}

/* ---- the tokenizer --------------------------------------------------------------------------- */

struct words {
    const char *kind;
    const char *pre;  /* NULL: the kind has none */
    const char *chat; /* NULL: no template, or none that this build knows */
    int has_template;
    char chat_name[64];
};

static const char *kind_name(uint32_t kind)
{
    static const char *const names[] = {[TOKENIZER_SPM] = "SentencePiece",
                                        [TOKENIZER_BYTE_BPE] = "byte-level BPE",
                                        [TOKENIZER_SPM_MERGES] = "SentencePiece with merges"};
    return kind > 0 && kind < sizeof names / sizeof names[0] ? names[kind] : "unknown";
}

static const char *pre_name(uint32_t pre)
{
    static const char *const names[] = {
        [TOKENIZER_PRE_DEFAULT] = "default",  [TOKENIZER_PRE_GPT2] = "gpt-2",
        [TOKENIZER_PRE_LLAMA3] = "llama-bpe", [TOKENIZER_PRE_QWEN2] = "qwen2",
        [TOKENIZER_PRE_SMOLLM] = "smollm",    [TOKENIZER_PRE_TEKKEN] = "tekken"};
    return pre < sizeof names / sizeof names[0] ? names[pre] : "unknown";
}

/* Both numbers stand at the beginning of the canonical bytes (worker/model/tokenizer.h). */
static enum odsi_err words_of(struct words *out, const struct model *model)
{
    struct tokenizer *tokenizer = NULL;
    struct chat_template *chat = NULL;
    const uint8_t *data;
    size_t size;
    *out = (struct words){0};
    model_tokenizer_view(model, &data, &size);
    enum odsi_err err = tokenizer_open(&tokenizer, data, size);
    if (err != ODSI_OK)
        return err;
    out->kind = kind_name(bytes_load_u32(data + 8));
    out->pre = pre_name(bytes_load_u32(data + 12));
    size_t text_size;
    const char *text = tokenizer_template_view(tokenizer, &text_size);
    out->has_template = text_size > 0;
    if (text_size > 0)
        err = chat_template_open(&chat, text, text_size);
    if (chat) {
        snprintf(out->chat_name, sizeof out->chat_name, "%s", chat_template_name(chat));
        out->chat = out->chat_name;
    }
    chat_template_close(&chat);
    tokenizer_close(&tokenizer);
    return err == ODSI_ERR_UNSUPPORTED ? ODSI_OK
                                       : err; /* a template that nobody knows is no harm */
}

/* ---- text ------------------------------------------------------------------------------------ */

static void print_shape(const struct model_params *p, FILE *to)
{
    fprintf(to,
            "layers      %" PRIu32 "\ndim         %" PRIu32 "\nheads       %" PRIu32 " of %" PRIu32
            ", %" PRIu32 " for keys and values\n",
            p->layer_count, p->dim, p->head_count, p->head_dim, p->kv_head_count);
    fprintf(to, "ffn         %" PRIu32 " (%s)\n", p->ffn_dim,
            p->act == ACT_GELU_TANH ? "gelu" : "silu");
    if (p->expert_count > 0)
        fprintf(to, "experts     %" PRIu32 " of each token, of %" PRIu32 "\n", p->expert_used_count,
                p->expert_count);
    fprintf(to, "vocabulary  %" PRIu32 "\ncontext     %" PRIu32 "\n", p->vocab_size,
            p->context_length);
    if (p->window > 0)
        fprintf(to, "window      %" PRIu32 " positions, in %" PRIu32 " layers\n", p->window,
                windowed_count(p));
    fprintf(to, "rms eps     %g\n", (double)p->rms_eps);
}

static void print_rope(const struct model_params *p, FILE *to)
{
    fprintf(to, "rope base   %g", (double)p->rope_base);
    if (p->window > 0 && p->rope_base_windowed != p->rope_base)
        fprintf(to, ", with a window %g", (double)p->rope_base_windowed);
    if (p->rope_dim != p->head_dim)
        fprintf(to, ", %" PRIu32 " of %" PRIu32 " dims", p->rope_dim, p->head_dim);
    if (p->rope_linear != 1.0f)
        fprintf(to, ", stretched by %g", (double)p->rope_linear);
    if (p->features & MODEL_ROPE_FACTORS)
        fprintf(to, ", with factors");
    if (p->rope_amplitude != 1.0f)
        fprintf(to, ", amplitude %g", (double)p->rope_amplitude);
    fputc('\n', to);
    if (p->attention_softcap > 0.0f || p->logit_softcap > 0.0f)
        fprintf(to, "soft caps   attention %g, logits %g\n", (double)p->attention_softcap,
                (double)p->logit_softcap);
}

static void print_weights(const struct totals *totals, const struct model_params *p, FILE *to)
{
    char size[CLI_TEXT_SIZE];
    cli_text_bytes(size, totals->size);
    fprintf(to, "weights     %s, %.2f bits each\n", size, bits_per_weight(totals));
    for (uint32_t type = 0; type < TYPES_MAX; type++) {
        if (totals->types[type].count == 0)
            continue;
        cli_text_bytes(size, totals->types[type].size);
        fprintf(to, "  %-9s %" PRIu32 " tensors, %s\n", quant_name(type), totals->types[type].count,
                size);
    }
    cli_text_bytes(size, kv_size_of_token(p));
    fprintf(to, "kv cache    %s for a token\n", size);
}

static void print_words(const struct words *words, FILE *to)
{
    fprintf(to, "tokenizer   %s", words->kind);
    if (words->pre)
        fprintf(to, " (%s)", words->pre);
    fprintf(to, "\nchat        %s\n",
            words->chat           ? words->chat
            : words->has_template ? "a template that this build does not know"
                                  : "no template");
}

static void print_summary(const struct cli_inspect *self, const struct words *words, FILE *to)
{
    const struct model_params *p = model_params_view(self->model);
    const struct totals totals = totals_of(self->source);
    char id[DIGEST_HEX_SIZE];
    digest_to_hex(id, model_id_view(self->model));
    fprintf(to, "name        ");
    cli_text_show(to, 1, p->name, strlen(p->name));
    fprintf(to, "\nmodel id    %s\nnumerics    %u\nfamily      %s\n", id, NUMERICS_VERSION,
            arch_name(p));
    print_shape(p, to);
    print_rope(p, to);
    print_words(words, to);
    print_weights(&totals, p, to);
    if (self->source->file_count > 1)
        fprintf(to, "files       %" PRIu32 "\n", self->source->file_count);
}

static void print_key(void *context, struct gguf_text key, const char *value)
{
    FILE *to = context;
    fprintf(to, "  ");
    cli_text_show(to, 1, key.data, key.size);
    fprintf(to, " = ");
    cli_text_show(to, 1, value, strlen(value));
    fputc('\n', to);
}

/* A folder's first file has no keys, a GGUF model's has all of them. */
static enum odsi_err print_metadata(const struct source *source, FILE *to)
{
    struct gguf *file = NULL;
    if (source->file_count == 0)
        return odsi_fail(ODSI_ERR_UNSUPPORTED, "the model has no GGUF file, so it has no metadata");
    const enum odsi_err err = gguf_open(&file, source->files[0].path);
    if (err != ODSI_OK)
        return odsi_fail(ODSI_ERR_UNSUPPORTED, "only GGUF files have metadata to show");
    fprintf(to, "\nmetadata\n");
    gguf_visit_metadata(file, print_key, to);
    gguf_close(&file);
    return ODSI_OK;
}

static void print_tensors(const struct source *source, FILE *to)
{
    fprintf(to, "\ntensors ([rows][cols])\n");
    for (uint32_t i = 0; i < source->tensor_count; i++) {
        const struct source_tensor *tensor = &source->tensors[i];
        char size[CLI_TEXT_SIZE];
        cli_text_bytes(size, tensor->size);
        fprintf(to, "  %s  %s  [", tensor->name, quant_name((uint32_t)tensor->type));
        for (uint32_t d = tensor->dim_count; d-- > 0;)
            fprintf(to, "%" PRIu64 "%s", tensor->dims[d], d ? "][" : "]  ");
        fprintf(to, "%s\n", size);
    }
}

enum odsi_err cli_inspect_text(const struct cli_inspect *self, FILE *to)
{
    struct words words;
    enum odsi_err err = words_of(&words, self->model);
    if (err != ODSI_OK)
        return err;
    print_summary(self, &words, to);
    if (self->with_metadata)
        err = print_metadata(self->source, to);
    if (err == ODSI_OK && self->with_tensors)
        print_tensors(self->source, to);
    if (fflush(to) != 0 && err == ODSI_OK)
        err = odsi_fail(ODSI_ERR_IO, "writing the output failed");
    return err;
}

/* ---- JSON ------------------------------------------------------------------------------------ */

static json_t *types_json(const struct totals *totals)
{
    json_t *list = json_array();
    int bad = 0;
    for (uint32_t type = 0; type < TYPES_MAX; type++)
        if (totals->types[type].count > 0)
            bad |= json_array_append_new(list,
                                         json_pack("{s:s, s:I, s:o}", "type", quant_name(type),
                                                   "tensors", (json_int_t)totals->types[type].count,
                                                   "size", cli_json_u64(totals->types[type].size)));
    if (!bad)
        return list;
    json_decref(list);
    return NULL;
}

static json_t *tensors_json(const struct source *source)
{
    json_t *list = json_array();
    int bad = 0;
    for (uint32_t i = 0; i < source->tensor_count; i++) {
        const struct source_tensor *tensor = &source->tensors[i];
        json_t *shape = json_array();
        for (uint32_t d = tensor->dim_count; d-- > 0;)
            bad |= json_array_append_new(shape, cli_json_u64(tensor->dims[d]));
        bad |= json_array_append_new(list,
                                     json_pack("{s:s, s:s, s:o, s:o}", "name", tensor->name, "type",
                                               quant_name((uint32_t)tensor->type), "shape", shape,
                                               "size", cli_json_u64(tensor->size)));
    }
    if (!bad)
        return list;
    json_decref(list);
    return NULL;
}

static json_t *shape_json(const struct model_params *p)
{
    return json_pack(
        "{s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:o, s:o, s:o}",
        "family", arch_name(p), "layers", (json_int_t)p->layer_count, "dim", (json_int_t)p->dim,
        "heads", (json_int_t)p->head_count, "kv_heads", (json_int_t)p->kv_head_count, "head_dim",
        (json_int_t)p->head_dim, "ffn", (json_int_t)p->ffn_dim, "activation",
        p->act == ACT_GELU_TANH ? "gelu" : "silu", "experts", (json_int_t)p->expert_count,
        "experts_used", (json_int_t)p->expert_used_count, "vocabulary", (json_int_t)p->vocab_size,
        "context", (json_int_t)p->context_length, "window", (json_int_t)p->window,
        "windowed_layers", (json_int_t)windowed_count(p), "rms_eps",
        cli_json_f64((double)p->rms_eps), "attention_softcap",
        cli_json_f64((double)p->attention_softcap), "logit_softcap",
        cli_json_f64((double)p->logit_softcap));
}

static json_t *rope_json(const struct model_params *p)
{
    return json_pack("{s:o, s:o, s:I, s:o, s:o, s:b}", "base", cli_json_f64((double)p->rope_base),
                     "base_windowed", cli_json_f64((double)p->rope_base_windowed), "dim",
                     (json_int_t)p->rope_dim, "linear", cli_json_f64((double)p->rope_linear),
                     "amplitude", cli_json_f64((double)p->rope_amplitude), "factors",
                     (p->features & MODEL_ROPE_FACTORS) != 0);
}

static json_t *words_json(const struct words *words)
{
    return json_pack("{s:s, s:s?, s:b, s:s?}", "kind", words->kind, "pre", words->pre,
                     "chat_template", words->has_template, "chat_layout", words->chat);
}

enum odsi_err cli_inspect_json(const struct cli_inspect *self, FILE *to)
{
    const struct model_params *p = model_params_view(self->model);
    const struct totals totals = totals_of(self->source);
    struct words words;
    const enum odsi_err err = words_of(&words, self->model);
    if (err != ODSI_OK)
        return err;
    json_t *object = shape_json(p);
    json_t *more = json_pack(
        "{s:o, s:o, s:I, s:o, s:o, s:o, s:o, s:o, s:o, s:I}", "name",
        cli_json_text(p->name, strlen(p->name)), "model_id",
        cli_json_digest(model_id_view(self->model)), "numerics", (json_int_t)NUMERICS_VERSION,
        "rope_base", cli_json_f64((double)p->rope_base), "rope", rope_json(p), "tokenizer",
        words_json(&words), "types", types_json(&totals), "weight_size", cli_json_u64(totals.size),
        "bits_per_weight", cli_json_f64(bits_per_weight(&totals)), "kv_size_per_token",
        (json_int_t)kv_size_of_token(p));
    int bad = !object || !more || json_object_update(object, more) != 0;
    json_decref(more);
    if (!bad)
        bad = json_object_set_new(object, "files", cli_json_u64(self->source->file_count)) != 0;
    if (!bad && self->with_tensors)
        bad = json_object_set_new(object, "tensors", tensors_json(self->source)) != 0;
    if (bad) {
        json_decref(object);
        object = NULL;
    }
    return cli_json_print(object, to);
}
