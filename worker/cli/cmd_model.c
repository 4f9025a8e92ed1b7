#include "worker/cli/cmd.h"

#include "common/base/args.h"
#include "common/base/buf.h"
#include "kernels/quant.h"
#include "worker/cli/cli_input.h"
#include "worker/cli/cli_json.h"
#include "worker/cli/cli_progress.h"
#include "worker/cli/cli_text.h"
#include "worker/model/gguf.h"
#include "worker/model/model.h"
#include "worker/model/synth.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static const char command_name[] = "model";

struct options {
    const char *shape;
    const char *type;
    uint64_t seed;
    int is_json;
    int with_metadata;
    int with_tensors;
    int is_pure;
};

static void show_progress(void *context, uint64_t done, uint64_t total)
{
    cli_progress_bytes(context, "model", done, total);
}

/* ---- inspect --------------------------------------------------------------------------------- */

static const char *type_name(uint32_t type)
{
    const char *name = quant_name(type);
    return name ? name : gguf_type_name(type);
}

static void print_summary(const struct model *model)
{
    const struct model_params *p = model_params_view(model);
    char id[DIGEST_HEX_SIZE], size[CLI_TEXT_SIZE];
    digest_to_hex(id, model_id_view(model));
    cli_text_bytes(size, p->weight_size);
    printf("name        ");
    cli_text_show(stdout, 1, p->name, strlen(p->name));
    printf("\nmodel id    %s\nnumerics    %u\n", id, NUMERICS_VERSION);
    printf("layers      %" PRIu32 "\ndim         %" PRIu32 "\nheads       %" PRIu32 " of %" PRIu32
           ", %" PRIu32 " for keys and values\n",
           p->layer_count, p->dim, p->head_count, p->head_dim, p->kv_head_count);
    printf("ffn         %" PRIu32 "\nvocabulary  %" PRIu32 "\ncontext     %" PRIu32 "\n",
           p->ffn_dim, p->vocab_size, p->context_length);
    printf("rms eps     %g\nrope base   %g\nweights     %s\n", (double)p->rms_eps,
           (double)p->rope_base, size);
}

static void print_key(void *context, struct gguf_text key, const char *value)
{
    (void)context;
    printf("  ");
    cli_text_show(stdout, 1, key.data, key.size);
    printf(" = ");
    cli_text_show(stdout, 1, value, strlen(value));
    putchar('\n');
}

static void print_tensors(const struct gguf *file)
{
    for (uint64_t i = 0; i < gguf_tensor_count(file); i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(file, i);
        char size[CLI_TEXT_SIZE];
        cli_text_bytes(size, tensor->size);
        printf("  ");
        cli_text_show(stdout, 1, tensor->name.data, tensor->name.size);
        printf("  %s  [", type_name(tensor->ggml_type));
        for (uint32_t d = tensor->dim_count; d-- > 0;)
            printf("%" PRIu64 "%s", tensor->dims[d], d ? "][" : "]  ");
        printf("%s\n", size);
    }
}

static enum odsi_err print_text(const struct model *model, const struct gguf *file,
                                const struct options *options)
{
    print_summary(model);
    if (options->with_metadata) {
        printf("\nmetadata\n");
        gguf_visit_metadata(file, print_key, NULL);
    }
    if (options->with_tensors) {
        printf("\ntensors ([rows][cols])\n");
        print_tensors(file);
    }
    return fflush(stdout) == 0 ? ODSI_OK : odsi_fail(ODSI_ERR_IO, "writing the output failed");
}

static json_t *tensors_json(const struct gguf *file)
{
    json_t *list = json_array();
    int bad = 0;
    for (uint64_t i = 0; i < gguf_tensor_count(file); i++) {
        const struct gguf_tensor *tensor = gguf_tensor_at(file, i);
        json_t *shape = json_array();
        for (uint32_t d = tensor->dim_count; d-- > 0;)
            bad |= json_array_append_new(shape, cli_json_u64(tensor->dims[d]));
        bad |= json_array_append_new(list,
                                     json_pack("{s:o, s:s, s:o, s:o}", "name",
                                               cli_json_text(tensor->name.data, tensor->name.size),
                                               "type", type_name(tensor->ggml_type), "shape", shape,
                                               "size", cli_json_u64(tensor->size)));
    }
    if (!bad)
        return list;
    json_decref(list);
    return NULL;
}

static enum odsi_err print_json(const struct model *model, const struct gguf *file,
                                const struct options *options)
{
    const struct model_params *p = model_params_view(model);
    json_t *object = json_pack(
        "{s:o, s:o, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:o, s:o, s:o, s:o}", "name",
        cli_json_text(p->name, strlen(p->name)), "model_id", cli_json_digest(model_id_view(model)),
        "numerics", (json_int_t)NUMERICS_VERSION, "layers", (json_int_t)p->layer_count, "dim",
        (json_int_t)p->dim, "heads", (json_int_t)p->head_count, "kv_heads",
        (json_int_t)p->kv_head_count, "head_dim", (json_int_t)p->head_dim, "ffn",
        (json_int_t)p->ffn_dim, "vocabulary", (json_int_t)p->vocab_size, "context",
        cli_json_u64(p->context_length), "rms_eps", cli_json_f64((double)p->rms_eps), "rope_base",
        cli_json_f64((double)p->rope_base), "weight_size", cli_json_u64(p->weight_size));
    if (object && options->with_tensors &&
        json_object_set_new(object, "tensors", tensors_json(file)) != 0) {
        json_decref(object);
        object = NULL;
    }
    return cli_json_print(object, stdout);
}

