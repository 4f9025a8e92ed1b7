/* What common/net costs: ping-pong of frames on one long-lived stream through our calls, against
 * the least C-core program that does the same work, each with its server in a process of its own.
 *
 *   bench_rpc [--sizes LIST] [--rounds N] [--repeat N] [--spin-us N] [--work-us N] [--json]
 *
 * Both sides of each pair copy a received payload to one place and send it from there. Repeats of
 * the two alternate; the least p50 and the least p99 of each are reported, because a shared machine
 * only ever adds time. With --work-us the client reads through memory before each round, as a
 * stage that computes does: the code of the connection has left the caches, and the other side has
 * fallen asleep. That is what a hop of a large model meets. */
#include "common/base/alloc.h"
#include "common/base/args.h"
#include "common/base/limits.h"
#include "common/net/rpc_client.h"
#include "common/net/rpc_loop.h"
#include "common/net/rpc_server.h"

#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/support/time.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PATH           "/bench.Echo/Frames"
#define PAYLOAD_MAX    (8u << 20)
#define HEADER_SIZE    64u
#define WARM_UP_ROUNDS 100u
#define SIZES_MAX      16u
#define SERVE_VARIABLE "ODSI_BENCH_SERVE" /* "ours", "bare", and "+tls" behind it */
#define REPORT_FD      3
#define TIMEOUT_US     120000000u

extern char **environ;

struct options {
    const char *sizes;
    uint32_t rounds;
    uint32_t repeat;
    uint32_t spin_us;
    uint32_t work_us;
    int json;
};

