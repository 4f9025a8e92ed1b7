/* Durability: WAL with synchronous=NORMAL. The file is never corrupt after a crash; a power failure
 * may take back the last transactions, because only checkpoints wait for the disk and so the loop's
 * thread hardly ever does. Members heal by themselves (a heartbeat that is not known leads to a new
 * join); the directory's version would not, so every open moves it on by VERSION_GAP, which is more
 * changes than a write-ahead log between two checkpoints can hold.
 *
 * Writers take the lock first (BEGIN IMMEDIATE), so that what a transaction has read still holds
 * when it writes. */
#include "coordinator/store_sqlite.h"

#include "common/base/alloc.h"
#include "common/base/log.h"

#include <sqlite3.h>
#include <string.h>

#define APPLICATION_ID 0x4f445349 /* "ODSI"; a file of another program is left alone */
#define VERSION_GAP    1048576

enum statement {
    BEGIN_READ,
    BEGIN_WRITE,
    COMMIT,
    ROLLBACK,
    GET_VERSION,
    BUMP_VERSION,
    GET_MEMBER,
    GET_HOLDER,
    COUNT_OTHERS,
    GET_RANGES,
    PUT_MEMBER,
    PUT_BEAT,
    PUT_LOAD,
    DELETE_MEMBER,
    CLAMP_TIMES,
    DELETE_EXPIRED,
    LIST_MEMBERS,
    STATEMENT_COUNT
};

#define MEMBER_COLUMNS                                                                             \
    "worker_id, address, model_id, model_name, layer_count, context_length, numerics_version, "    \
    "layer_first, layer_end, memory_size, kv_token_capacity, prefill_tokens_per_s, "               \
    "decode_tokens_per_s, backend, thread_count, session_count, queued_step_count, "               \
    "kv_tokens_free, ready, heartbeat_ms, heard_at_us"

static const char *const statement_sql[STATEMENT_COUNT] = {
    [BEGIN_READ] = "BEGIN",
    [BEGIN_WRITE] = "BEGIN IMMEDIATE",
    [COMMIT] = "COMMIT",
    [ROLLBACK] = "ROLLBACK",
    [GET_VERSION] = "SELECT version FROM directory",
    [BUMP_VERSION] = "UPDATE directory SET version = version + 1",
    [GET_MEMBER] = "SELECT " MEMBER_COLUMNS " FROM member WHERE worker_id = ?1",
    [GET_HOLDER] = "SELECT " MEMBER_COLUMNS " FROM member WHERE address = ?1 AND worker_id <> ?2",
    [COUNT_OTHERS] = "SELECT count(*), total(entry_size) FROM member",
    [GET_RANGES] = "SELECT layer_first, layer_end, decode_tokens_per_s FROM member "
                   "WHERE model_id = ?1 AND layer_count = ?2 AND numerics_version = ?3 "
                   "AND worker_id NOT IN (?4, ?5) ORDER BY worker_id",
    [PUT_MEMBER] = "INSERT OR REPLACE INTO member (" MEMBER_COLUMNS ", entry_size) VALUES "
                   "(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, "
                   "?18, ?19, ?20, ?21, ?22)",
    [PUT_BEAT] = "UPDATE member SET memory_size = ?10, kv_token_capacity = ?11, "
                 "prefill_tokens_per_s = ?12, decode_tokens_per_s = ?13, backend = ?14, "
                 "thread_count = ?15, session_count = ?16, queued_step_count = ?17, "
                 "kv_tokens_free = ?18, ready = ?19, heard_at_us = ?21 WHERE worker_id = ?1",
    /* The same but for what indexes hold: most heartbeats. */
    [PUT_LOAD] = "UPDATE member SET session_count = ?16, queued_step_count = ?17, "
                 "kv_tokens_free = ?18, ready = ?19, heard_at_us = ?21 WHERE worker_id = ?1",
    [DELETE_MEMBER] = "DELETE FROM member WHERE worker_id = ?1",
    [CLAMP_TIMES] = "UPDATE member SET heard_at_us = ?1 WHERE heard_at_us > ?1",
    [DELETE_EXPIRED] = "DELETE FROM member WHERE max(heard_at_us, ?2) + heartbeat_ms * ?3 < ?1",
    [LIST_MEMBERS] = "SELECT " MEMBER_COLUMNS " FROM member ORDER BY worker_id",
};

