#include "worker/cli/cmd.h"

#include "common/base/alloc.h"
#include "common/base/args.h"
#include "common/base/limits.h"
#include "worker/cli/cli_bench.h"
#include "worker/cli/cli_bench_prefix.h"
#include "worker/cli/cli_client.h"
#include "worker/cli/cli_input.h"
#include "worker/cli/cli_json.h"
#include "worker/cli/cli_memory.h"
#include "worker/cli/cli_text.h"
#include "worker/model/arch.h"
#include "worker/model/source.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define READ_SIZE      (512u << 20) /* beyond the last cache of today's machines */
#define SESSIONS_MAX   LIMIT_SESSIONS_MAX
#define BATCH_MAX      64u /* steps of one batch of the engine */
#define ASK_TIMEOUT_US 10000000u
#define PROMPT_TOKENS  128u
#define OWN_TOKENS     16u /* of a prompt behind a shared prefix */

static const char command_name[] = "bench";

struct options {
    const char *model; /* a file; of a swarm: a name */
    const char *backend;
    uint32_t thread_count;
    uint32_t batch;
    uint32_t prompt_token_count;
    uint32_t gen_token_count;
    const char *gateway;
    int is_insecure;
    const char *identity;
    uint32_t session_count;
    uint32_t shared_prefix; /* tokens; 0: not asked for */
    int is_json;
};

/* ---- the engine ------------------------------------------------------------------------------ */

/* All weights but the embedding table, of which decoding takes single rows, unless the output
 * layer is the same table. */
static enum odsi_err weight_size_read(const char *path, const struct model *model, uint64_t *out)
{
    struct source *source = NULL;
    const enum odsi_err err = source_open(&source, path);
    if (err != ODSI_OK)
        return err;
    const struct source_tensor *table = arch_find(source, "token_embd.weight");
    *out = model_params_view(model)->weight_size;
    if (table && arch_find(source, "output.weight"))
        *out -= table->size;
    source_close(&source);
    return ODSI_OK;
}

static enum odsi_err print_engine(const struct options *options, const struct cli_engine *engine,
                                  const struct cli_bench *bench, double copy_gbps)
{
    const char *name = model_params_view(engine->model)->name;
    const char *isa = cli_engine_backend_view(engine);
    const char *backend = strcmp(isa, "cuda") == 0 ? "cuda" : "cpu";
    const uint32_t threads = cli_engine_thread_count(engine);
    if (options->is_json)
        return cli_json_print(
            json_pack(
                "{s:o, s:s, s:s, s:I, s:I, s:I, s:I, s:o, s:o, s:o, s:{s:o, s:o}, s:o, s:o, "
                "s:o, s:o, s:o, s:o}",
                "model", cli_json_text(name, strlen(name)), "backend", backend, "isa", isa,
                "threads", (json_int_t)threads, "batch", (json_int_t)options->batch,
                "prompt_tokens", (json_int_t)options->prompt_token_count, "gen_tokens",
                (json_int_t)options->gen_token_count, "prefill_tps",
                cli_json_f64(bench->prefill_tps), "decode_tps", cli_json_f64(bench->decode_tps),
                "ttft_ms", cli_json_f64(bench->ttft_ms), "per_token_ms", "p50",
                cli_json_f64(bench->per_token_p50_ms), "p99", cli_json_f64(bench->per_token_p99_ms),
                "bytes_per_token", cli_json_u64((uint64_t)bench->bytes_per_token), "read_gbps",
                cli_json_f64(bench->read_gbps), "copy_gbps", cli_json_f64(copy_gbps), "mixed_tps",
                cli_json_f64(bench->mixed_tps), "mixed_token_ms",
                cli_json_f64(bench->mixed_token_ms), "work_size", cli_json_u64(bench->work_size)),
            stdout);
    char size[CLI_TEXT_SIZE];
    cli_text_bytes(size, (uint64_t)bench->bytes_per_token);
    cli_text_show(stdout, 1, name, strlen(name));
    printf(" on %s, %" PRIu32 " threads, batch %" PRIu32 "\n", isa, threads, options->batch);
    printf("prefill    %.1f tokens/s (%" PRIu32 " tokens, first token after %.1f ms)\n",
           bench->prefill_tps, options->prompt_token_count, bench->ttft_ms);
    printf("decode     %.1f tokens/s (%.2f ms per token, p99 %.2f ms)\n", bench->decode_tps,
           bench->per_token_p50_ms, bench->per_token_p99_ms);
    if (options->batch > 1)
        printf(
            "mixed      %.1f positions/s with a prompt in pieces beside it (%.2f ms per token)\n",
            bench->mixed_tps, bench->mixed_token_ms);
    printf("reads      %s per token, %.2f GB/s of the %.2f GB/s that this machine can read\n", size,
           bench->read_gbps, copy_gbps);
    if (bench->work_size > 0) {
        cli_text_bytes(size, bench->work_size);
        printf("memory     %s beside weights and KV cache\n", size);
    }
    return ODSI_OK;
}

