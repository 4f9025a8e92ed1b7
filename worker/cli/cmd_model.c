#include "worker/cli/cmd.h"

#include "common/base/args.h"
#include "common/base/buf.h"
#include "kernels/cpu/pool.h"
#include "worker/cli/cli_input.h"
#include "worker/cli/cli_inspect.h"
#include "worker/cli/cli_json.h"
#include "worker/cli/cli_progress.h"
#include "worker/cli/cli_text.h"
#include "worker/model/quantize.h"
#include "worker/model/synth.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static const char command_name[] = "model";

#define WORDS_MAX 3

struct options {
    const char *shape;
    const char *type;
    uint64_t seed;
    uint32_t threads;
    int is_json;
    int with_metadata;
    int with_tensors;
    int is_pure;
    int may_requantize;
};

static void show_progress(void *context, uint64_t done, uint64_t total)
{
    cli_progress_bytes(context, "model", done, total);
}

/* ---- inspect --------------------------------------------------------------------------------- */

static int inspect(const char *const *files, const struct options *options)
{
    char cache[CLI_INPUT_PATH_SIZE];
    struct cli_progress progress;
    struct model *model = NULL;
    struct source *source = NULL;
    cli_progress_init(&progress, stderr);
    enum odsi_err err =
        model_open(&model, files[0], cli_input_cache(cache), show_progress, &progress);
    cli_progress_clear(&progress);
    if (err == ODSI_OK)
        err = source_open(&source, files[0]);
    const struct cli_inspect parts = {.model = model,
                                      .source = source,
                                      .with_metadata = options->with_metadata,
                                      .with_tensors = options->with_tensors};
    if (err == ODSI_OK)
        err =
            options->is_json ? cli_inspect_json(&parts, stdout) : cli_inspect_text(&parts, stdout);
    source_close(&source);
    model_close(&model);
    return err == ODSI_OK ? CMD_OK : cli_input_failed(command_name, err);
}

/* ---- synth and quantize ---------------------------------------------------------------------- */