/* What brings a file from version i to version i + 1 of the schema. Never edited once released. */
static const char *const migrations[] = {
    "CREATE TABLE directory ("
    "  only INTEGER PRIMARY KEY CHECK (only = 1),"
    "  version INTEGER NOT NULL);"
    "INSERT INTO directory VALUES (1, 0);"
    "CREATE TABLE member ("
    "  worker_id BLOB PRIMARY KEY NOT NULL,"
    "  address TEXT NOT NULL UNIQUE,"
    "  model_id BLOB NOT NULL,"
    "  model_name TEXT NOT NULL,"
    "  layer_count INTEGER NOT NULL,"
    "  context_length INTEGER NOT NULL,"
    "  numerics_version INTEGER NOT NULL,"
    "  layer_first INTEGER NOT NULL,"
    "  layer_end INTEGER NOT NULL,"
    "  memory_size INTEGER NOT NULL,"
    "  kv_token_capacity INTEGER NOT NULL,"
    "  prefill_tokens_per_s REAL NOT NULL,"
    "  decode_tokens_per_s REAL NOT NULL,"
    "  backend TEXT NOT NULL,"
    "  thread_count INTEGER NOT NULL,"
    "  session_count INTEGER NOT NULL,"
    "  queued_step_count INTEGER NOT NULL,"
    "  kv_tokens_free INTEGER NOT NULL,"
    "  ready INTEGER NOT NULL,"
    "  heartbeat_ms INTEGER NOT NULL,"
    "  heard_at_us INTEGER NOT NULL,"
    "  entry_size INTEGER NOT NULL) WITHOUT ROWID;"
    "CREATE INDEX member_model ON member (model_id, layer_count, numerics_version, worker_id,"
    "  layer_first, layer_end, decode_tokens_per_s);" /* covers GET_RANGES */
    "CREATE INDEX member_entry_size ON member (entry_size);",
};
#define SCHEMA_VERSION ((int)(sizeof migrations / sizeof *migrations))

struct sqlite_store {
    struct store base;
    sqlite3 *db;
    sqlite3_stmt *statements[STATEMENT_COUNT];
};

static const struct store_kind sqlite_kind;

/* ---- errors and single statements ------------------------------------------------------------ */

/* Our error for SQLite's last one on this connection. */
static enum odsi_err sqlite_error(sqlite3 *db, const char *doing)
{
    const int code = sqlite3_errcode(db) & 0xff;
    const char *text = sqlite3_errmsg(db);
    switch (code) {
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
        return odsi_fail(ODSI_ERR_BUSY, "store: %s: another process holds it for too long", doing);
    case SQLITE_NOMEM:
        return odsi_fail(ODSI_ERR_NO_MEMORY, "store: %s: no memory", doing);
    case SQLITE_FULL:
        return odsi_fail(ODSI_ERR_IO, "store: %s: no room left on its disk; free some", doing);
    case SQLITE_CORRUPT:
    case SQLITE_NOTADB:
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "store: %s: %s; move the file away, members join again by themselves",
                         doing, text);
    case SQLITE_READONLY:
        return odsi_fail(ODSI_ERR_IO, "store: %s: it may not be written; check its permissions",
                         doing);
    case SQLITE_CANTOPEN:
        return odsi_fail(ODSI_ERR_NOT_FOUND, "store: %s: %s; check the path and its permissions",
                         doing, text);
    case SQLITE_PERM:
    case SQLITE_AUTH:
    case SQLITE_IOERR:
        return odsi_fail(ODSI_ERR_IO, "store: %s: %s", doing, text);
    default:
        return odsi_fail(ODSI_ERR_INTERNAL, "store: %s: %s (SQLite error %d)", doing, text, code);
    }
}

/* Ends the use of a statement; what it was bound to is let go. */
static void finish(sqlite3_stmt *statement)
{
    (void)sqlite3_reset(statement); /* repeats the error of the step, told already */
    (void)sqlite3_clear_bindings(statement);
}

/* Runs a statement that returns no rows and whose parameters are bound. */
static enum odsi_err execute(struct sqlite_store *self, enum statement which, const char *doing)
{
    sqlite3_stmt *statement = self->statements[which];
    const int code = sqlite3_step(statement);
    const enum odsi_err err =
        code == SQLITE_DONE || code == SQLITE_ROW ? ODSI_OK : sqlite_error(self->db, doing);
    finish(statement);
    return err;
}