static void check(int ok, const char *what)
{
    if (ok)
        return;
    fprintf(stderr, "bench_rpc: %s: %s\n", what, odsi_err_text());
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Reads as much memory as work_us allow; more of it than caches hold. */
static void pretend_to_compute(uint32_t work_us)
{
    static volatile uint64_t memory[8u << 20];
    static size_t at;
    const uint64_t end_ns = now_ns() + (uint64_t)work_us * 1000;
    while (work_us > 0 && now_ns() < end_ns) {
        for (size_t i = 0; i < 4096; i++)
            memory[at + i]++;
        at = (at + 4096) % (sizeof memory / sizeof *memory);
    }
}

static double us(uint64_t time_ns)
{
    return (double)time_ns / 1000.0;
}

static void *take_memory(size_t count, size_t size)
{
    void *memory = NULL;
    check(alloc_zeroed(&memory, count, size) == ODSI_OK, "memory");
    return memory;
}

/* ---- ours ---------------------------------------------------------------------------------- */

/* One end of a stream: every frame that comes is answered from the same memory. */
struct ours {
    struct rpc_loop *loop;
    uint8_t *payload;
    uint8_t header[HEADER_SIZE];
    uint8_t scratch[LIMIT_HOP_HEADER_SIZE];
    /* Client. */
    size_t size;
    uint64_t *times_ns;
    uint64_t start_ns;
    unsigned round, round_count;
    uint32_t work_us;
};

static void keep(void *context, void *payload)
{
    (void)context;
    (void)payload;
}

static void ours_take(struct ours *self, const struct rpc_message *message)
{
    struct rpc_frame frame;
    check(rpc_frame_read(&frame, message, self->scratch) == ODSI_OK, "frame");
    check(frame.payload_size <= PAYLOAD_MAX, "payload size");
    self->size = frame.payload_size;
    rpc_frame_copy_payload(&frame, message, self->payload);
}

static void ours_send(struct ours *self, struct rpc_call *call)
{
    enum odsi_err err = rpc_call_send_frame(call, self->header, sizeof self->header, self->payload,
                                            self->size, keep, NULL);
    check(err == ODSI_OK, "send");
}

static void on_server_message(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    ours_take(user, message);
    ours_send(user, call);
}

static void on_half_close(void *user, struct rpc_call *call)
{
    (void)user;
    rpc_call_finish(call, RPC_OK, NULL);
}

static void *on_open(void *service, struct rpc_call *call, const struct rpc_handler **handler)
{
    static const struct rpc_handler echo = {.on_message = on_server_message,
                                            .on_half_close = on_half_close};
    (void)call;
    *handler = &echo;
    return service;
}

static void report_port(uint16_t port)
{
    check(write(REPORT_FD, &port, sizeof port) == (ssize_t)sizeof port, "report the port");
}

static void ours_serve(const struct identity *identity, uint32_t spin_us)
{
    static const struct rpc_method methods[] = {{PATH, on_open, LIMIT_HOP_MESSAGE_SIZE}};
    struct ours self = {.payload = take_memory(PAYLOAD_MAX, 1)};
    struct rpc_server *server = NULL;
    check(rpc_loop_open(&self.loop) == ODSI_OK, "loop");
    rpc_loop_set_spin(self.loop, spin_us);
    const struct rpc_service service = {
        .name = "bench.Echo", .methods = methods, .method_count = 1, .context = &self};
    const struct rpc_server_config config = {
        .listen = "127.0.0.1:0", .identity = identity, .services = &service, .service_count = 1};
    check(rpc_server_open(&server, self.loop, &config) == ODSI_OK, "server");
    report_port(rpc_server_port(server));
    for (;;)
        rpc_loop_run(self.loop);
}

static void on_client_message(void *user, struct rpc_call *call, const struct rpc_message *message)
{
    struct ours *self = user;
    const size_t size = self->size;
    ours_take(self, message);
    check(self->size == size, "echo size");
    const uint64_t end_ns = now_ns();
    if (self->round >= WARM_UP_ROUNDS)
        self->times_ns[self->round - WARM_UP_ROUNDS] = end_ns - self->start_ns;
    if (++self->round == self->round_count) {
        rpc_call_half_close(call);
        return;
    }
    pretend_to_compute(self->work_us);
    self->start_ns = now_ns();
    ours_send(self, call);
}

static void on_client_done(void *user, struct rpc_call *call, enum rpc_status status,
                           const char *text)
{
    struct ours *self = user;
    (void)call;
    if (status != RPC_OK)
        fprintf(stderr, "bench_rpc: status %d: %s\n", (int)status, text);
    check(status == RPC_OK, "stream");
    rpc_loop_stop(self->loop);
}

static void ours_measure(uint64_t *times_ns, unsigned rounds, size_t size, const char *address,
                         const struct identity *identity, const struct options *options)
{
    static const struct rpc_handler handler = {.on_message = on_client_message,
                                               .on_done = on_client_done};
    struct ours self = {.payload = take_memory(PAYLOAD_MAX, 1),
                        .size = size,
                        .times_ns = times_ns,
                        .work_us = options->work_us,
                        .round_count = WARM_UP_ROUNDS + rounds};
    struct rpc_channel *channel = NULL;
    struct rpc_call *call = NULL;
    const struct rpc_channel_config config = {
        .address = address, .identity = identity, .receive_size_max = LIMIT_HOP_MESSAGE_SIZE};
    check(rpc_loop_open(&self.loop) == ODSI_OK, "loop");
    rpc_loop_set_spin(self.loop, options->spin_us);
    check(rpc_channel_open(&channel, self.loop, &config) == ODSI_OK, "channel");
    check(rpc_call_open(&call, channel, PATH, TIMEOUT_US, 1, &handler, &self) == ODSI_OK, "call");
    self.start_ns = now_ns();
    ours_send(&self, call);
    rpc_loop_run(self.loop);
    rpc_channel_close(&channel);
    rpc_loop_close(&self.loop);
    alloc_free(self.payload);
}

/* ---- bare C-core --------------------------------------------------------------------------- */

struct bare {
    grpc_completion_queue *queue;
    uint8_t *payload;
};

static grpc_event bare_next(const struct bare *self)
{
    return grpc_completion_queue_next(self->queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
}

static void bare_batch(const struct bare *self, grpc_call *call, const grpc_op *ops, size_t count)
{
    check(grpc_call_start_batch(call, ops, count, (void *)(uintptr_t)1, NULL) == GRPC_CALL_OK,
          "batch");
    check(bare_next(self).type == GRPC_OP_COMPLETE, "event");
}

static void bare_send(const struct bare *self, grpc_call *call, size_t size, int with_headers)
{
    grpc_slice slice = grpc_slice_from_static_buffer(self->payload, size);
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_op ops[2];
    size_t count = 0;
    memset(ops, 0, sizeof ops);
    if (with_headers)
        ops[count++].op = GRPC_OP_SEND_INITIAL_METADATA;
    ops[count].op = GRPC_OP_SEND_MESSAGE;
    ops[count++].data.send_message.send_message = buffer;
    bare_batch(self, call, ops, count);
    grpc_byte_buffer_destroy(buffer);
}

/* Receives one message into payload; returns its size, or SIZE_MAX at the end. */
static size_t bare_receive(const struct bare *self, grpc_call *call, grpc_metadata_array *headers)
{
    grpc_byte_buffer *buffer = NULL;
    grpc_byte_buffer_reader reader;
    grpc_slice *slice = NULL;
    size_t size = 0;
    size_t count = 0;
    grpc_op ops[2];
    memset(ops, 0, sizeof ops);
    if (headers) {
        ops[count].op = GRPC_OP_RECV_INITIAL_METADATA;
        ops[count++].data.recv_initial_metadata.recv_initial_metadata = headers;
    }
    ops[count].op = GRPC_OP_RECV_MESSAGE;
    ops[count++].data.recv_message.recv_message = &buffer;
    bare_batch(self, call, ops, count);
    if (!buffer)
        return SIZE_MAX;
    check(grpc_byte_buffer_length(buffer) <= PAYLOAD_MAX, "payload size");
    check(grpc_byte_buffer_reader_init(&reader, buffer), "reader");
    while (grpc_byte_buffer_reader_peek(&reader, &slice)) {
        memcpy(self->payload + size, GRPC_SLICE_START_PTR(*slice), GRPC_SLICE_LENGTH(*slice));
        size += GRPC_SLICE_LENGTH(*slice);
    }
    grpc_byte_buffer_reader_destroy(&reader);
    grpc_byte_buffer_destroy(buffer);
    return size;
}

static grpc_tls_credentials_options *bare_tls(const struct identity *identity)
{
    const char *certificate = identity_certificate_pem_view(identity);
    grpc_tls_identity_pairs *pairs = grpc_tls_identity_pairs_create();
    grpc_tls_identity_pairs_add_pair(pairs, identity_key_pem_view(identity), certificate);
    grpc_tls_certificate_provider *provider =
        grpc_tls_certificate_provider_static_data_create(certificate, pairs);
    grpc_tls_certificate_verifier *anyone = grpc_tls_certificate_verifier_no_op_create();
    grpc_tls_credentials_options *options = grpc_tls_credentials_options_create();
    grpc_tls_credentials_options_set_certificate_provider(options, provider);
    grpc_tls_credentials_options_watch_identity_key_cert_pairs(options);
    grpc_tls_credentials_options_set_certificate_verifier(options, anyone);
    grpc_tls_certificate_verifier_release(anyone);
    grpc_tls_certificate_provider_release(provider);
    return options;
}

static grpc_server_credentials *bare_server_credentials(const struct identity *identity)
{
    if (!identity)
        return grpc_insecure_server_credentials_create();
    grpc_tls_credentials_options *options = bare_tls(identity);
    grpc_tls_credentials_options_set_cert_request_type(
        options, GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_BUT_DONT_VERIFY);
    return grpc_tls_server_credentials_create(options);
}

static grpc_channel_credentials *bare_channel_credentials(const struct identity *identity)
{
    if (!identity)
        return grpc_insecure_credentials_create();
    grpc_tls_credentials_options *options = bare_tls(identity);
    grpc_tls_credentials_options_watch_root_certs(options);
    grpc_tls_credentials_options_set_verify_server_cert(options, 0);
    grpc_tls_credentials_options_set_check_call_host(options, 0);
    return grpc_tls_credentials_create(options);
}

static grpc_arg limit_arg(void)
{
    static char key[] = GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH;
    return (grpc_arg){.type = GRPC_ARG_INTEGER, .key = key, .value.integer = -1};
}

static void bare_serve(const struct identity *identity)
{
    struct bare self = {.payload = take_memory(PAYLOAD_MAX, 1)};
    grpc_arg arg = limit_arg();
    const grpc_channel_args args = {.num_args = 1, .args = &arg};
    grpc_init();
    self.queue = grpc_completion_queue_create_for_next(NULL);
    grpc_server *server = grpc_server_create(&args, NULL);
    grpc_server_register_completion_queue(server, self.queue, NULL);
    void *method = grpc_server_register_method(server, PATH, NULL, GRPC_SRM_PAYLOAD_NONE, 0);
    const int port =
        grpc_server_add_http2_port(server, "127.0.0.1:0", bare_server_credentials(identity));
    check(port > 0, "bare port");
    grpc_server_start(server);
    report_port((uint16_t)port);
    for (;;) {
        grpc_call *call = NULL;
        gpr_timespec deadline;
        grpc_metadata_array headers;
        grpc_slice text = grpc_empty_slice();
        grpc_op op;
        int is_first = 1;
        grpc_metadata_array_init(&headers);
        grpc_server_request_registered_call(server, method, &call, &deadline, &headers, NULL,
                                            self.queue, self.queue, (void *)(uintptr_t)2);
        check(bare_next(&self).success, "accept");
        for (size_t size; (size = bare_receive(&self, call, NULL)) != SIZE_MAX; is_first = 0)
            bare_send(&self, call, size, is_first);
        memset(&op, 0, sizeof op);
        op.op = GRPC_OP_SEND_STATUS_FROM_SERVER;
        op.data.send_status_from_server.status_details = &text;
        bare_batch(&self, call, &op, 1);
        grpc_metadata_array_destroy(&headers);
        grpc_call_unref(call);
    }
}

static void bare_measure(uint64_t *times_ns, unsigned rounds, size_t size, const char *address,
                         const struct identity *identity, uint32_t work_us)
{
    struct bare self = {.payload = take_memory(PAYLOAD_MAX, 1)};
    grpc_arg arg = limit_arg();
    const grpc_channel_args args = {.num_args = 1, .args = &arg};
    grpc_metadata_array headers;
    grpc_op op;
    grpc_init();
    self.queue = grpc_completion_queue_create_for_next(NULL);
    grpc_channel_credentials *credentials = bare_channel_credentials(identity);
    grpc_channel *channel = grpc_channel_create(address, credentials, &args);
    grpc_channel_credentials_release(credentials);
    grpc_call *call = grpc_channel_create_call(
        channel, NULL, GRPC_PROPAGATE_DEFAULTS, self.queue, grpc_slice_from_static_string(PATH),
        NULL,
        gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_micros(TIMEOUT_US, GPR_TIMESPAN)),
        NULL);
    grpc_metadata_array_init(&headers);
    for (unsigned round = 0; round < WARM_UP_ROUNDS + rounds; round++) {
        pretend_to_compute(work_us);
        const uint64_t start_ns = now_ns();
        bare_send(&self, call, size, round == 0);
        check(bare_receive(&self, call, round == 0 ? &headers : NULL) == size, "bare echo");
        if (round >= WARM_UP_ROUNDS)
            times_ns[round - WARM_UP_ROUNDS] = now_ns() - start_ns;
    }
    memset(&op, 0, sizeof op);
    op.op = GRPC_OP_SEND_CLOSE_FROM_CLIENT;
    bare_batch(&self, call, &op, 1);
    check(bare_receive(&self, call, NULL) == SIZE_MAX, "bare end");
    grpc_metadata_array_destroy(&headers);
    grpc_call_unref(call);
    grpc_channel_destroy(channel);
    grpc_completion_queue_shutdown(self.queue);
    while (bare_next(&self).type != GRPC_QUEUE_SHUTDOWN)
        ;
    grpc_completion_queue_destroy(self.queue);
    grpc_shutdown_blocking();
    alloc_free(self.payload);
}

/* ---- pairs of processes ---------------------------------------------------------------------- */

static struct identity *identity_if(int with_tls)
{
    struct identity *identity = NULL;
    if (with_tls)
        check(identity_make(&identity) == ODSI_OK, "identity");
    return identity;
}

static void serve(const char *mode, uint32_t spin_us)
{
    struct identity *identity = identity_if(strstr(mode, "+tls") != NULL);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (strncmp(mode, "ours", 4) == 0)
        ours_serve(identity, spin_us);
    else
        bare_serve(identity);
}

static int start_server(const char *program, char **argv, const char *mode, uint16_t *port)
{
    posix_spawn_file_actions_t actions;
    int fds[2];
    int pid = -1;
    check(pipe(fds) == 0, "pipe");
    check(posix_spawn_file_actions_init(&actions) == 0, "spawn");
    check(posix_spawn_file_actions_adddup2(&actions, fds[1], REPORT_FD) == 0, "spawn");
    check(setenv(SERVE_VARIABLE, mode, 1) == 0, "environment");
    check(posix_spawn(&pid, program, &actions, NULL, argv, environ) == 0, "spawn");
    posix_spawn_file_actions_destroy(&actions);
    close(fds[1]);
    check(read(fds[0], port, sizeof *port) == (ssize_t)sizeof *port, "the server's port");
    close(fds[0]);
    return pid;
}

static int by_value(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a;
    const uint64_t y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

struct result {
    uint64_t p50_ns, p99_ns; /* the least of all repeats; 0: none yet */
};

static void measure(struct result *out, char **argv, const struct options *options, int is_ours,
                    int with_tls, size_t size)
{
    char mode[16];
    char address[64];
    uint16_t port = 0;
    uint64_t *times_ns = take_memory(options->rounds, sizeof *times_ns);
    struct identity *identity = identity_if(with_tls);
    snprintf(mode, sizeof mode, "%s%s", is_ours ? "ours" : "bare", with_tls ? "+tls" : "");
    const int pid = start_server("/proc/self/exe", argv, mode, &port);
    snprintf(address, sizeof address, "127.0.0.1:%u", port);
    if (is_ours)
        ours_measure(times_ns, options->rounds, size, address, identity, options);
    else
        bare_measure(times_ns, options->rounds, size, address, identity, options->work_us);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    qsort(times_ns, options->rounds, sizeof *times_ns, by_value);
    const uint64_t p50_ns = times_ns[options->rounds / 2];
    const uint64_t p99_ns = times_ns[options->rounds - 1 - options->rounds / 100];
    if (out->p50_ns == 0 || p50_ns < out->p50_ns)
        out->p50_ns = p50_ns;
    if (out->p99_ns == 0 || p99_ns < out->p99_ns)
        out->p99_ns = p99_ns;
    identity_close(&identity);
    alloc_free(times_ns);
}

static void print_row(const struct options *options, int is_first, int with_tls, size_t size,
                      const struct result *ours, const struct result *bare)
{
    const double ratio = (double)ours->p50_ns / (double)(bare->p50_ns ? bare->p50_ns : 1);
    if (options->json)
        printf("%s\n    {\"security\": \"%s\", \"payload_bytes\": %zu, \"ours_p50_us\": %.1f, "
               "\"ours_p99_us\": %.1f, \"bare_p50_us\": %.1f, \"bare_p99_us\": %.1f, "
               "\"ratio_p50\": %.3f}",
               is_first ? "" : ",", with_tls ? "mtls" : "none", size, us(ours->p50_ns),
               us(ours->p99_ns), us(bare->p50_ns), us(bare->p99_ns), ratio);
    else
        printf("%-6s %9zu %9.1f %9.1f %9.1f %9.1f %7.2f\n", with_tls ? "mTLS" : "plain", size,
               us(ours->p50_ns), us(ours->p99_ns), us(bare->p50_ns), us(bare->p99_ns), ratio);
    fflush(stdout);
}

static size_t read_sizes(size_t *out, const char *text)
{
    size_t count = 0;
    while (*text && count < SIZES_MAX) {
        char *end = NULL;
        const unsigned long size = strtoul(text, &end, 10);
        if (end == text || (*end != ',' && *end != '\0') || size > PAYLOAD_MAX)
            return 0;
        out[count++] = size;
        text = *end ? end + 1 : end;
    }
    return *text ? 0 : count;
}

static void run(const struct options *options, const size_t *sizes, size_t count, char **argv)
{
    if (options->json)
        printf("{\n  \"bench\": \"rpc\", \"rounds\": %u, \"repeat\": %u, \"spin_us\": %u, "
               "\"work_us\": %u,\n"
               "  \"round_trips\": [",
               options->rounds, options->repeat, options->spin_us, options->work_us);
    else
        printf("round trips in us: least p50 and p99 of %u runs of %u rounds, spin %u us, "
               "work %u us\n"
               "%-6s %9s %9s %9s %9s %9s %7s\n",
               options->repeat, options->rounds, options->spin_us, options->work_us, "", "bytes",
               "ours p50", "p99", "bare p50", "p99", "ratio");
    for (int with_tls = 0; with_tls <= 1; with_tls++) {
        for (size_t i = 0; i < count; i++) {
            struct result ours = {0};
            struct result bare = {0};
            for (uint32_t k = 0; k < options->repeat; k++) {
                measure(&ours, argv, options, 1, with_tls, sizes[i]);
                measure(&bare, argv, options, 0, with_tls, sizes[i]);
            }
            print_row(options, !with_tls && i == 0, with_tls, sizes[i], &ours, &bare);
        }
    }
    if (options->json)
        printf("\n  ]\n}\n");
}

int main(int argc, char **argv)
{
    struct options options = {
        .sizes = "64,16384,65536,1048576", .rounds = 1000, .repeat = 3, .spin_us = 0};
    const struct args_option list[] = {
        {"sizes", 0, ARGS_TEXT, &options.sizes, "BYTES,...", "payloads (64,16384,65536,1048576)"},
        {"rounds", 0, ARGS_U32, &options.rounds, "N", "round trips in one run (1000)"},
        {"repeat", 0, ARGS_U32, &options.repeat, "N", "runs of each kind (3)"},
        {"spin-us", 0, ARGS_U32, &options.spin_us, "US", "rpc_loop_set_spin on both ends (0)"},
        {"work-us", 0, ARGS_U32, &options.work_us, "US",
         "the client reads memory for so long before each round (0)"},
        {"json", 0, ARGS_FLAG, &options.json, NULL, "print JSON"},
        {0},
    };
    const struct args_program program = {
        .name = "bench_rpc",
        .summary = "Times round trips of frames through common/net and through bare gRPC.",
        .usage = "[options]",
        .options = list,
    };
    struct args *args = NULL;
    size_t sizes[SIZES_MAX];
    int rest = 0;
    const enum args_outcome outcome = args_read(&args, &program, argc, argv, &rest);
    if (outcome != ARGS_RUN) {
        args_close(&args);
        return outcome == ARGS_EXIT_OK ? 0 : 2;
    }
    /* gRPC itself, which only the bare half meets, writes a line per connection. */
    check(setenv("GRPC_VERBOSITY", "NONE", 0) == 0, "environment");
    const char *mode = getenv(SERVE_VARIABLE);
    if (mode)
        serve(mode, options.spin_us); /* does not return */
    const size_t count = read_sizes(sizes, options.sizes);
    if (count == 0 || options.rounds == 0 || options.repeat == 0) {
        fprintf(stderr,
                "bench_rpc: --sizes takes up to %u sizes up to %u; --rounds and --repeat "
                "at least 1\n",
                SIZES_MAX, PAYLOAD_MAX);
        args_close(&args);
        return 2;
    }
    run(&options, sizes, count, argv);
    args_close(&args);
    return 0;
}
