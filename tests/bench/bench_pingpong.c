/* The least that gRPC C-core needs to bring a message to another process and back: one stream, one
 * completion queue a side, nothing of ours but the keys. The yardstick for a hop.
 *
 *   bench_pingpong [--json] [--size BYTES] [--rounds N] [--plain]
 *
 * Both sides wait asleep, as the programs do. The other process is this one with --serve. */
#include "common/base/alloc.h"
#include "common/base/args.h"
#include "common/base/clock.h"
#include "common/crypto/identity.h"

#include <grpc/byte_buffer.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/support/alloc.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define WARM_UP 200u

extern char **environ;

struct options {
    uint32_t size;
    uint32_t rounds;
    int json;
    int plain;
    int serve;
};

static void die(const char *what)
{
    fprintf(stderr, "bench_pingpong: %s\n", what);
    exit(1);
}

static int verify(void *user, grpc_tls_custom_verification_check_request *request,
                  grpc_tls_on_custom_verification_check_done_cb done, void *done_arg,
                  grpc_status_code *status, char **details)
{
    (void)user;
    (void)request;
    (void)done;
    (void)done_arg;
    (void)details;
    *status = GRPC_STATUS_OK; /* who it is makes no difference to the time */
    return 1;
}

static void cancel(void *user, grpc_tls_custom_verification_check_request *request)
{
    (void)user;
    (void)request;
}

static void destruct(void *user)
{
    (void)user;
}

static grpc_tls_certificate_verifier_external external = {
    .verify = verify, .cancel = cancel, .destruct = destruct};

static grpc_tls_credentials_options *tls_options(struct identity **identity)
{
    if (identity_make(identity) != ODSI_OK)
        die(odsi_err_text());
    const char *certificate = identity_certificate_pem_view(*identity);
    grpc_tls_identity_pairs *pairs = grpc_tls_identity_pairs_create();
    grpc_tls_identity_pairs_add_pair(pairs, identity_key_pem_view(*identity), certificate);
    grpc_tls_certificate_provider *provider =
        grpc_tls_certificate_provider_static_data_create(certificate, pairs);
    grpc_tls_credentials_options *options = grpc_tls_credentials_options_create();
    grpc_tls_credentials_options_set_certificate_provider(options, provider);
    grpc_tls_credentials_options_watch_identity_key_cert_pairs(options);
    grpc_tls_credentials_options_set_certificate_verifier(
        options, grpc_tls_certificate_verifier_external_create(&external));
    grpc_tls_certificate_provider_release(provider);
    return options;
}

/* Starts one batch and waits for it. */
static int batch(grpc_completion_queue *queue, grpc_call *call, grpc_op *ops, size_t count)
{
    if (grpc_call_start_batch(call, ops, count, call, NULL) != GRPC_CALL_OK)
        die("a batch was refused");
    return grpc_completion_queue_next(queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL).success;
}

static grpc_op op_of(grpc_op_type type)
{
    grpc_op op;
    memset(&op, 0, sizeof op);
    op.op = type;
    return op;
}

/* ---- the side that answers ------------------------------------------------------------------ */

static void echo(grpc_completion_queue *queue, grpc_call *call)
{
    grpc_byte_buffer *message = NULL;
    grpc_op start = op_of(GRPC_OP_SEND_INITIAL_METADATA);
    batch(queue, call, &start, 1);
    for (;;) {
        grpc_op receive = op_of(GRPC_OP_RECV_MESSAGE);
        receive.data.recv_message.recv_message = &message;
        if (!batch(queue, call, &receive, 1) || !message)
            return;
        grpc_op send = op_of(GRPC_OP_SEND_MESSAGE);
        send.data.send_message.send_message = message;
        batch(queue, call, &send, 1);
        grpc_byte_buffer_destroy(message);
    }
}

static void serve(const struct options *options)
{
    struct identity *identity = NULL;
    grpc_completion_queue *queue = grpc_completion_queue_create_for_next(NULL);
    grpc_server *server = grpc_server_create(NULL, NULL);
    grpc_server_credentials *credentials = NULL;
    if (options->plain) {
        credentials = grpc_insecure_server_credentials_create();
    } else {
        grpc_tls_credentials_options *tls = tls_options(&identity);
        grpc_tls_credentials_options_set_cert_request_type(
            tls, GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_BUT_DONT_VERIFY);
        credentials = grpc_tls_server_credentials_create(tls);
    }
    grpc_server_register_completion_queue(server, queue, NULL);
    const int port = grpc_server_add_http2_port(server, "127.0.0.1:0", credentials);
    grpc_server_start(server);
    printf("%d\n", port);
    fflush(stdout);
    grpc_call *call = NULL;
    grpc_call_details details;
    grpc_metadata_array metadata;
    grpc_call_details_init(&details);
    grpc_metadata_array_init(&metadata);
    grpc_server_request_call(server, &call, &details, &metadata, queue, queue, NULL);
    if (grpc_completion_queue_next(queue, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL).success)
        echo(queue, call);
    _exit(0); /* nothing to tidy up for anyone */
}

/* ---- the side that measures ----------------------------------------------------------------- */

static pid_t start_server(const struct options *options, int *port)
{
    char program[4096] = "";
    char serve_flag[] = "--serve", plain_flag[] = "--plain";
    char *const argv[] = {program, serve_flag, options->plain ? plain_flag : NULL, NULL};
    int ends[2];
    pid_t pid = 0;
    posix_spawn_file_actions_t actions;
    if (readlink("/proc/self/exe", program, sizeof program - 1) < 0 || pipe(ends) != 0)
        die("the other process cannot be started");
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    posix_spawn_file_actions_addclose(&actions, ends[0]);
    if (posix_spawn(&pid, program, &actions, NULL, argv, environ) != 0)
        die("the other process cannot be started");
    close(ends[1]);
    FILE *out = fdopen(ends[0], "r");
    if (!out || fscanf(out, "%d", port) != 1)
        die("the other process does not say its port");
    fclose(out);
    posix_spawn_file_actions_destroy(&actions);
    return pid;
}