/* Steps to the next row: *out_found is 0 at the end. */
static enum odsi_err next_row(struct sqlite_store *self, sqlite3_stmt *statement, int *out_found)
{
    const int code = sqlite3_step(statement);
    *out_found = code == SQLITE_ROW;
    return code == SQLITE_ROW || code == SQLITE_DONE ? ODSI_OK : sqlite_error(self->db, "reading");
}

/* COMMIT when err is ODSI_OK, else ROLLBACK; returns what the whole transaction came to. */
static enum odsi_err end(struct sqlite_store *self, enum odsi_err err)
{
    if (err == ODSI_OK)
        err = execute(self, COMMIT, "committing");
    if (err != ODSI_OK && !sqlite3_get_autocommit(self->db)) {
        /* SQLite has rolled back by itself after some errors; else this cannot be put off. */
        sqlite3_stmt *rollback = self->statements[ROLLBACK];
        (void)sqlite3_step(rollback);
        (void)sqlite3_reset(rollback);
    }
    return err;
}

/* A bind fails only for memory or an index that is our own mistake, and shows in the step. */
static void bind_id(sqlite3_stmt *statement, int index, const struct digest *id)
{
    (void)sqlite3_bind_blob(statement, index, id->bytes, DIGEST_SIZE, SQLITE_STATIC);
}

static void bind_u64(sqlite3_stmt *statement, int index, uint64_t value)
{
    (void)sqlite3_bind_int64(statement, index, (sqlite3_int64)value);
}

static void bind_text(sqlite3_stmt *statement, int index, const char *text)
{
    (void)sqlite3_bind_text(statement, index, text, -1, SQLITE_STATIC);
}

/* ---- rows ------------------------------------------------------------------------------------ */

/* Reads columns in order and remembers whether any had a value that does not fit. */
struct reader {
    sqlite3_stmt *statement;
    int column;
    int bad;
};

static void read_id(struct reader *self, struct digest *out)
{
    const int column = self->column++;
    const void *data = sqlite3_column_blob(self->statement, column);
    if (data && sqlite3_column_bytes(self->statement, column) == (int)DIGEST_SIZE)
        memcpy(out->bytes, data, DIGEST_SIZE);
    else
        self->bad = 1;
}

/* out has size bytes and is zeroed. */
static void read_text(struct reader *self, char *out, size_t size)
{
    const int column = self->column++;
    const unsigned char *text = sqlite3_column_text(self->statement, column);
    const size_t text_size = (size_t)sqlite3_column_bytes(self->statement, column);
    if (text && text_size < size)
        memcpy(out, text, text_size);
    else
        self->bad = 1;
}

static uint64_t read_u64(struct reader *self)
{
    const sqlite3_int64 value = sqlite3_column_int64(self->statement, self->column++);
    if (value < 0)
        self->bad = 1;
    return (uint64_t)value;
}

static uint32_t read_u32(struct reader *self)
{
    const uint64_t value = read_u64(self);
    if (value > UINT32_MAX)
        self->bad = 1;
    return (uint32_t)value;
}

static float read_f32(struct reader *self)
{
    return (float)sqlite3_column_double(self->statement, self->column++);
}

/* The current row of a statement that selects MEMBER_COLUMNS. The file is not trusted. */
static enum odsi_err read_member(sqlite3_stmt *statement, struct member *out)
{
    struct reader reader = {.statement = statement};
    memset(out, 0, sizeof *out);
    read_id(&reader, &out->worker_id);
    read_text(&reader, out->address, sizeof out->address);
    read_id(&reader, &out->model.id);
    read_text(&reader, out->model.name, sizeof out->model.name);
    out->model.layer_count = read_u32(&reader);
    out->model.context_length = read_u32(&reader);
    out->model.numerics_version = read_u32(&reader);
    out->layer_first = read_u32(&reader);
    out->layer_end = read_u32(&reader);
    out->capability.memory_size = read_u64(&reader);
    out->capability.kv_token_capacity = read_u64(&reader);
    out->capability.prefill_tokens_per_s = read_f32(&reader);
    out->capability.decode_tokens_per_s = read_f32(&reader);
    read_text(&reader, out->capability.backend, sizeof out->capability.backend);
    out->capability.thread_count = read_u32(&reader);
    out->load.session_count = read_u32(&reader);
    out->load.queued_step_count = read_u32(&reader);
    out->load.kv_tokens_free = read_u64(&reader);
    out->ready = read_u32(&reader) != 0;
    out->heartbeat_ms = read_u32(&reader);
    out->heard_at_us = read_u64(&reader);
    if (reader.bad)
        return odsi_fail(ODSI_ERR_CORRUPT, "store: a member's row does not hold a member; move the "
                                           "file away, members join again by themselves");
    return members_check_row(out);
}