/* The mix that --type and --pure name. Returns 0 after saying what is wrong. */
static int read_mix(const struct options *options, struct quant_mix *out)
{
    const struct quant_mix *mix = options->type ? quant_mix_find(options->type) : NULL;
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

static int synth(const char *const *files, const struct options *options)
{
    struct cli_progress progress;
    struct quant_mix mix;
    struct options with_type = *options;
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
    if (!with_type.type)
        with_type.type = "q8_0";
    if (!read_mix(&with_type, &mix))
        return CMD_USAGE;
    cli_progress_init(&progress, stderr);
    const enum odsi_err err =
        synth_write_mix(files[0], shape, &mix, options->seed, show_progress, &progress);
    cli_progress_clear(&progress);
    return err == ODSI_OK ? CMD_OK : cli_input_failed(command_name, err);
}

static enum odsi_err print_result(const struct quantize_result *result,
                                  const struct options *options)
{
    char before[CLI_TEXT_SIZE], after[CLI_TEXT_SIZE];
    const double bits = 8.0 * (double)result->size_after / (double)result->weight_count;
    if (options->is_json)
        return cli_json_print(
            json_pack("{s:I, s:o, s:o, s:o, s:o}", "tensors", (json_int_t)result->tensor_count,
                      "weights", cli_json_u64(result->weight_count), "size_before",
                      cli_json_u64(result->size_before), "size_after",
                      cli_json_u64(result->size_after), "bits_per_weight", cli_json_f64(bits)),
            stdout);
    cli_text_bytes(before, result->size_before);
    cli_text_bytes(after, result->size_after);
    printf("%" PRIu32 " tensors: %s became %s, %.2f bits per weight\n", result->tensor_count,
           before, after, bits);
    return fflush(stdout) == 0 ? ODSI_OK : odsi_fail(ODSI_ERR_IO, "writing the output failed");
}

static int quantize(const char *const *files, const struct options *options)
{
    struct cli_progress progress;
    struct quant_mix mix;
    struct quantize_result result;
    if (!read_mix(options, &mix))
        return CMD_USAGE;
    if (options->threads > POOL_THREADS_MAX)
        return cli_input_usage(command_name, "--threads must be within 1 to %u", POOL_THREADS_MAX);
    cli_progress_init(&progress, stderr);
    const struct quantize_config config = {.mix = &mix,
                                           .thread_count = options->threads ? options->threads
                                                                            : pool_cpu_count(),
                                           .may_requantize = options->may_requantize,
                                           .progress = show_progress,
                                           .context = &progress};
    enum odsi_err err = quantize_run(files[0], files[1], &config, &result);
    cli_progress_clear(&progress);
    if (err == ODSI_OK)
        err = print_result(&result, options);
    return err == ODSI_OK ? CMD_OK : cli_input_failed(command_name, err);
}

/* ---- the command ----------------------------------------------------------------------------- */

static const struct verb {
    const char *name;
    int file_count;
    const char *files; /* for people */
    int (*run)(const char *const *files, const struct options *options);
} verbs[] = {
    {"inspect", 1, "FILE", inspect},
    {"synth", 1, "FILE", synth},
    {"quantize", 2, "IN OUT", quantize},
};

/* words: the verb and its files, as far as they were given. */
static int run(const char *const words[WORDS_MAX], const char *left_over,
               const struct options *options)
{
    for (size_t i = 0; words[0] && i < sizeof verbs / sizeof verbs[0]; i++) {
        if (strcmp(words[0], verbs[i].name) != 0)
            continue;
        if (!words[verbs[i].file_count])
            return cli_input_usage(command_name, "which file? use %s %s", verbs[i].name,
                                   verbs[i].files);
        for (int w = verbs[i].file_count + 1; !left_over && w < WORDS_MAX; w++)
            left_over = words[w];
        if (left_over)
            return cli_input_usage(command_name, "'%s' is not an option", left_over);
        return verbs[i].run(words + 1, options);
    }
    return cli_input_usage(command_name, "use inspect FILE, synth FILE or quantize IN OUT");
}

int cmd_model_run(int argc, char **argv)
{
    struct options options = {.seed = 1};
    const struct args_option table[] = {
        {"metadata", 0, ARGS_FLAG, &options.with_metadata, NULL, "inspect: every key and value", 0},
        {"tensors", 0, ARGS_FLAG, &options.with_tensors, NULL, "inspect: every tensor", 0},
        {"json", 0, ARGS_FLAG, &options.is_json, NULL, "inspect, quantize: one object", 0},
        {"shape", 0, ARGS_TEXT, &options.shape, "S", "synth: such as llama-1.1b", 0},
        {"type", 0, ARGS_TEXT, &options.type, "T", "such as q4_k_m or f16 (synth: q8_0)", 0},
        {"pure", 0, ARGS_FLAG, &options.is_pure, NULL, "every matrix of the mix's main type", 0},
        {"seed", 0, ARGS_U64, &options.seed, "N", "synth: same seed, same bytes (1)", 0},
        {"threads", 0, ARGS_U32, &options.threads, "N", "quantize: (0: all CPUs)", 0},
        {"allow-requantize", 0, ARGS_FLAG, &options.may_requantize, NULL,
         "quantize: also weights that are quantized", 0},
        {NULL},
    };
    const struct args_program program = {
        .name = "odsi model",
        .summary = "Inspects a model, writes one with smaller weights, or one with random weights.",
        .usage = "inspect FILE | quantize IN OUT --type T | synth FILE --shape S [options]",
        .examples = "  odsi model inspect odsi-tiny-q8_0.gguf --tensors\n"
                    "  odsi model quantize model-f16.gguf model-q4_k_m.gguf --type q4_k_m\n"
                    "  odsi model synth big.gguf --shape llama-1.1b --type q8_0 --seed 7\n",
        .options = table,
    };
    struct args *args = NULL;
    const char *words[WORDS_MAX + 1] = {NULL}; /* before or behind the options */
    int rest = 0, word_count = 0, code = CMD_USAGE;
    while (word_count < WORDS_MAX && argc > 1 && argv[1][0] != '-') {
        words[word_count++] = argv[1];
        argc--;
        argv++;
    }
    const enum args_outcome outcome = args_read(&args, &program, argc, argv, &rest);
    while (outcome == ARGS_RUN && word_count < WORDS_MAX && rest < argc)
        words[word_count++] = argv[rest++];
    if (outcome == ARGS_EXIT_OK)
        code = CMD_OK;
    else if (outcome == ARGS_RUN)
        code = run(words, rest < argc ? argv[rest] : NULL, &options);
    args_close(&args);
    return code;
}
