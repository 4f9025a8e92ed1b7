/* A coordinator's surroundings in a test: coordinators as processes, members through the worker's
 * own client, plain callers and watchers, all over real mutual TLS and on one loop that the test's
 * thread runs while it waits. Functions fail the test when something goes wrong.
 *
 * Times are generous, because other work shares the machine; nothing waits longer than it must. */
#ifndef ODSI_TESTS_SUPPORT_PEERS_H
#define ODSI_TESTS_SUPPORT_PEERS_H
#include "common/base/buf.h"
#include "common/base/limits.h"
#include "common/crypto/identity.h"
#include "common/net/rpc_client.h"
#include "common/net/rpc_loop.h"
#include "odsi/v1/coordinator.pb-c.h"
#include "tests/support/process.h"
#include "worker/hop/coordinator_client.h"

#define PEERS_WAIT_US      20000000u /* for anything that must happen */
#define PEERS_HEARTBEAT_MS 300u
#define PEERS_MEMBERS_MAX  32u
#define PEERS_LINE_SIZE    512u

struct peers {
    char folder[PROCESS_PATH_SIZE];
    char database[PROCESS_PATH_SIZE + 8]; /* as a --store url */
    struct rpc_loop *loop;
};

void peers_open(struct peers *self);
void peers_close(struct peers *self);
/* Runs the loop until is_true(context), at most for timeout_us; returns whether it became true. */
int peers_wait_for(struct peers *peers, int (*is_true)(void *context), void *context,
                   uint64_t timeout_us);
void peers_run_for(struct peers *peers, uint64_t time_us);

/* ---- coordinators: processes, ended with process_close ---- */

struct peers_instance {
    struct process *process;
    char ready_path[PROCESS_PATH_SIZE];
    char address[PEERS_LINE_SIZE]; /* ID@host:port */
};

struct peers_instance_config {
    const char *name;
    const char *listen; /* NULL: any port of loopback */
    const char *store;  /* NULL: the test's database */
    uint32_t heartbeat_ms;
    int insecure;
};

void peers_start(struct peers *peers, struct peers_instance *self,
                 const struct peers_instance_config *config);
void peers_start_named(struct peers *peers, struct peers_instance *self, const char *name);
/* The part of an instance's address after the ID. */
const char *peers_place_of(const struct peers_instance *self);

/* ---- members ---- */

struct peers_worker {
    struct peers *peers;
    struct identity *identity;
    struct coordinator_client *client;
    uint32_t first;
    uint32_t end;
    int assigned_count;
    int lost_count;
    int gave_up;
    int left;
    struct odsi_failure failure;
    struct coordinator_load load;
};

void peers_worker_make(struct peers *peers, struct peers_worker *self);
/* A member at address with all 12 layers of one model. */
struct coordinator_client_config peers_worker_config(struct peers_worker *self,
                                                     const char *addresses, const char *address);
/* Starts to join so. */
void peers_worker_join(struct peers_worker *self, const char *addresses, const char *address);
/* Vanishes without a word. */
void peers_worker_drop(struct peers_worker *self);
/* For coordinator_client: a worker is the context. */
void peers_fill_load(void *context, struct coordinator_load *out);
void peers_on_left(void *context);
/* For peers_wait_for: a worker is the context. */
int peers_is_assigned(void *context);
int peers_is_lost(void *context);
int peers_has_left(void *context);

/* ---- plain calls ---- */

struct peers_caller {
    struct peers *peers;
    struct identity *identity; /* NULL: plaintext */
    struct rpc_channel *channel;
    int is_answered;
    enum rpc_status status;
    char text[PEERS_LINE_SIZE];
    struct buf reply;
};

void peers_caller_open(struct peers *peers, struct peers_caller *self, const char *address,
                       int with_tls);
void peers_caller_close(struct peers_caller *self);
/* A method of odsi.v1.Coordinator; the reply is in self->reply. */
enum rpc_status peers_call_bytes(struct peers_caller *self, const char *method, const void *data,
                                 size_t size);
enum rpc_status peers_call(struct peers_caller *self, const char *method,
                           const ProtobufCMessage *request);
/* GetDirectory, unpacked; ended with rpc_unpack_free. */
Odsi__V1__Directory *peers_get_directory(struct peers_caller *self);

/* A valid Join of layers [0, 12); the parts are the caller's to spoil. */
struct peers_join_request {
    Odsi__V1__JoinRequest request;
    Odsi__V1__ModelDescription model;
    Odsi__V1__LayerRange layers;
    Odsi__V1__Capability capability;
    uint8_t id[DIGEST_SIZE];
    char address[300];
    char name[200];
    char backend[100];
};

void peers_join_request(struct peers_join_request *self);

/* ---- watchers ---- */

struct peers_seen {
    struct digest id;
    char address[LIMIT_ADDRESS_SIZE];
    uint32_t first;
    uint32_t end;
    int ready;
    struct coordinator_load load;
};

struct peers_watch {
    struct peers_caller caller;
    struct rpc_call *call;
    int is_done;
    enum rpc_status status;
    uint32_t message_count;
    uint64_t version;
    uint32_t count;
    struct peers_seen members[PEERS_MEMBERS_MAX];
    uint32_t count_min; /* since the test last set it */
    int is_tolerant;    /* of directories that there is no memory for */
    int went_back;      /* a version was not larger than the one before */
};

/* Returns with the first directory. */
void peers_watch_open(struct peers *peers, struct peers_watch *self, const char *address);
void peers_watch_close(struct peers_watch *self);
/* Waits until there are so many members, all of them ready (1) or not (0); -1: either. */
void peers_expect_members(const struct peers_watch *watch, uint32_t count, int ready);

/* For peers_wait_for. */
int peers_is_watch_over(void *context); /* a watch */
struct peers_version_awaited {
    const struct peers_watch *watch;
    uint64_t version;
};
int peers_has_version(void *context);
struct peers_id_awaited {
    const struct peers_watch *watch;
    const struct digest *id;
};
int peers_is_only_member(void *context);
#endif