/* Parameters ?1 to ?21 of PUT_MEMBER, some of which PUT_BEAT and PUT_LOAD use. */
static void bind_member(sqlite3_stmt *statement, const struct member *row)
{
    bind_id(statement, 1, &row->worker_id);
    bind_text(statement, 2, row->address);
    bind_id(statement, 3, &row->model.id);
    bind_text(statement, 4, row->model.name);
    bind_u64(statement, 5, row->model.layer_count);
    bind_u64(statement, 6, row->model.context_length);
    bind_u64(statement, 7, row->model.numerics_version);
    bind_u64(statement, 8, row->layer_first);
    bind_u64(statement, 9, row->layer_end);
    bind_u64(statement, 10, row->capability.memory_size);
    bind_u64(statement, 11, row->capability.kv_token_capacity);
    (void)sqlite3_bind_double(statement, 12, (double)row->capability.prefill_tokens_per_s);
    (void)sqlite3_bind_double(statement, 13, (double)row->capability.decode_tokens_per_s);
    bind_text(statement, 14, row->capability.backend);
    bind_u64(statement, 15, row->capability.thread_count);
    bind_u64(statement, 16, row->load.session_count);
    bind_u64(statement, 17, row->load.queued_step_count);
    bind_u64(statement, 18, row->load.kv_tokens_free);
    bind_u64(statement, 19, row->ready != 0);
    bind_u64(statement, 20, row->heartbeat_ms);
    bind_u64(statement, 21, row->heard_at_us);
}

/* The one row of a bound statement that selects MEMBER_COLUMNS. */
static enum odsi_err get_member(struct sqlite_store *self, enum statement which, struct member *out,
                                int *out_found)
{
    sqlite3_stmt *statement = self->statements[which];
    enum odsi_err err = next_row(self, statement, out_found);
    if (err == ODSI_OK && *out_found)
        err = read_member(statement, out);
    finish(statement);
    return err;
}

static enum odsi_err put_member(struct sqlite_store *self, const struct member *row)
{
    sqlite3_stmt *statement = self->statements[PUT_MEMBER];
    bind_member(statement, row);
    bind_u64(statement, 22, members_entry_size(row));
    return execute(self, PUT_MEMBER, "writing a member");
}

static enum odsi_err delete_member(struct sqlite_store *self, const struct digest *worker_id)
{
    bind_id(self->statements[DELETE_MEMBER], 1, worker_id);
    return execute(self, DELETE_MEMBER, "removing a member");
}

/* ---- joining --------------------------------------------------------------------------------- */

/* All that a join looks at, and the memory it lies in. */
struct join {
    struct member self;
    struct member holder;
    struct members_facts facts;
    struct assign_range *ranges;
    size_t range_capacity;
};

static enum odsi_err find_rows(struct sqlite_store *self, struct join *join,
                               const struct members_wish *wish)
{
    int found = 0;
    bind_id(self->statements[GET_MEMBER], 1, &wish->worker_id);
    enum odsi_err err = get_member(self, GET_MEMBER, &join->self, &found);
    if (err != ODSI_OK)
        return err;
    join->facts.self = found ? &join->self : NULL;
    bind_text(self->statements[GET_HOLDER], 1, wish->address);
    bind_id(self->statements[GET_HOLDER], 2, &wish->worker_id);
    err = get_member(self, GET_HOLDER, &join->holder, &found);
    join->facts.holder = found ? &join->holder : NULL;
    return err;
}