static enum odsi_err bench_engine(const struct options *options)
{
    struct cli_engine engine = {0};
    struct cli_bench bench = {0};
    double before_gbps = 0, after_gbps = 0; /* other work on this machine may slow one of them */
    struct cli_bench_config config = {.prompt_token_count = options->prompt_token_count,
                                      .gen_token_count = options->gen_token_count,
                                      .batch = options->batch};
    enum odsi_err err = cli_engine_describe(&engine, options->model);
    if (err == ODSI_OK)
        err = weight_size_read(options->model, engine.model, &config.weight_size);
    if (err == ODSI_OK)
        err = cli_engine_load(&engine, options->backend, options->thread_count, options->batch,
                              options->prompt_token_count + options->gen_token_count);
    if (err == ODSI_OK)
        err = cli_memory_read_gbps(&before_gbps, cli_engine_thread_count(&engine), READ_SIZE);
    if (err == ODSI_OK)
        err = cli_bench_engine(&bench, &engine, &config);
    if (err == ODSI_OK)
        err = cli_memory_read_gbps(&after_gbps, cli_engine_thread_count(&engine), READ_SIZE);
    if (err == ODSI_OK)
        err = print_engine(options, &engine, &bench,
                           after_gbps > before_gbps ? after_gbps : before_gbps);
    cli_engine_close(&engine);
    return err;
}

/* ---- a shared prefix ------------------------------------------------------------------------- */

static enum odsi_err print_prefix(const struct options *options, const struct cli_engine *engine,
                                  const struct cli_bench_prefix *bench)
{
    const char *name = model_params_view(engine->model)->name;
    const char *isa = cli_engine_backend_view(engine);
    const uint32_t threads = cli_engine_thread_count(engine);
    const double speedup = bench->second_ms > 0 ? bench->first_ms / bench->second_ms : 0;
    if (options->is_json)
        return cli_json_print(
            json_pack("{s:o, s:s, s:I, s:I, s:I, s:I, s:o, s:o, s:o}", "model",
                      cli_json_text(name, strlen(name)), "isa", isa, "threads", (json_int_t)threads,
                      "shared_tokens", (json_int_t)options->shared_prefix, "prompt_tokens",
                      (json_int_t)options->prompt_token_count, "reused_tokens",
                      (json_int_t)bench->reused_count, "ttft_first_ms",
                      cli_json_f64(bench->first_ms), "ttft_second_ms",
                      cli_json_f64(bench->second_ms), "speedup", cli_json_f64(speedup)),
            stdout);
    cli_text_show(stdout, 1, name, strlen(name));
    printf(" on %s, %" PRIu32 " threads, prompts of %" PRIu32 " tokens, the first %" PRIu32
           " in common\n",
           isa, threads, options->prompt_token_count, options->shared_prefix);
    printf("first session   first token after %.1f ms\n", bench->first_ms);
    printf("second session  first token after %.1f ms, %" PRIu32 " positions reused: %.1fx\n",
           bench->second_ms, bench->reused_count, speedup);
    return ODSI_OK;
}

