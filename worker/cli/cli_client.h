/* A client of gateways and coordinators for the commands: blocking calls over common/net, with
 * plain structs instead of protobuf messages. Main thread only, one call of this file at a time;
 * several answers may be generated at once (cli_client_generate_start, then cli_client_run). */
#ifndef ODSI_WORKER_CLI_CLI_CLIENT_H
#define ODSI_WORKER_CLI_CLI_CLIENT_H
#include "common/base/buf.h"
#include "common/base/err.h"
#include "common/base/limits.h"
#include "common/crypto/digest.h"
#include "worker/cli/cli_chat.h"
#include "worker/cli/cli_sampling.h"

#include <stddef.h>
#include <stdint.h>

struct cli_client;

struct cli_client_config {
    const char *peer;           /* [ID@]host:port */
    int is_insecure;            /* plaintext, to this machine only */
    const char *identity_path;  /* NULL: identity.pem at home, made when missing */
    int is_cancelled_by_signal; /* SIGINT and SIGTERM cancel the running calls */
};

#define CLI_GATEWAY_DEFAULT "127.0.0.1:7800"
/* The flags that say which gateway a command speaks to, for its struct with the members gateway,
 * is_insecure and identity. */
#define CLI_GATEWAY_OPTIONS(o)                                                                     \
    {"gateway",        'g',                                                                        \
     ARGS_TEXT,        &(o).gateway,                                                               \
     "[ID@]HOST:PORT", "the gateway to ask (" CLI_GATEWAY_DEFAULT ")"},                            \
        {"insecure", 0, ARGS_FLAG, &(o).is_insecure, NULL, "no encryption; only to this machine"}, \
    {                                                                                              \
        "identity", 0, ARGS_TEXT, &(o).identity, "FILE", "our key (identity.pem at home)"          \
    }

/* Connects when first used. Without an ID the peer's key is remembered at the first connection and
 * must be the same later (trust on first use).
 * Errors: ODSI_ERR_INVALID (address), ODSI_ERR_DENIED (plaintext to another machine), those of
 * identity_open. */
ODSI_MUST_USE enum odsi_err cli_client_open(struct cli_client **out,
                                            const struct cli_client_config *config);
/* No answer may be running. *self may be NULL. */
void cli_client_close(struct cli_client **self);

/* ---- models and members ---------------------------------------------------------------------- */

struct cli_model_row {
    struct digest id;
    char name[LIMIT_NAME_SIZE];
    uint32_t layer_count;
    uint32_t context_length;
    uint32_t worker_count;
    int is_complete; /* every layer is served */
};

/* What the gateway serves. *rows is ended with alloc_free.
 * Errors: the gateway's or the network's answer, as cli_client_fail tells it. */
ODSI_MUST_USE enum odsi_err cli_client_models(struct cli_client *self, uint64_t timeout_us,
                                              struct cli_model_row **rows, uint32_t *row_count);

struct cli_member_row {
    struct digest worker_id;
    struct digest model_id;
    char address[LIMIT_ADDRESS_SIZE];
    char model_name[LIMIT_NAME_SIZE];
    char backend[32];
    uint32_t model_layers;
    uint32_t layer_first;
    uint32_t layer_end;
    uint32_t thread_count;
    uint64_t memory_size;
    double prefill_tps;
    double decode_tps;
    uint32_t session_count;
    uint32_t queued_step_count;
    uint64_t kv_tokens_free;
    uint64_t kv_tokens;
    int is_ready;
    uint32_t silent_ms;
};

/* The coordinator's directory, sorted by model, first layer and worker id. *rows is ended with
 * alloc_free. */
ODSI_MUST_USE enum odsi_err cli_client_members(struct cli_client *self, uint64_t timeout_us,
                                               uint64_t *version, struct cli_member_row **rows,
                                               uint32_t *row_count);

/* ---- generating ------------------------------------------------------------------------------ */

struct cli_request {
    const char *model;             /* NULL: the only one served */
    const char *prompt;            /* UTF-8; NULL: prompt_tokens instead */
    const uint32_t *prompt_tokens; /* its count follows */
    uint32_t prompt_token_count;
    const struct cli_message *messages; /* instead of both; its count follows */
    uint32_t message_count;
    uint32_t max_tokens;  /* 0: until the model ends */
    uint32_t deadline_ms; /* 0: none */
    const struct cli_sampling *sampling;
};

struct cli_hop_row {
    struct digest worker_id;
    char address[LIMIT_ADDRESS_SIZE];
    uint32_t layer_first;
    uint32_t layer_end;
    uint32_t queue_us;
    uint32_t compute_us;
    uint32_t network_us;
    int64_t slack_us;
    uint32_t step_count;
};

/* An answer, growing while it comes. */
struct cli_answer {
    enum odsi_err err; /* once done: ODSI_OK when it is whole */
    char err_text[ODSI_ERR_TEXT_SIZE];
    char session[33]; /* hex; "" before the first message */
    uint32_t *tokens; /* [token_count] */
    float *logprobs;  /* [token_count] */
    uint32_t token_count;
    uint32_t token_capacity;
    struct buf text;
    /* From the last message: */
    int has_summary;
    const char *finish_reason; /* "end", "stop", "length", "cancelled" */
    struct digest model_id;
    uint32_t numerics_version;
    uint32_t prompt_token_count;
    uint32_t reused_token_count; /* of the prompt */
    uint32_t new_token_count;
    uint64_t seed;
    uint64_t first_token_us;
    uint64_t total_us;
    struct cli_hop_row *hops; /* [hop_count] */
    uint32_t hop_count;
};

/* What the caller is told, during cli_client_run. Members may be NULL. */
struct cli_answer_events {
    /* answer has grown by token_count tokens and text_size bytes. */
    void (*on_piece)(void *context, const struct cli_answer *answer, uint32_t token_count,
                     size_t text_size);
    void (*on_done)(void *context, const struct cli_answer *answer);
};

/* Starts an answer. events and context must live until it is done, and so must *answer, which is
 * initialized here and ended with cli_answer_free in every case.
 * Errors: ODSI_ERR_NO_MEMORY and those of the connection; answer->err is then set too. */
ODSI_MUST_USE enum odsi_err cli_client_generate_start(struct cli_client *self,
                                                      struct cli_answer *answer,
                                                      const struct cli_request *request,
                                                      const struct cli_answer_events *events,
                                                      void *context);
/* Runs until every answer that was started is done. */
void cli_client_run(struct cli_client *self);
/* The same; all of them are cancelled (ODSI_ERR_CANCELLED) once fd is readable, such as a signalfd.
 * fd is not read. */
void cli_client_run_until(struct cli_client *self, int fd);
void cli_client_answer_free(struct cli_answer *answer);
#endif