static enum odsi_err count_others(struct sqlite_store *self, struct members_facts *facts)
{
    sqlite3_stmt *statement = self->statements[COUNT_OTHERS];
    int found = 0;
    const enum odsi_err err = next_row(self, statement, &found);
    if (err == ODSI_OK && found) {
        facts->member_count = (uint32_t)sqlite3_column_int64(statement, 0);
        facts->directory_size = (uint64_t)sqlite3_column_int64(statement, 1);
        const struct member *gone[] = {facts->self, facts->holder};
        for (size_t i = 0; i < 2; i++) {
            if (gone[i] && facts->member_count > 0) {
                facts->member_count--;
                facts->directory_size -= members_entry_size(gone[i]);
            }
        }
    }
    finish(statement);
    return err;
}

static enum odsi_err add_range(struct join *join, sqlite3_stmt *statement)
{
    if (join->facts.peer_count == join->range_capacity) {
        const size_t capacity = join->range_capacity ? 2 * join->range_capacity : 64;
        const enum odsi_err err = alloc_resize(&join->ranges, capacity, sizeof *join->ranges);
        if (err != ODSI_OK)
            return err;
        join->range_capacity = capacity;
    }
    struct reader reader = {.statement = statement};
    struct assign_range *range = &join->ranges[join->facts.peer_count];
    range->first = read_u32(&reader);
    range->end = read_u32(&reader);
    range->speed = read_f32(&reader);
    if (reader.bad)
        return odsi_fail(ODSI_ERR_CORRUPT, "store: a member's layers are not numbers");
    join->facts.peer_count++;
    return ODSI_OK;
}

static enum odsi_err find_ranges(struct sqlite_store *self, struct join *join,
                                 const struct members_wish *wish)
{
    sqlite3_stmt *statement = self->statements[GET_RANGES];
    const struct member *holder = join->facts.holder;
    int found = 0;
    enum odsi_err err;
    bind_id(statement, 1, &wish->model.id);
    bind_u64(statement, 2, wish->model.layer_count);
    bind_u64(statement, 3, wish->model.numerics_version);
    bind_id(statement, 4, &wish->worker_id);
    bind_id(statement, 5, holder ? &holder->worker_id : &wish->worker_id);
    while ((err = next_row(self, statement, &found)) == ODSI_OK && found) {
        err = add_range(join, statement);
        if (err != ODSI_OK)
            break;
    }
    finish(statement);
    join->facts.peers = join->ranges;
    return err;
}

static enum odsi_err join_inside(struct sqlite_store *self, const struct members_wish *wish,
                                 uint32_t heartbeat_ms, uint64_t now_us, struct member *out)
{
    struct join join;
    memset(&join, 0, sizeof join);
    enum odsi_err err = find_rows(self, &join, wish);
    if (err == ODSI_OK)
        err = count_others(self, &join.facts);
    if (err == ODSI_OK && members_wants_choice(wish))
        err = find_ranges(self, &join, wish);
    if (err == ODSI_OK)
        err = members_join(out, wish, &join.facts, heartbeat_ms, now_us);
    alloc_free(join.ranges);
    if (err == ODSI_OK && join.facts.holder)
        err = delete_member(self, &join.holder.worker_id);
    if (err == ODSI_OK)
        err = put_member(self, out);
    if (err == ODSI_OK)
        err = execute(self, BUMP_VERSION, "writing the version");
    return err;
}

static enum odsi_err sqlite_join(struct store *store, const struct members_wish *wish,
                                 uint32_t heartbeat_ms, uint64_t now_us, struct member *out)
{
    struct sqlite_store *self = (struct sqlite_store *)store;
    enum odsi_err err = execute(self, BEGIN_WRITE, "joining");
    if (err == ODSI_OK)
        err = end(self, join_inside(self, wish, heartbeat_ms, now_us, out));
    return err;
}

/* ---- the other transactions ------------------------------------------------------------------ */

static enum odsi_err heartbeat_inside(struct sqlite_store *self, const struct digest *worker_id,
                                      const struct members_beat *beat, uint64_t now_us,
                                      int *out_known)
{
    struct member row;
    bind_id(self->statements[GET_MEMBER], 1, worker_id);
    enum odsi_err err = get_member(self, GET_MEMBER, &row, out_known);
    if (err != ODSI_OK || !*out_known)
        return err;
    const struct members_capability before = row.capability;
    const int changed = members_hear(&row, beat, now_us);
    const enum statement put =
        members_same_capability(&before, &row.capability) ? PUT_LOAD : PUT_BEAT;
    bind_member(self->statements[put], &row);
    err = execute(self, put, "writing a heartbeat");
    if (err == ODSI_OK && changed)
        err = execute(self, BUMP_VERSION, "writing the version");
    return err;
}