static enum odsi_err bench_prefix(const struct options *options)
{
    struct cli_engine engine = {0};
    struct cli_bench_prefix bench = {0};
    const struct cli_bench_prefix_config config = {.shared_token_count = options->shared_prefix,
                                                   .prompt_token_count =
                                                       options->prompt_token_count};
    enum odsi_err err = cli_engine_describe(&engine, options->model);
    if (err == ODSI_OK)
        err = cli_engine_load(&engine, options->backend, options->thread_count,
                              CLI_BENCH_PREFIX_SESSIONS, options->prompt_token_count);
    if (err == ODSI_OK)
        err = cli_bench_prefix_run(&bench, &engine, &config);
    if (err == ODSI_OK)
        err = print_prefix(options, &engine, &bench);
    cli_engine_close(&engine);
    return err;
}

/* ---- a swarm --------------------------------------------------------------------------------- */

static enum odsi_err print_swarm(const struct options *options, const char *model,
                                 const struct cli_bench *bench)
{
    if (options->is_json)
        return cli_json_print(json_pack("{s:o, s:I, s:I, s:I, s:o, s:o, s:o, s:o, s:{s:o, s:o}}",
                                        "model", cli_json_text(model, strlen(model)), "sessions",
                                        (json_int_t)options->session_count, "prompt_tokens",
                                        (json_int_t)options->prompt_token_count, "gen_tokens",
                                        (json_int_t)options->gen_token_count, "prefill_tps",
                                        cli_json_f64(bench->prefill_tps), "decode_tps",
                                        cli_json_f64(bench->decode_tps), "ttft_ms",
                                        cli_json_f64(bench->ttft_ms), "ttft_p99_ms",
                                        cli_json_f64(bench->ttft_p99_ms), "per_token_ms", "p50",
                                        cli_json_f64(bench->per_token_p50_ms), "p99",
                                        cli_json_f64(bench->per_token_p99_ms)),
                              stdout);
    cli_text_show(stdout, 1, model, strlen(model));
    printf(" through %s, %" PRIu32 " sessions\n", options->gateway, options->session_count);
    printf("prefill    %.1f tokens/s in all (%" PRIu32
           " tokens each, first token after %.1f ms, p99 %.1f ms)\n",
           bench->prefill_tps, options->prompt_token_count, bench->ttft_ms, bench->ttft_p99_ms);
    printf("decode     %.1f tokens/s in all (%.2f ms per token, p99 %.2f ms)\n", bench->decode_tps,
           bench->per_token_p50_ms, bench->per_token_p99_ms);
    return ODSI_OK;
}

static enum odsi_err bench_swarm(const struct options *options)
{
    struct cli_client *client = NULL;
    struct cli_bench bench = {0};
    struct cli_model_row *models = NULL;
    uint32_t model_count = 0;
    const struct cli_client_config config = {
        .peer = options->gateway,
        .is_insecure = options->is_insecure,
        .identity_path = options->identity,
        .is_cancelled_by_signal = 1,
    };
    const struct cli_bench_config bench_config = {
        .prompt_token_count = options->prompt_token_count,
        .gen_token_count = options->gen_token_count,
        .batch = options->session_count,
    };
    enum odsi_err err = cli_client_open(&client, &config);
    /* Also takes the connection out of the first answer's time. */
    if (err == ODSI_OK)
        err = cli_client_models(client, ASK_TIMEOUT_US, &models, &model_count);
    if (err == ODSI_OK && model_count == 0)
        err = odsi_fail(ODSI_ERR_NOT_FOUND, "%s serves no model", options->gateway);
    if (err == ODSI_OK)
        err = cli_bench_swarm(&bench, client, options->model, &bench_config);
    if (err == ODSI_OK)
        err = print_swarm(options, options->model ? options->model : models[0].name, &bench);
    alloc_free(models);
    cli_client_close(&client);
    return err;
}

/* ---- the command ----------------------------------------------------------------------------- */