static grpc_channel *connect_to(const struct options *options, int port)
{
    struct identity *identity = NULL;
    char target[64];
    snprintf(target, sizeof target, "ipv4:127.0.0.1:%d", port);
    if (options->plain)
        return grpc_channel_create(target, grpc_insecure_credentials_create(), NULL);
    grpc_tls_credentials_options *tls = tls_options(&identity);
    grpc_tls_credentials_options_watch_root_certs(tls);
    grpc_tls_credentials_options_set_verify_server_cert(tls, 0);
    grpc_tls_credentials_options_set_check_call_host(tls, 0);
    return grpc_channel_create(target, grpc_tls_credentials_create(tls), NULL);
}

static int compare(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static void measure(const struct options *options, grpc_channel *channel, uint64_t *times_us)
{
    grpc_completion_queue *queue = grpc_completion_queue_create_for_next(NULL);
    grpc_call *call = grpc_channel_create_call(channel, NULL, GRPC_PROPAGATE_DEFAULTS, queue,
                                               grpc_slice_from_static_string("/ping"), NULL,
                                               gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
    grpc_op start = op_of(GRPC_OP_SEND_INITIAL_METADATA);
    if (!batch(queue, call, &start, 1))
        die("the other process does not answer");
    grpc_slice slice = grpc_slice_malloc(options->size);
    memset(GRPC_SLICE_START_PTR(slice), 7, options->size);
    grpc_metadata_array metadata;
    grpc_metadata_array_init(&metadata);
    for (uint32_t i = 0; i < WARM_UP + options->rounds; i++) {
        grpc_byte_buffer *answer = NULL;
        grpc_byte_buffer *message = grpc_raw_byte_buffer_create(&slice, 1);
        grpc_op ops[3] = {op_of(GRPC_OP_SEND_MESSAGE), op_of(GRPC_OP_RECV_MESSAGE),
                          op_of(GRPC_OP_RECV_INITIAL_METADATA)};
        ops[0].data.send_message.send_message = message;
        ops[1].data.recv_message.recv_message = &answer;
        ops[2].data.recv_initial_metadata.recv_initial_metadata = &metadata;
        const uint64_t begin_us = clock_monotonic_us();
        if (!batch(queue, call, ops, i == 0 ? 3 : 2) || !answer)
            die("the connection broke");
        if (i >= WARM_UP)
            times_us[i - WARM_UP] = clock_monotonic_us() - begin_us;
        grpc_byte_buffer_destroy(message);
        grpc_byte_buffer_destroy(answer);
    }
    qsort(times_us, options->rounds, sizeof *times_us, compare);
}

static void print(const struct options *options, const uint64_t *times_us)
{
    const unsigned long long p50 = times_us[options->rounds / 2];
    const unsigned long long p99 = times_us[options->rounds - 1 - options->rounds / 100];
    if (options->json)
        printf("{\"size\": %u, \"tls\": %s, \"rounds\": %u, "
               "\"round_trip_us\": {\"p50\": %llu, \"p99\": %llu}}\n",
               options->size, options->plain ? "false" : "true", options->rounds, p50, p99);
    else
        printf("ping-pong of %u bytes, %s: p50 %llu us, p99 %llu us there and back\n",
               options->size, options->plain ? "plaintext" : "mutual TLS", p50, p99);
}

static void read_options(struct options *options, int argc, char **argv)
{
    const struct args_option table[] = {
        {"size", 's', ARGS_U32, &options->size, "BYTES", "of a message (default 512)", 0},
        {"rounds", 'n', ARGS_U32, &options->rounds, "N", "(default 5000)", 0},
        {"plain", 0, ARGS_FLAG, &options->plain, NULL, "without TLS", 0},
        {"json", 0, ARGS_FLAG, &options->json, NULL, "one object", 0},
        {"serve", 0, ARGS_FLAG, &options->serve, NULL, "be the other side", 0},
        {NULL, 0, ARGS_FLAG, NULL, NULL, NULL, 0},
    };
    const struct args_program program = {.name = "bench_pingpong",
                                         .summary = "A bare gRPC ping-pong of two processes.",
                                         .usage = "[options]",
                                         .options = table};
    struct args *args = NULL;
    int rest = 0;
    const enum args_outcome outcome = args_read(&args, &program, argc, argv, &rest);
    args_close(&args);
    if (outcome != ARGS_RUN || options->rounds == 0 || options->rounds > 10000000 ||
        options->size > (3u << 20))
        exit(outcome == ARGS_EXIT_OK ? 0 : 2);
}

int main(int argc, char **argv)
{
    struct options options = {.size = 512, .rounds = 5000};
    uint64_t *times_us = NULL;
    int port = 0;
    read_options(&options, argc, argv);
    if (options.serve) {
        grpc_init();
        serve(&options);
    }
    if (alloc_zeroed(&times_us, options.rounds, sizeof *times_us) != ODSI_OK)
        die(odsi_err_text());
    const pid_t pid = start_server(&options, &port); /* before gRPC has threads */
    grpc_init();
    grpc_channel *channel = connect_to(&options, port);
    measure(&options, channel, times_us);
    print(&options, times_us);
    kill(pid, SIGKILL);
    waitpid(pid, NULL, 0);
    alloc_free(times_us);
    return 0;
}
