/* Every family in every weight type: the same bits however the work is done, and right.
 *
 * A trace is the SHA-256 of the residual stream after each layer and of the last logits. One set of
 * hashes must come out over all backends, numbers of threads, chunks, and whether the session is
 * alone in its batches or has seven neighbours; and it is the one that tests/vectors/traces.txt
 * has: version 1 of the numerics, frozen. The logits are compared with a binary64 forward of the
 * same weights (forward64.h).
 *
 * `make exact` runs all combinations (ODSI_EXACT=full) and prints a line for each model; otherwise
 * each family and each type is run with some of them. Run from the root of the tree. */
#include "common/base/alloc.h"
#include "kernels/quant.h"
#include "tests/unit/engine/forward64.h"
#include "worker/engine/startup.h"
#include "worker/model/synth.h"

#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define NEIGHBOURS 7u
#define TRACES     "tests/vectors/traces.txt"
#define TOKENS     80u /* over the edge of a page, and of every window */

static const char *const families[] = {
    "llama-tiny",  "llama3-tiny", "mistral-tiny",   "qwen2-tiny",   "qwen3-tiny",    "gemma2-tiny",
    "gemma3-tiny", "phi3-tiny",   "phi3-long-tiny", "mixtral-tiny", "qwen3moe-tiny",
};
#define FAMILY_COUNT (sizeof families / sizeof *families)

static const enum tensor_type types[] = {
    TENSOR_F32,  TENSOR_F16,  TENSOR_BF16, TENSOR_Q4_0, TENSOR_Q4_1, TENSOR_Q5_0, TENSOR_Q5_1,
    TENSOR_Q8_0, TENSOR_Q2_K, TENSOR_Q3_K, TENSOR_Q4_K, TENSOR_Q5_K, TENSOR_Q6_K,
};
#define TYPE_COUNT (sizeof types / sizeof *types)

static const char *const *backends; /* of this machine, slowest first */

static int is_full(void)
{
    const char *value = getenv("ODSI_EXACT");
    return value && strcmp(value, "full") == 0;
}

/* One way to run the same tokens. */
struct way {
    const char *backend;
    uint32_t threads;
    uint32_t chunk;
    int has_neighbours;
};

struct trace {
    struct digest *layers; /* [layer_count] */
    float *logits;         /* [vocab_size] of the last token */
};

/* ---- running --------------------------------------------------------------------------------- */

struct run {
    struct digest_stream **streams; /* [layer_count] */
    const struct model_params *params;
    uint32_t row_first; /* of the traced session in the running batch */
    uint32_t row_count;
};

static void tap(void *context, uint32_t layer, const float *x, uint32_t rows)
{
    const struct run *self = context;
    const uint32_t dim = self->params->dim;
    cr_assert(self->row_first + self->row_count <= rows);
    digest_stream_add(self->streams[layer], x + (size_t)self->row_first * dim,
                      (size_t)self->row_count * dim * sizeof *x);
}

static uint32_t token_at(uint32_t session, uint32_t position, uint32_t vocab_size)
{
    return (session * 131071u + position * 7919u + position * position + 1u) % vocab_size;
}

/* The steps of one batch: the traced session's chunk, and around it those of its neighbours, of one
 * token, the last of two. */
struct batch {
    struct engine_step steps[NEIGHBOURS + 1];
    uint32_t tokens[NEIGHBOURS + 1][TOKENS];
};

static void run_batch(struct engine *engine, struct run *run, struct batch *batch, uint32_t count)
{
    run->row_first = 0;
    for (uint32_t s = 0; s < count && s < NEIGHBOURS / 2; s++)
        run->row_first += count > 1 ? batch->steps[s].token_count : 0;
    run->row_count = batch->steps[count > 1 ? NEIGHBOURS / 2 : 0].token_count;
    cr_assert_eq(engine_run(engine, batch->steps, count), ODSI_OK, "%s", odsi_err_text());
}