static int check_and_run(struct options *options)
{
    const int is_swarm = !options->model || options->session_count > 0;
    if (options->session_count == 0)
        options->session_count = 1;
    if (options->prompt_token_count == 0)
        options->prompt_token_count =
            options->shared_prefix > 0 ? options->shared_prefix + OWN_TOKENS : PROMPT_TOKENS;
    if (options->gen_token_count == 0 || options->batch == 0)
        return cli_input_usage(command_name, "counts of tokens and sequences begin at 1");
    if (options->prompt_token_count > LIMIT_CONTEXT_MAX ||
        options->gen_token_count > LIMIT_CONTEXT_MAX)
        return cli_input_usage(command_name, "at most %u tokens", LIMIT_CONTEXT_MAX);
    if (options->batch > BATCH_MAX || options->session_count > SESSIONS_MAX)
        return cli_input_usage(command_name, "at most %u sequences in a batch and %u sessions",
                               BATCH_MAX, SESSIONS_MAX);
    if (options->shared_prefix > 0 && is_swarm)
        return cli_input_usage(command_name, "--shared-prefix measures the engine alone: give it "
                                             "--model FILE without --sessions");
    if (options->shared_prefix >= options->prompt_token_count)
        return cli_input_usage(command_name, "--shared-prefix must be below --prompt-tokens");
    const enum odsi_err err = is_swarm                     ? bench_swarm(options)
                              : options->shared_prefix > 0 ? bench_prefix(options)
                                                           : bench_engine(options);
    return err == ODSI_OK ? CMD_OK : cli_input_failed(command_name, err);
}

int cmd_bench_run(int argc, char **argv)
{
    struct options options = {.batch = 1, .gen_token_count = 32, .gateway = CLI_GATEWAY_DEFAULT};
    const struct args_option table[] = {
        {"model", 'm', ARGS_TEXT, &options.model, "FILE",
         "measure the engine alone on this file; with --sessions: a name", 1},
        {"backend", 'b', ARGS_TEXT, &options.backend, "NAME",
         "scalar, avx2, avx512 or cuda (the fastest CPU one)", 0},
        {"threads", 't', ARGS_U32, &options.thread_count, "N", "0 (default): one per CPU", 0},
        {"batch", 0, ARGS_U32, &options.batch, "N", "sequences side by side (1)", 0},
        {"prompt-tokens", 'p', ARGS_U32, &options.prompt_token_count, "N", "(128)", 0},
        {"gen-tokens", 'n', ARGS_U32, &options.gen_token_count, "N", "(32)", 0},
        {"shared-prefix", 0, ARGS_U32, &options.shared_prefix, "N",
         "measure the first token of two prompts that begin with the same N tokens", 0},
        {"sessions", 's', ARGS_U32, &options.session_count, "N",
         "measure a swarm with N answers at once", 0},
        CLI_GATEWAY_OPTIONS(options),
        {"json", 0, ARGS_FLAG, &options.is_json, NULL, "one object", 0},
        {NULL},
    };
    const struct args_program program = {
        .name = "odsi bench",
        .summary = "Measures the engine alone, beside what this machine can read from memory; or "
                   "a swarm\nunder load, through its gateway.",
        .usage = "--model FILE [options] | --sessions N [options]",
        .examples = "  odsi bench --model llama-1.1b.gguf --threads 2 --json\n"
                    "  odsi bench --model F --batch 8 --gen-tokens 64\n"
                    "  odsi bench --model F --shared-prefix 1000\n"
                    "  odsi local --workers 3 --model F -- odsi bench --sessions 8\n",
        .options = table,
    };
    struct args *args = NULL;
    int rest = 0;
    int code = CMD_USAGE;
    const enum args_outcome outcome = args_read(&args, &program, argc, argv, &rest);
    if (outcome == ARGS_EXIT_OK)
        code = CMD_OK;
    else if (outcome == ARGS_RUN && rest < argc)
        code = cli_input_usage(command_name, "'%s' is not an option", argv[rest]);
    else if (outcome == ARGS_RUN)
        code = check_and_run(&options);
    args_close(&args);
    return code;
}
