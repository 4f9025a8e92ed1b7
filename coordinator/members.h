/* The rules of membership (draft 5.3, 11.1): who may be in the directory, under what name, and for
 * how long. Pure: rows and times come in, decisions go out; the store applies them inside its
 * transactions.
 *
 *   joins        anyone with an identity. The same identity again replaces its own row: a worker
 *                that restarted is never there twice.
 *   address      belongs to one member. Another identity is refused while the holder's heartbeats
 *                arrive, else anyone could throw anyone out by naming his address; it replaces the
 *                holder as soon as that one is overdue. An address is the member's own claim:
 *                whoever connects to it checks the identity there.
 *   heartbeats   every heartbeat_ms. A member whose third heartbeat in a row is missing, with half
 *                an interval of patience for one on its way, is gone.
 *   room         LIMIT_MEMBERS_MAX members, and no more than one directory message can carry.
 *
 * Times are microseconds since 1970, because rows outlive a process and several instances share
 * them; struct members_listener keeps a clock that jumped from costing anyone his place.
 * An identity is meant for one process: of two that share one, each replaces the other.
 * Threads: pure functions; any thread. */
#ifndef ODSI_COORDINATOR_MEMBERS_H
#define ODSI_COORDINATOR_MEMBERS_H
#include "common/base/err.h"
#include "common/base/limits.h"
#include "common/crypto/digest.h"
#include "coordinator/assign.h"

#include <stddef.h>
#include <stdint.h>

#define MEMBERS_BACKEND_SIZE     32u /* bytes of a backend's name, with its NUL */
#define MEMBERS_HEARTBEAT_MS_MIN 10u
#define MEMBERS_HEARTBEAT_MS_MAX 600000u
/* Bytes of all members in one Directory message; the rest is its version. */
#define MEMBERS_DIRECTORY_SIZE_MAX (LIMIT_CONTROL_MESSAGE_SIZE - 64u)

/* Texts are NUL-terminated, and what lies behind the NUL has no meaning. */
struct members_model {
    struct digest id;
    char name[LIMIT_NAME_SIZE]; /* UTF-8 */
    uint32_t layer_count;
    uint32_t context_length;
    uint32_t numerics_version;
};

struct members_capability {
    uint64_t memory_size; /* bytes */
    uint64_t kv_token_capacity;
    float prefill_tokens_per_s;
    float decode_tokens_per_s;
    char backend[MEMBERS_BACKEND_SIZE]; /* printable ASCII */
    uint32_t thread_count;
};

struct members_load {
    uint32_t session_count;
    uint32_t queued_step_count;
    uint64_t kv_tokens_free;
};

/* One row. */
struct member {
    struct digest worker_id;
    char address[LIMIT_ADDRESS_SIZE]; /* host:port */
    struct members_model model;
    uint32_t layer_first; /* layers [layer_first, layer_end) */
    uint32_t layer_end;
    struct members_capability capability;
    struct members_load load;
    int ready;
    uint32_t heartbeat_ms; /* what it was told */
    uint64_t heard_at_us;  /* its join or last heartbeat */
};

/* A request to join, as it came. */
struct members_wish {
    struct digest worker_id; /* proven by its connection */
    char address[LIMIT_ADDRESS_SIZE];
    struct members_model model;
    uint32_t layer_first; /* both 0: the coordinator chooses */
    uint32_t layer_end;
    uint32_t layer_capacity; /* how many fit, when the coordinator chooses */
    struct members_capability capability;
};

struct members_beat {
    int ready;
    struct members_load load;
    int has_capability; /* else the one known stays */
    struct members_capability capability;
};

/* What bears on a join, read by the store in the same transaction. */
struct members_facts {
    const struct member *self;   /* the row of this identity; NULL: none */
    const struct member *holder; /* another identity's row with this address; NULL: none */
    uint32_t member_count;       /* without self and holder */
    uint64_t directory_size;     /* sum of members_entry_size, without self and holder */
    const struct assign_range
        *peers; /* what others of this model hold; only when asked to choose */
    size_t peer_count;
};

/* Every field against its rule. Errors: ODSI_ERR_INVALID with the field and the rule. */
ODSI_MUST_USE enum odsi_err members_check_wish(const struct members_wish *wish);
ODSI_MUST_USE enum odsi_err members_check_beat(const struct members_beat *beat);
/* The same for a row that came from a file. Errors: ODSI_ERR_CORRUPT. */
ODSI_MUST_USE enum odsi_err members_check_row(const struct member *row);

/* Whether the coordinator is asked to choose the layers. */
int members_wants_choice(const struct members_wish *wish);
/* Whether two descriptions mean the same model, so that their holders can serve one session. */
int members_same_model(const struct members_model *a, const struct members_model *b);

int members_same_capability(const struct members_capability *a, const struct members_capability *b);

/* Decides a join whose wish is checked: fills out with the row to write (holder's row, if any, is
 * to be deleted first). Asked to choose, it leaves a member that comes back with the same model and
 * room the layers it had.
 * Errors: ODSI_ERR_EXISTS (the address is somebody's), ODSI_ERR_BUSY (the directory is full),
 * ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err members_join(struct member *out, const struct members_wish *wish,
                                         const struct members_facts *facts, uint32_t heartbeat_ms,
                                         uint64_t now_us);
/* Applies a checked heartbeat to row. Returns whether the directory changed (not only load). */
int members_hear(struct member *row, const struct members_beat *beat, uint64_t now_us);

/* Silence after which a member is overdue (another may have its address) and gone. */
uint64_t members_overdue_us(uint32_t heartbeat_ms);
uint64_t members_expiry_us(uint32_t heartbeat_ms);
/* Microseconds since row was heard; 0 when its time lies in the future. */
uint64_t members_silence_us(const struct member *row, uint64_t now_us);
/* Whether row is gone for an instance that has listened since since_us. */
int members_is_expired(const struct member *row, uint64_t since_us, uint64_t now_us);

/* The most bytes that row can take in a Directory message, whatever its heartbeats say. */
uint32_t members_entry_size(const struct member *row);

/* Since when an instance can vouch for silence: nobody is gone only because the coordinator was
 * down, stopped, or had its clock set. */
struct members_listener {
    uint64_t period_us; /* of calls of members_listen */
    uint64_t last_us;
    uint64_t since_us;
};
void members_listener_init(struct members_listener *self, uint64_t period_us, uint64_t now_us);
/* Called every period_us; returns since_us, which moves to now_us after a gap in the calls or a
 * jump of the clock. */
uint64_t members_listen(struct members_listener *self, uint64_t now_us);
#endif