static void fill_step(struct batch *batch, uint32_t index, struct engine_session *session,
                      uint32_t who, uint32_t count, uint32_t vocab_size, float *logits)
{
    const uint32_t from = engine_session_length(session);
    for (uint32_t t = 0; t < count; t++)
        batch->tokens[index][t] = token_at(who, from + t, vocab_size);
    batch->steps[index] = (struct engine_step){
        .session = session, .token_count = count, .tokens = batch->tokens[index], .logits = logits};
}

/* Runs token_count tokens of session 0; with neighbours it is the middle one of the batch. */
static void run_tokens(struct trace *out, struct engine *engine, struct run *run,
                       const struct way *way, uint32_t token_count)
{
    const struct model_params *p = run->params;
    const uint32_t count = way->has_neighbours ? NEIGHBOURS + 1 : 1;
    const uint32_t traced = way->has_neighbours ? NEIGHBOURS / 2 : 0;
    struct engine_session *sessions[NEIGHBOURS + 1] = {0};
    struct batch *batch = NULL;
    cr_assert_eq(alloc_zeroed(&batch, 1, sizeof *batch), ODSI_OK);
    for (uint32_t s = 0; s < count; s++)
        cr_assert_eq(engine_session_open(&sessions[s], engine, 0, p->layer_count,
                                         s == traced ? token_count : 3 * token_count),
                     ODSI_OK, "%s", odsi_err_text());
    for (uint32_t at = 0; at < token_count; at += way->chunk) {
        const uint32_t left = token_count - at;
        for (uint32_t s = 0; s < count; s++) {
            const uint32_t now = s != traced         ? 1 + s / NEIGHBOURS
                                 : left < way->chunk ? left
                                                     : way->chunk;
            fill_step(batch, s, sessions[s], s == traced ? 0 : s + 1, now, p->vocab_size,
                      s == traced && left <= way->chunk ? out->logits : NULL);
        }
        run_batch(engine, run, batch, count);
    }
    for (uint32_t s = 0; s < count; s++)
        engine_session_close(&sessions[s]);
    alloc_free(batch);
}

static void trace_open(struct trace *self, const struct model_params *params)
{
    cr_assert_eq(alloc_zeroed(&self->layers, params->layer_count, sizeof *self->layers), ODSI_OK);
    cr_assert_eq(alloc_zeroed(&self->logits, params->vocab_size, sizeof *self->logits), ODSI_OK);
}

static void trace_close(struct trace *self)
{
    alloc_free(self->layers);
    alloc_free(self->logits);
}

static void trace_run(struct trace *out, struct startup *whole, const struct model *model,
                      const struct way *way, uint32_t token_count)
{
    struct run run = {.params = model_params_view(model)};
    cr_assert_eq(alloc_zeroed(&run.streams, run.params->layer_count, sizeof(void *)), ODSI_OK);
    for (uint32_t i = 0; i < run.params->layer_count; i++)
        cr_assert_eq(digest_stream_open(&run.streams[i]), ODSI_OK);
    engine_set_tap(whole->engine, tap, &run);
    run_tokens(out, whole->engine, &run, way, token_count);
    engine_set_tap(whole->engine, NULL, NULL);
    for (uint32_t i = 0; i < run.params->layer_count; i++) {
        digest_stream_finish(run.streams[i], &out->layers[i]);
        digest_stream_close(&run.streams[i]);
    }
    alloc_free(run.streams);
}

/* ---- one model ------------------------------------------------------------------------------- */

struct subject {
    const char *what; /* for messages */
    struct model *model;
    char path[64];
    uint32_t token_count;
    struct trace first; /* what the first way gave; the others must too */
    int has_first;
    uint32_t ways;
};

static void whole_open(struct startup *out, const struct subject *self, const struct way *way)
{
    const struct startup_config config = {
        .backend = {.name = way->backend, .thread_count = way->threads},
        .layer_end = model_params_view(self->model)->layer_count,
        .kv_size = 64u << 20};
    cr_assert_eq(startup_open(out, self->model, &config), ODSI_OK, "%s", odsi_err_text());
}