static enum odsi_err sqlite_heartbeat(struct store *store, const struct digest *worker_id,
                                      const struct members_beat *beat, uint64_t now_us,
                                      int *out_known)
{
    struct sqlite_store *self = (struct sqlite_store *)store;
    *out_known = 0;
    enum odsi_err err = execute(self, BEGIN_WRITE, "taking a heartbeat");
    if (err == ODSI_OK)
        err = end(self, heartbeat_inside(self, worker_id, beat, now_us, out_known));
    return err;
}

static enum odsi_err sqlite_leave(struct store *store, const struct digest *worker_id,
                                  int *out_known)
{
    struct sqlite_store *self = (struct sqlite_store *)store;
    *out_known = 0;
    enum odsi_err err = execute(self, BEGIN_WRITE, "leaving");
    if (err != ODSI_OK)
        return err;
    err = delete_member(self, worker_id);
    *out_known = err == ODSI_OK && sqlite3_changes(self->db) > 0;
    if (*out_known)
        err = execute(self, BUMP_VERSION, "writing the version");
    return end(self, err);
}

static enum odsi_err expire_inside(struct sqlite_store *self, uint64_t since_us, uint64_t now_us,
                                   uint32_t *out_removed)
{
    sqlite3_stmt *statement = self->statements[DELETE_EXPIRED];
    bind_u64(self->statements[CLAMP_TIMES], 1, now_us);
    enum odsi_err err = execute(self, CLAMP_TIMES, "setting times right");
    if (err != ODSI_OK)
        return err;
    bind_u64(statement, 1, now_us);
    bind_u64(statement, 2, since_us);
    bind_u64(statement, 3, members_expiry_us(1)); /* per millisecond of a heartbeat */
    err = execute(self, DELETE_EXPIRED, "removing silent members");
    if (err != ODSI_OK)
        return err;
    *out_removed = (uint32_t)sqlite3_changes(self->db);
    return *out_removed > 0 ? execute(self, BUMP_VERSION, "writing the version") : ODSI_OK;
}

static enum odsi_err sqlite_expire(struct store *store, uint64_t since_us, uint64_t now_us,
                                   uint32_t *out_removed)
{
    struct sqlite_store *self = (struct sqlite_store *)store;
    *out_removed = 0;
    enum odsi_err err = execute(self, BEGIN_WRITE, "removing silent members");
    if (err == ODSI_OK)
        err = end(self, expire_inside(self, since_us, now_us, out_removed));
    if (err != ODSI_OK)
        *out_removed = 0;
    return err;
}

static enum odsi_err sqlite_version(struct store *store, uint64_t *out_version)
{
    struct sqlite_store *self = (struct sqlite_store *)store;
    sqlite3_stmt *statement = self->statements[GET_VERSION];
    int found = 0;
    *out_version = 0;
    enum odsi_err err = next_row(self, statement, &found);
    if (err == ODSI_OK && !found)
        err = odsi_fail(ODSI_ERR_CORRUPT, "store: the directory's version is missing; move the "
                                          "file away, members join again by themselves");
    if (err == ODSI_OK)
        *out_version = (uint64_t)sqlite3_column_int64(statement, 0);
    finish(statement);
    return err;
}

static enum odsi_err read_inside(struct sqlite_store *self, uint64_t *out_version,
                                 enum odsi_err (*visit)(void *context, const struct member *row),
                                 void *context)
{
    sqlite3_stmt *statement = self->statements[LIST_MEMBERS];
    struct member row;
    int found = 0;
    enum odsi_err err = sqlite_version(&self->base, out_version);
    while (err == ODSI_OK && (err = next_row(self, statement, &found)) == ODSI_OK && found) {
        err = read_member(statement, &row);
        if (err == ODSI_OK)
            err = visit(context, &row);
    }
    finish(statement);
    return err;
}