static enum odsi_err inspect(const char *path, const struct options *options)
{
    char cache[CLI_INPUT_PATH_SIZE];
    struct cli_progress progress;
    struct model *model = NULL;
    struct gguf *file = NULL;
    cli_progress_init(&progress, stderr);
    enum odsi_err err = model_open(&model, path, cli_input_cache(cache), show_progress, &progress);
    cli_progress_clear(&progress);
    if (err == ODSI_OK)
        err = gguf_open(&file, path);
    if (err == ODSI_OK)
        err =
            options->is_json ? print_json(model, file, options) : print_text(model, file, options);
    gguf_close(&file);
    model_close(&model);
    return err;
}

/* ---- synth ----------------------------------------------------------------------------------- */

/* The mix that --type and --pure name. Returns 0 after saying what is wrong. */
static int read_mix(const struct options *options, struct quant_mix *out)
{
    const struct quant_mix *mix = quant_mix_find(options->type);
    if (mix) {
        *out = options->is_pure ? quant_mix_pure(mix->type) : *mix;
        return 1;
    }
    struct buf names;
    buf_init(&names, 4096);
    for (mix = quant_mix_table(); mix->name; mix++)
        buf_printf(&names, "%s%s", names.size ? ", " : "", mix->name);
    (void)cli_input_usage(command_name, "--type must be one of %s", buf_text_view(&names));
    buf_free(&names);
    return 0;
}

static int synth(const char *path, const struct options *options)
{
    struct cli_progress progress;
    struct quant_mix mix;
    const struct synth_shape *shape = options->shape ? synth_shape_find(options->shape) : NULL;
    if (!shape) {
        struct buf names;
        buf_init(&names, 4096);
        for (const struct synth_shape *at = synth_shapes(); at->name; at++)
            buf_printf(&names, "%s%s", names.size ? ", " : "", at->name);
        const int code =
            cli_input_usage(command_name, "--shape must be one of %s", buf_text_view(&names));
        buf_free(&names);
        return code;
    }
    if (!read_mix(options, &mix))
        return CMD_USAGE;
    cli_progress_init(&progress, stderr);
    const enum odsi_err err =
        synth_write_mix(path, shape, &mix, options->seed, show_progress, &progress);
    cli_progress_clear(&progress);
    return err == ODSI_OK ? CMD_OK : cli_input_failed(command_name, err);
}

/* ---- the command ----------------------------------------------------------------------------- */

static int run(const char *verb, const char *path, const struct options *options)
{
    if (strcmp(verb, "synth") == 0)
        return synth(path, options);
    const enum odsi_err err = inspect(path, options);
    return err == ODSI_OK ? CMD_OK : cli_input_failed(command_name, err);
}

int cmd_model_run(int argc, char **argv)
{
    struct options options = {.type = "q8_0", .seed = 1};
    const struct args_option table[] = {
        {"metadata", 0, ARGS_FLAG, &options.with_metadata, NULL, "inspect: every key and value", 0},
        {"tensors", 0, ARGS_FLAG, &options.with_tensors, NULL, "inspect: every tensor", 0},
        {"json", 0, ARGS_FLAG, &options.is_json, NULL, "inspect: one object", 0},
        {"shape", 0, ARGS_TEXT, &options.shape, "S", "synth: such as llama-1.1b", 0},
        {"type", 0, ARGS_TEXT, &options.type, "T", "synth: such as q4_k_m or f16 (q8_0)", 0},
        {"pure", 0, ARGS_FLAG, &options.is_pure, NULL, "synth: every matrix of that type", 0},
        {"seed", 0, ARGS_U64, &options.seed, "N", "synth: same seed, same bytes (1)", 0},
        {NULL},
    };
    const struct args_program program = {
        .name = "odsi model",
        .summary = "Inspects a model file, or writes one with random weights for benchmarks.",
        .usage = "inspect FILE | synth FILE [options]",
        .examples = "  odsi model inspect odsi-tiny-q8_0.gguf --tensors\n"
                    "  odsi model synth big.gguf --shape llama-1.1b --type q8_0 --seed 7\n",
        .options = table,
    };
    struct args *args = NULL;
    const char *words[2] = {NULL, NULL}; /* verb and file, before or behind the options */
    int rest = 0, word_count = 0, code = CMD_USAGE;
    while (word_count < 2 && argc > 1 && argv[1][0] != '-') {
        words[word_count++] = argv[1];
        argc--;
        argv++;
    }
    const enum args_outcome outcome = args_read(&args, &program, argc, argv, &rest);
    while (outcome == ARGS_RUN && word_count < 2 && rest < argc)
        words[word_count++] = argv[rest++];
    if (outcome == ARGS_EXIT_OK)
        code = CMD_OK;
    else if (outcome == ARGS_RUN && rest < argc)
        code = cli_input_usage(command_name, "'%s' is not an option", argv[rest]);
    else if (outcome == ARGS_RUN &&
             (!words[0] || (strcmp(words[0], "inspect") != 0 && strcmp(words[0], "synth") != 0)))
        code = cli_input_usage(command_name, "use inspect FILE or synth FILE");
    else if (outcome == ARGS_RUN && !words[1])
        code = cli_input_usage(command_name, "%s which file?", words[0]);
    else if (outcome == ARGS_RUN)
        code = run(words[0], words[1], &options);
    args_close(&args);
    return code;
}