static void compare(struct subject *self, struct startup *whole, const struct way *way)
{
    const struct model_params *p = model_params_view(self->model);
    struct trace trace = {0};
    self->ways++;
    if (!self->has_first) {
        self->has_first = 1;
        trace_open(&self->first, p);
        trace_run(&self->first, whole, self->model, way, self->token_count);
        return;
    }
    trace_open(&trace, p);
    trace_run(&trace, whole, self->model, way, self->token_count);
    uint32_t same = 0;
    while (same < p->layer_count && digest_equal(&trace.layers[same], &self->first.layers[same]))
        same++;
    cr_expect(same == p->layer_count &&
                  memcmp(trace.logits, self->first.logits, p->vocab_size * sizeof(float)) == 0,
              "%s: %s, %u threads, chunks of %u, %u neighbours: differs from layer %u on",
              self->what, way->backend, way->threads, way->chunk,
              way->has_neighbours ? NEIGHBOURS : 0, same);
    trace_close(&trace);
}

static void compare_all_ways(struct subject *self)
{
    static const uint32_t chunks[] = {512, 64, 5, 1};
    for (size_t b = 0; backends[b]; b++)
        for (uint32_t threads = 1; threads <= 2; threads++) {
            struct way way = {.backend = backends[b], .threads = threads};
            struct startup whole = {0};
            whole_open(&whole, self, &way);
            for (size_t c = 0; c < sizeof chunks / sizeof *chunks; c++)
                for (way.has_neighbours = 0; way.has_neighbours < 2; way.has_neighbours++) {
                    way.chunk = chunks[c];
                    compare(self, &whole, &way);
                }
            startup_close(&whole);
        }
}

/* Each backend once alone and once in company, the rest drawn from turn. */
static void compare_some_ways(struct subject *self, uint32_t turn)
{
    static const uint32_t chunks[] = {512, 5, 64, 1};
    for (size_t b = 0; backends[b]; b++) {
        struct way way = {.backend = backends[b], .threads = 1 + (turn + (uint32_t)b) % 2};
        struct startup whole = {0};
        whole_open(&whole, self, &way);
        way.chunk = chunks[(turn + b) % 4];
        compare(self, &whole, &way);
        way.chunk = chunks[(turn + b + 1) % 4];
        way.has_neighbours = 1;
        compare(self, &whole, &way);
        startup_close(&whole);
    }
}

/* All of a trace in one number. */
static void digest_of_trace(char *hex, const struct subject *self)
{
    const struct model_params *p = model_params_view(self->model);
    struct digest_stream *stream = NULL;
    struct digest digest;
    cr_assert_eq(digest_stream_open(&stream), ODSI_OK);
    for (uint32_t i = 0; i < p->layer_count; i++)
        digest_stream_add(stream, self->first.layers[i].bytes, DIGEST_SIZE);
    digest_stream_add(stream, self->first.logits, p->vocab_size * sizeof(float));
    digest_stream_finish(stream, &digest);
    digest_stream_close(&stream);
    digest_to_hex(hex, &digest);
}

/* Lines of "model type tokens trace". */
static void compare_with_golden(const struct subject *self, const char *family,
                                enum tensor_type type)
{
    char line[160], start[64], hex[DIGEST_HEX_SIZE];
    FILE *file = fopen(TRACES, "r");
    cr_assert_not_null(file, TRACES);
    digest_of_trace(hex, self);
    snprintf(start, sizeof start, "%s %s %u ", family, quant_name(type), self->token_count);
    int found = 0;
    while (!found && fgets(line, sizeof line, file))
        found = strncmp(line, start, strlen(start)) == 0;
    fclose(file);
    cr_expect(found && strncmp(line + strlen(start), hex, DIGEST_HEX_SIZE - 1) == 0,
              "%s%s: not the golden trace", start, hex);
}