static enum odsi_err sqlite_read(struct store *store, uint64_t *out_version,
                                 enum odsi_err (*visit)(void *context, const struct member *row),
                                 void *context)
{
    struct sqlite_store *self = (struct sqlite_store *)store;
    enum odsi_err err = execute(self, BEGIN_READ, "reading");
    if (err == ODSI_OK)
        err = end(self, read_inside(self, out_version, visit, context));
    return err;
}

/* ---- opening --------------------------------------------------------------------------------- */

static enum odsi_err run_sql(sqlite3 *db, const char *sql, const char *doing)
{
    return sqlite3_exec(db, sql, NULL, NULL, NULL) == SQLITE_OK ? ODSI_OK : sqlite_error(db, doing);
}

/* The first column of the first row as a number. */
static enum odsi_err query_number(sqlite3 *db, const char *sql, int64_t *out)
{
    sqlite3_stmt *statement = NULL;
    enum odsi_err err = ODSI_OK;
    *out = 0;
    if (sqlite3_prepare_v2(db, sql, -1, &statement, NULL) != SQLITE_OK ||
        sqlite3_step(statement) != SQLITE_ROW)
        err = sqlite_error(db, "opening");
    else
        *out = sqlite3_column_int64(statement, 0);
    (void)sqlite3_finalize(statement);
    return err;
}

/* Ours, or empty. */
static enum odsi_err check_owner(sqlite3 *db)
{
    int64_t id = 0;
    int64_t table_count = 0;
    /* In this order: another instance may make both, in one transaction, between the two. */
    enum odsi_err err = query_number(db, "SELECT count(*) FROM sqlite_schema", &table_count);
    if (err == ODSI_OK)
        err = query_number(db, "PRAGMA application_id", &id);
    if (err == ODSI_OK && id != APPLICATION_ID && table_count > 0)
        err = odsi_fail(ODSI_ERR_CORRUPT,
                        "store: this SQLite file belongs to another program; name a new one");
    return err;
}

static enum odsi_err check_pages(sqlite3 *db)
{
    sqlite3_stmt *statement = NULL;
    enum odsi_err err = ODSI_OK;
    if (sqlite3_prepare_v2(db, "PRAGMA quick_check(1)", -1, &statement, NULL) != SQLITE_OK ||
        sqlite3_step(statement) != SQLITE_ROW) {
        err = sqlite_error(db, "checking the file");
    } else {
        const char *verdict = (const char *)sqlite3_column_text(statement, 0);
        if (!verdict || strcmp(verdict, "ok") != 0)
            err = odsi_fail(ODSI_ERR_CORRUPT,
                            "store: the file is damaged (%s); move it away, members join again by "
                            "themselves",
                            verdict ? verdict : "unreadable");
    }
    (void)sqlite3_finalize(statement);
    return err;
}

/* Inside a write transaction, so that of several instances that start together one does it. */
static enum odsi_err migrate_inside(sqlite3 *db)
{
    int64_t version = 0;
    char *sql = NULL;
    enum odsi_err err = check_owner(db);
    if (err == ODSI_OK)
        err = run_sql(db,
                      "CREATE TABLE IF NOT EXISTS schema (version INTEGER NOT NULL);"
                      "INSERT INTO schema SELECT 0 WHERE NOT EXISTS (SELECT * FROM schema)",
                      "making tables");
    if (err == ODSI_OK)
        err = query_number(db, "SELECT max(version) FROM schema", &version);
    if (err == ODSI_OK && (version < 0 || version > SCHEMA_VERSION))
        err = odsi_fail(ODSI_ERR_UNSUPPORTED,
                        "store: the file has schema %lld, this build knows %d; use a newer build",
                        (long long)version, SCHEMA_VERSION);
    for (; err == ODSI_OK && version < SCHEMA_VERSION; version++)
        err = run_sql(db, migrations[version], "making tables");
    if (err != ODSI_OK)
        return err;
    sql = sqlite3_mprintf("UPDATE schema SET version = %d; PRAGMA application_id = %d;"
                          "UPDATE directory SET version = version + %d",
                          SCHEMA_VERSION, APPLICATION_ID, VERSION_GAP);
    err = sql ? run_sql(db, sql, "writing the schema's version")
              : odsi_fail(ODSI_ERR_NO_MEMORY, "store: no memory");
    sqlite3_free(sql);
    return err;
}

static enum odsi_err migrate(sqlite3 *db)
{
    enum odsi_err err = run_sql(db, "BEGIN IMMEDIATE", "opening");
    if (err != ODSI_OK)
        return err;
    err = migrate_inside(db);
    if (err == ODSI_OK)
        err = run_sql(db, "COMMIT", "opening");
    if (err != ODSI_OK && !sqlite3_get_autocommit(db))
        (void)sqlite3_exec(db, "ROLLBACK", NULL, NULL, NULL);
    return err;
}

/* Of several instances that open a new file at once, one turns it into a write-ahead log, and
 * SQLite tells the others "busy" without waiting (two upgrades of a lock could wait for ever). */
static enum odsi_err use_write_ahead_log(sqlite3 *db)
{
    const int step_ms = 5;
    for (int waited_ms = 0;; waited_ms += step_ms) {
        const enum odsi_err err = run_sql(db, "PRAGMA journal_mode = WAL", "opening");
        if (err != ODSI_ERR_BUSY || waited_ms >= (int)STORE_BUSY_MS)
            return err;
        (void)sqlite3_sleep(step_ms);
    }
}

static enum odsi_err configure(sqlite3 *db, uint32_t page_count_max)
{
    (void)sqlite3_extended_result_codes(db, 1);
    (void)sqlite3_busy_timeout(db, (int)STORE_BUSY_MS);
    if (sqlite3_db_readonly(db, "main") == 1)
        return odsi_fail(ODSI_ERR_IO, "store: it may not be written; check its permissions");
    enum odsi_err err = check_owner(db); /* before anything is changed in it */
    if (err == ODSI_OK)
        err = use_write_ahead_log(db);
    /* trusted_schema: functions in a file's schema are not ours to run. */
    if (err == ODSI_OK)
        err = run_sql(db,
                      "PRAGMA trusted_schema = OFF; PRAGMA cell_size_check = ON;"
                      "PRAGMA synchronous = NORMAL; PRAGMA journal_size_limit = 16777216",
                      "opening");
    if (err == ODSI_OK && page_count_max > 0) {
        char *sql = sqlite3_mprintf("PRAGMA max_page_count = %u", page_count_max);
        err = sql ? run_sql(db, sql, "opening") : odsi_fail(ODSI_ERR_NO_MEMORY, "store: no memory");
        sqlite3_free(sql);
    }
    return err;
}

static enum odsi_err prepare(struct sqlite_store *self)
{
    for (int i = 0; i < STATEMENT_COUNT; i++)
        if (sqlite3_prepare_v3(self->db, statement_sql[i], -1, SQLITE_PREPARE_PERSISTENT,
                               &self->statements[i], NULL) != SQLITE_OK)
            return sqlite_error(self->db, "preparing statements");
    return ODSI_OK;
}

static void sqlite_close(struct store *store)
{
    struct sqlite_store *self = (struct sqlite_store *)store;
    for (int i = 0; i < STATEMENT_COUNT; i++)
        (void)sqlite3_finalize(self->statements[i]);
    (void)sqlite3_close(self->db);
    alloc_free(self);
}

enum odsi_err store_sqlite_open(struct store **out, const char *path, uint32_t page_count_max)
{
    struct sqlite_store *self = NULL;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->base.kind = &sqlite_kind;
    const int flags = SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_NOMUTEX;
    if (sqlite3_open_v2(path, &self->db, flags, NULL) != SQLITE_OK) {
        err = self->db ? sqlite_error(self->db, "opening")
                       : odsi_fail(ODSI_ERR_NO_MEMORY, "store: no memory");
        goto fail;
    }
    err = configure(self->db, page_count_max);
    if (err != ODSI_OK)
        goto fail;
    err = check_pages(self->db);
    if (err != ODSI_OK)
        goto fail;
    err = migrate(self->db);
    if (err != ODSI_OK)
        goto fail;
    err = prepare(self);
    if (err != ODSI_OK)
        goto fail;
    *out = &self->base;
    return ODSI_OK;
fail:
    sqlite_close(&self->base);
    return odsi_fail_prefix(err, "%s", path);
}

static const struct store_kind sqlite_kind = {
    .close = sqlite_close,
    .join = sqlite_join,
    .heartbeat = sqlite_heartbeat,
    .leave = sqlite_leave,
    .expire = sqlite_expire,
    .version = sqlite_version,
    .read = sqlite_read,
};