/* Relative L2 distance of the last logits to those of the binary64 forward. */
static double error_of(const struct subject *self)
{
    const uint32_t vocab = model_params_view(self->model)->vocab_size;
    uint32_t tokens[TOKENS];
    double *wanted = NULL;
    double error = 0, size = 0;
    cr_assert_eq(alloc_zeroed(&wanted, (size_t)self->token_count * vocab, sizeof *wanted), ODSI_OK);
    for (uint32_t t = 0; t < self->token_count; t++)
        tokens[t] = token_at(0, t, vocab);
    forward64_run(wanted, self->path, tokens, self->token_count);
    const double *last = wanted + (size_t)(self->token_count - 1) * vocab;
    for (uint32_t i = 0; i < vocab; i++) {
        const double off = last[i] - (double)self->first.logits[i];
        error += off * off;
        size += last[i] * last[i];
    }
    alloc_free(wanted);
    return sqrt(error / size);
}

static void subject_open(struct subject *self, const char *path, const char *what)
{
    self->what = what;
    self->token_count = TOKENS;
    cr_assert_eq(model_open(&self->model, path, NULL, NULL, NULL), ODSI_OK, "%s: %s", what,
                 odsi_err_text());
}

static void subject_close(struct subject *self)
{
    trace_close(&self->first);
    model_close(&self->model);
}

/* Bounds of the relative error of the logits, about twice what was measured over all families:
 * float weights meet the binary16 KV cache and binary32 sums, quantized ones the 8 bits of their
 * activations. */
static double error_bound(enum tensor_type type)
{
    return quant_is_quantized(type) ? 0.045 : 1.5e-3;
}

static void check(const char *family, enum tensor_type type, uint32_t turn)
{
    struct subject self = {0};
    char what[64];
    const struct synth_shape *shape = synth_shape_find(family);
    cr_assert_not_null(shape, "%s", family);
    snprintf(what, sizeof what, "%s %s", family, quant_name(type));
    snprintf(self.path, sizeof self.path, "/tmp/odsi-families-%d.gguf", (int)getpid());
    (void)unlink(self.path);
    cr_assert_eq(synth_write(self.path, shape, type, 1, NULL, NULL), ODSI_OK, "%s",
                 odsi_err_text());
    subject_open(&self, self.path, what);
    if (is_full())
        compare_all_ways(&self);
    else
        compare_some_ways(&self, turn);
    compare_with_golden(&self, family, type);
    const double error = error_of(&self);
    if (is_full())
        printf("%-14s %-5s %2u ways equal, logits off by %.1e\n", family, quant_name(type),
               self.ways, error);
    cr_expect(error <= error_bound(type), "%s: logits off by %g", what, error);
    subject_close(&self);
    (void)unlink(self.path);
}

/* ---- tests ----------------------------------------------------------------------------------- */

static void find_backends(void)
{
    backends = backend_names();
}

TestSuite(families, .init = find_backends);

/* One test for each family, so that they run side by side. */
ParameterizedTestParameters(families, are_right_and_give_the_same_bits_every_way)
{
    static uint32_t indices[FAMILY_COUNT];
    for (uint32_t i = 0; i < FAMILY_COUNT; i++)
        indices[i] = i;
    return cr_make_param_array(uint32_t, indices, FAMILY_COUNT, NULL);
}

ParameterizedTest(const uint32_t *index, families, are_right_and_give_the_same_bits_every_way)
{
    const uint32_t f = *index;
    for (uint32_t t = 0; t < TYPE_COUNT; t++)
        if (is_full() || t == f || t == (f + 7) % TYPE_COUNT || (f == 0 && t >= FAMILY_COUNT))
            check(families[f], types[t], f + t);
}

Test(families, the_demo_gives_the_same_bits_every_way)
{
    static const char *const paths[] = {"deploy/demo/odsi-tiny-f32.gguf",
                                        "deploy/demo/odsi-tiny-q8_0.gguf"};
    for (size_t i = 0; i < 2; i++) {
        struct subject self = {0};
        subject_open(&self, paths[i], paths[i]);
        compare_all_ways(&self);
        cr_expect(self.ways >= 16, "%u", self.ways);
        subject_close(&self);
    }
}
