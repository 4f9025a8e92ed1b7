#include "coordinator/store.h"

#include "common/base/alloc.h"
#include "coordinator/store_sqlite.h"
#include "tests/support/process.h"
#include "tests/unit/coordinator/coordinator_fixture.h"

#include <criterion/criterion.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sqlite3.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#define HEARTBEAT_MS 1000u
#define SECOND_US    1000000u
#define LIST_MAX     64u

static char folder[PROCESS_PATH_SIZE];
static char path[PROCESS_PATH_SIZE];
static char url[PROCESS_PATH_SIZE + 8];

static void make_folder(void)
{
    cr_assert_eq(process_folder_make(folder), ODSI_OK);
    cr_assert_eq(process_path(path, folder, "odsi.db"), ODSI_OK);
    snprintf(url, sizeof url, "sqlite:%s", path);
}

static void remove_folder(void)
{
    process_folder_remove(folder);
}

TestSuite(store, .init = make_folder, .fini = remove_folder, .timeout = 60);

static struct store *opened(void)
{
    struct store *store = NULL;
    cr_assert_eq(store_open(&store, url), ODSI_OK, "%s", odsi_err_text());
    return store;
}

static struct member join(struct store *store, const struct members_wish *wish, uint64_t now_us)
{
    struct member row;
    cr_assert_eq(store_join(store, wish, HEARTBEAT_MS, now_us, &row), ODSI_OK, "%s",
                 odsi_err_text());
    return row;
}

static uint64_t version_of(struct store *store)
{
    uint64_t version = 0;
    cr_assert_eq(store_version(store, &version), ODSI_OK, "%s", odsi_err_text());
    return version;
}

struct list {
    struct member rows[LIST_MAX];
    uint32_t count;
    uint64_t version;
};

static enum odsi_err add_row(void *context, const struct member *row)
{
    struct list *list = context;
    cr_assert_lt(list->count, LIST_MAX);
    list->rows[list->count++] = *row;
    return ODSI_OK;
}

static void read_all(struct store *store, struct list *out)
{
    out->count = 0;
    cr_assert_eq(store_read(store, &out->version, add_row, out), ODSI_OK, "%s", odsi_err_text());
}

static uint32_t count_of(struct store *store)
{
    static struct list list;
    read_all(store, &list);
    return list.count;
}

/* A statement on a connection of our own, as a meddling operator would run it. */
static void meddle(const char *sql)
{
    sqlite3 *db = NULL;
    char *error = NULL;
    cr_assert_eq(sqlite3_open(path, &db), SQLITE_OK);
    cr_assert_eq(sqlite3_exec(db, sql, NULL, NULL, &error), SQLITE_OK, "%s", error);
    sqlite3_close(db);
}

/* ---- urls ---- */

Test(store, refuses_a_store_it_does_not_have_in_one_clear_line_without_the_password)
{
    struct store *store = NULL;
    cr_expect_eq(store_open(&store, "postgresql://odsi:secret@db/odsi"), ODSI_ERR_UNSUPPORTED);
    cr_expect(strstr(odsi_err_text(), "PostgreSQL"));
    cr_expect_not(strstr(odsi_err_text(), "secret"));
    cr_expect_eq(store_open(&store, "mysql:x"), ODSI_ERR_INVALID);
    cr_expect_eq(store_open(&store, "sqlite:"), ODSI_ERR_INVALID);
    cr_expect_eq(store_open(&store, ""), ODSI_ERR_INVALID);
    cr_expect_null(store);
    store_close(&store);
}

Test(store, names_a_folder_that_is_not_there)
{
    struct store *store = NULL;
    cr_expect_eq(store_open(&store, "sqlite:/nonexistent/odsi.db"), ODSI_ERR_NOT_FOUND);
    cr_expect(strstr(odsi_err_text(), "/nonexistent/odsi.db"), "%s", odsi_err_text());
}

Test(store, keeps_a_memory_store_to_itself)
{
    struct store *a = NULL;
    struct store *b = NULL;
    cr_assert_eq(store_open(&a, "sqlite::memory:"), ODSI_OK);
    cr_assert_eq(store_open(&b, "sqlite::memory:"), ODSI_OK);
    const struct members_wish wish = fixture_wish(1);
    join(a, &wish, FIXTURE_NOW_US);
    cr_expect_eq(count_of(a), 1);
    cr_expect_eq(count_of(b), 0);
    store_close(&a);
    store_close(&b);
}

/* ---- membership ---- */

Test(store, gives_back_every_field_of_a_member)
{
    struct store *store = opened();
    struct members_wish wish = fixture_wish(3);
    struct list list;
    int known = 0;
    wish.layer_first = 2;
    wish.capability.memory_size = (uint64_t)INT64_MAX;
    wish.capability.thread_count = UINT32_MAX;
    const struct member row = join(store, &wish, FIXTURE_NOW_US);
    read_all(store, &list);
    cr_assert_eq(list.count, 1);
    cr_expect_arr_eq(&list.rows[0], &row, sizeof row);
    const struct members_beat beat = {.ready = 1, .load = {1, 2, 3}};
    cr_assert_eq(store_heartbeat(store, &wish.worker_id, &beat, FIXTURE_NOW_US + 9, &known),
                 ODSI_OK);
    cr_expect_eq(known, 1);
    struct member expected = row;
    (void)members_hear(&expected, &beat, FIXTURE_NOW_US + 9);
    read_all(store, &list);
    cr_expect_arr_eq(&list.rows[0], &expected, sizeof expected);
    store_close(&store);
}

Test(store, counts_changes_of_the_directory_but_not_of_load)
{
    struct store *store = opened();
    const struct members_wish wish = fixture_wish(1);
    struct members_beat beat = {0};
    int known = 0;
    uint32_t removed = 0;
    uint64_t version = version_of(store);
    join(store, &wish, FIXTURE_NOW_US);
    cr_expect_eq(version_of(store), ++version, "a join");
    beat.load.session_count = 9;
    cr_assert_eq(store_heartbeat(store, &wish.worker_id, &beat, FIXTURE_NOW_US, &known), ODSI_OK);
    cr_expect_eq(version_of(store), version, "load");
    beat.ready = 1;
    cr_assert_eq(store_heartbeat(store, &wish.worker_id, &beat, FIXTURE_NOW_US, &known), ODSI_OK);
    cr_expect_eq(version_of(store), ++version, "readiness");
    cr_assert_eq(store_expire(store, 0, FIXTURE_NOW_US + SECOND_US, &removed), ODSI_OK);
    cr_expect_eq(removed, 0);
    cr_expect_eq(version_of(store), version, "nobody expired");
    cr_assert_eq(store_leave(store, &wish.worker_id, &known), ODSI_OK);
    cr_expect_eq(known, 1);
    cr_expect_eq(version_of(store), ++version, "a leave");
    cr_assert_eq(store_leave(store, &wish.worker_id, &known), ODSI_OK);
    cr_expect_eq(known, 0);
    cr_expect_eq(version_of(store), version, "a leave of nobody");
    store_close(&store);
}

Test(store, does_not_know_a_member_that_left)
{
    struct store *store = opened();
    const struct members_wish wish = fixture_wish(1);
    const struct members_beat beat = {.ready = 1};
    int known = 1;
    cr_assert_eq(store_heartbeat(store, &wish.worker_id, &beat, FIXTURE_NOW_US, &known), ODSI_OK);
    cr_expect_eq(known, 0);
    join(store, &wish, FIXTURE_NOW_US);
    cr_assert_eq(store_leave(store, &wish.worker_id, &known), ODSI_OK);
    cr_assert_eq(store_heartbeat(store, &wish.worker_id, &beat, FIXTURE_NOW_US, &known), ODSI_OK);
    cr_expect_eq(known, 0);
    cr_expect_eq(count_of(store), 0);
    store_close(&store);
}

Test(store, replaces_the_row_of_an_identity_that_joins_again)
{
    struct store *store = opened();
    struct members_wish wish = fixture_wish(1);
    struct list list;
    join(store, &wish, FIXTURE_NOW_US);
    snprintf(wish.address, sizeof wish.address, "elsewhere:7700");
    wish.layer_first = 6;
    join(store, &wish, FIXTURE_NOW_US + 1);
    read_all(store, &list);
    cr_assert_eq(list.count, 1);
    cr_expect_str_eq(list.rows[0].address, "elsewhere:7700");
    cr_expect_eq(list.rows[0].layer_first, 6);
    store_close(&store);
}

Test(store, lets_nobody_take_the_address_of_a_member_that_is_heard)
{
    struct store *store = opened();
    const struct members_wish first = fixture_wish(1);
    struct members_wish second = fixture_wish(2);
    struct member row;
    struct list list;
    memcpy(second.address, first.address, sizeof second.address);
    join(store, &first, FIXTURE_NOW_US);
    const uint64_t version = version_of(store);
    cr_expect_eq(store_join(store, &second, HEARTBEAT_MS, FIXTURE_NOW_US, &row), ODSI_ERR_EXISTS);
    cr_expect_eq(version_of(store), version);
    cr_expect_eq(count_of(store), 1);
    join(store, &second, FIXTURE_NOW_US + 2 * SECOND_US);
    read_all(store, &list);
    cr_assert_eq(list.count, 1);
    cr_expect(digest_equal(&list.rows[0].worker_id, &second.worker_id));
    store_close(&store);
}

Test(store, removes_only_who_missed_three_of_his_own_heartbeats)
{
    struct store *store = opened();
    const struct members_wish slow = fixture_wish(1);
    const struct members_wish fast = fixture_wish(2);
    struct member row;
    struct list list;
    uint32_t removed = 0;
    cr_assert_eq(store_join(store, &slow, 1000, FIXTURE_NOW_US, &row), ODSI_OK);
    cr_assert_eq(store_join(store, &fast, 100, FIXTURE_NOW_US, &row), ODSI_OK);
    cr_assert_eq(store_expire(store, 0, FIXTURE_NOW_US + 350000, &removed), ODSI_OK);
    cr_expect_eq(removed, 0);
    cr_assert_eq(store_expire(store, 0, FIXTURE_NOW_US + 350001, &removed), ODSI_OK);
    cr_expect_eq(removed, 1);
    read_all(store, &list);
    cr_assert_eq(list.count, 1);
    cr_expect(digest_equal(&list.rows[0].worker_id, &slow.worker_id));
    store_close(&store);
}

Test(store, forgets_times_that_a_clock_set_back_left_in_the_future)
{
    struct store *store = opened();
    const struct members_wish wish = fixture_wish(1);
    uint32_t removed = 0;
    join(store, &wish, FIXTURE_NOW_US + 3600 * (uint64_t)SECOND_US);
    cr_assert_eq(store_expire(store, 0, FIXTURE_NOW_US, &removed), ODSI_OK);
    cr_expect_eq(removed, 0);
    cr_assert_eq(store_expire(store, 0, FIXTURE_NOW_US + 4 * SECOND_US, &removed), ODSI_OK);
    cr_expect_eq(removed, 1);
    store_close(&store);
}

Test(store, chooses_layers_by_what_others_of_the_same_model_hold)
{
    struct store *store = opened();
    struct members_wish wish = fixture_wish_auto(1, 5);
    cr_expect_eq(join(store, &wish, FIXTURE_NOW_US).layer_first, 0);
    wish = fixture_wish_auto(2, 5);
    wish.model.id.bytes[0]++; /* another model begins anew */
    cr_expect_eq(join(store, &wish, FIXTURE_NOW_US).layer_first, 0);
    wish = fixture_wish_auto(3, 5);
    cr_expect_eq(join(store, &wish, FIXTURE_NOW_US).layer_first, 5);
    wish = fixture_wish_auto(4, 5);
    cr_expect_eq(join(store, &wish, FIXTURE_NOW_US).layer_first, 7);
    wish = fixture_wish_auto(1, 5); /* comes back and gets its own again */
    cr_expect_eq(join(store, &wish, FIXTURE_NOW_US).layer_first, 0);
    /* Takes the place of a silent member, whose layers do not count any more. */
    wish = fixture_wish_auto(5, 5);
    snprintf(wish.address, sizeof wish.address, "10.0.0.1:1003");
    cr_expect_eq(join(store, &wish, FIXTURE_NOW_US + 3 * SECOND_US).layer_first, 2);
    store_close(&store);
}

/* Goal: SQL and rules say the same, whatever happens in whatever order.
 * Method: random joins, heartbeats, leaves and expiries of a few identities and addresses, done to
 * the store and, with the pure rules, to an array; both compared after every step. */
struct model_swarm {
    struct member rows[16];
    int present[16];
};

static void model_join(struct model_swarm *swarm, const struct members_wish *wish, uint32_t who,
                       uint64_t now_us, enum odsi_err got)
{
    struct members_facts facts = {0};
    struct assign_range ranges[16];
    struct member row;
    int holder = -1;
    for (int i = 0; i < 16; i++)
        if (swarm->present[i] && i != (int)who && !strcmp(swarm->rows[i].address, wish->address))
            holder = i;
    for (int i = 0; i < 16; i++) {
        const struct member *other = &swarm->rows[i];
        if (!swarm->present[i] || i == (int)who || i == holder)
            continue;
        facts.member_count++;
        facts.directory_size += members_entry_size(other);
        ranges[facts.peer_count++] = (struct assign_range){other->layer_first, other->layer_end,
                                                           other->capability.decode_tokens_per_s};
    }
    facts.self = swarm->present[who] ? &swarm->rows[who] : NULL;
    facts.holder = holder >= 0 ? &swarm->rows[holder] : NULL;
    facts.peers = ranges;
    cr_assert_eq(members_join(&row, wish, &facts, HEARTBEAT_MS, now_us), got);
    if (got != ODSI_OK)
        return;
    if (holder >= 0)
        swarm->present[holder] = 0;
    swarm->rows[who] = row;
    swarm->present[who] = 1;
}

static void expect_same(struct store *store, const struct model_swarm *swarm, int step)
{
    struct list list;
    uint32_t at = 0;
    read_all(store, &list);
    for (int i = 0; i < 16; i++) {
        if (!swarm->present[i])
            continue;
        cr_assert_lt(at, list.count, "step %d", step);
        cr_assert_arr_eq(&list.rows[at], &swarm->rows[i], sizeof list.rows[at], "step %d", step);
        at++;
    }
    cr_assert_eq(at, list.count, "step %d", step);
}

static void model_step(struct store *store, struct model_swarm *swarm,
                       struct fixture_random *random, uint64_t now_us)
{
    const uint32_t who = fixture_below(random, 16);
    const struct digest id = fixture_id(who);
    struct members_wish wish = fixture_wish_auto(who, 1 + fixture_below(random, 12));
    struct members_beat beat = {.ready = (int)fixture_below(random, 2)};
    beat.load.session_count = fixture_below(random, 100);
    beat.has_capability = (int)fixture_below(random, 2);
    beat.capability = wish.capability;
    if (fixture_below(random, 2)) {
        beat.capability.decode_tokens_per_s = (float)fixture_below(random, 50);
        memset(beat.capability.backend, 0, sizeof beat.capability.backend);
        snprintf(beat.capability.backend, sizeof beat.capability.backend, "%u",
                 fixture_below(random, 100000));
    }
    struct member row;
    int known = 0;
    uint32_t removed = 0;
    switch (fixture_below(random, 8)) {
    case 0:
    case 1:
        memset(wish.address, 0, sizeof wish.address); /* rows are compared to the last byte */
        snprintf(wish.address, sizeof wish.address, "host:%u", 1 + fixture_below(random, 12));
        model_join(swarm, &wish, who, now_us, store_join(store, &wish, HEARTBEAT_MS, now_us, &row));
        break;
    case 2:
        cr_assert_eq(store_leave(store, &id, &known), ODSI_OK);
        cr_assert_eq(known, swarm->present[who]);
        swarm->present[who] = 0;
        break;
    case 3:
        cr_assert_eq(store_expire(store, 0, now_us, &removed), ODSI_OK);
        for (int i = 0; i < 16; i++) {
            if (swarm->present[i] && members_is_expired(&swarm->rows[i], 0, now_us)) {
                swarm->present[i] = 0;
                removed--;
            }
        }
        cr_assert_eq(removed, 0);
        break;
    default:
        cr_assert_eq(store_heartbeat(store, &id, &beat, now_us, &known), ODSI_OK);
        cr_assert_eq(known, swarm->present[who]);
        if (known)
            (void)members_hear(&swarm->rows[who], &beat, now_us);
    }
}

Test(store, does_what_the_rules_say_in_any_order_of_events)
{
    static struct model_swarm swarm;
    const uint64_t seed = 0xc0045eed;
    struct fixture_random random = {seed};
    struct store *store = NULL;
    uint64_t now_us = FIXTURE_NOW_US;
    cr_assert_eq(store_open(&store, "sqlite::memory:"), ODSI_OK);
    for (int step = 0; step < 4000; step++) {
        now_us += fixture_below(&random, 400000);
        model_step(store, &swarm, &random, now_us);
        expect_same(store, &swarm, step);
    }
    store_close(&store);
}

/* ---- several instances, restarts ---- */

Test(store, shows_every_instance_on_a_file_what_the_others_did)
{
    struct store *a = opened();
    struct store *b = opened();
    const struct members_wish first = fixture_wish(1);
    const struct members_wish second = fixture_wish(2);
    const struct members_beat beat = {0};
    int known = 0;
    const uint64_t version = version_of(a);
    join(a, &first, FIXTURE_NOW_US);
    join(b, &second, FIXTURE_NOW_US);
    cr_expect_eq(version_of(a), version + 2);
    cr_expect_eq(count_of(a), 2);
    cr_assert_eq(store_heartbeat(b, &first.worker_id, &beat, FIXTURE_NOW_US, &known), ODSI_OK);
    cr_expect_eq(known, 1);
    store_close(&a);
    cr_expect_eq(count_of(b), 2);
    store_close(&b);
}

Test(store, keeps_members_over_a_restart_and_its_version_never_goes_back)
{
    struct store *store = opened();
    const struct members_wish wish = fixture_wish(1);
    uint64_t version = 0;
    join(store, &wish, FIXTURE_NOW_US);
    for (int i = 0; i < 3; i++) {
        version = version_of(store);
        store_close(&store);
        store = opened();
        cr_expect_gt(version_of(store), version);
        cr_expect_eq(count_of(store), 1);
    }
    store_close(&store);
}

static void *open_and_join(void *context)
{
    uint32_t number = 0;
    struct store *store = NULL;
    memcpy(&number, context, sizeof number);
    const struct members_wish wish = fixture_wish(number);
    struct member row;
    enum odsi_err err = store_open(&store, url);
    if (err == ODSI_OK)
        err = store_join(store, &wish, HEARTBEAT_MS, FIXTURE_NOW_US, &row);
    if (err != ODSI_OK)
        fprintf(stderr, "instance %u: %s\n", number, odsi_err_text());
    store_close(&store);
    return err == ODSI_OK ? context : NULL;
}

/* Goal: instances that start at the same moment on a file that is not there yet make it once. */
Test(store, can_be_made_by_several_instances_at_once)
{
    for (int round = 0; round < 10; round++) {
        pthread_t threads[6];
        uint32_t numbers[6];
        for (uint32_t i = 0; i < 6; i++) {
            numbers[i] = i;
            cr_assert_eq(pthread_create(&threads[i], NULL, open_and_join, &numbers[i]), 0);
        }
        for (int i = 0; i < 6; i++) {
            void *ok = NULL;
            cr_assert_eq(pthread_join(threads[i], &ok), 0);
            cr_expect_not_null(ok, "instance %d in round %d", i, round);
        }
        struct store *store = opened();
        cr_expect_eq(count_of(store), 6);
        store_close(&store);
        process_folder_remove(folder);
        cr_assert_eq(mkdir(folder, 0700), 0);
    }
}

Test(store, waits_a_bounded_time_for_another_transaction_then_says_busy)
{
    struct store *store = opened();
    const struct members_wish wish = fixture_wish(1);
    struct member row;
    sqlite3 *db = NULL;
    cr_assert_eq(sqlite3_open(path, &db), SQLITE_OK);
    cr_assert_eq(sqlite3_exec(db, "BEGIN IMMEDIATE", NULL, NULL, NULL), SQLITE_OK);
    cr_expect_eq(store_join(store, &wish, HEARTBEAT_MS, FIXTURE_NOW_US, &row), ODSI_ERR_BUSY);
    cr_expect_eq(count_of(store), 0, "reading goes on meanwhile");
    cr_assert_eq(sqlite3_exec(db, "ROLLBACK", NULL, NULL, NULL), SQLITE_OK);
    join(store, &wish, FIXTURE_NOW_US);
    sqlite3_close(db);
    store_close(&store);
}

/* ---- bad files and full disks ---- */

static void write_file(const char *text, size_t size)
{
    const int file = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    cr_assert_geq(file, 0);
    cr_assert_eq(write(file, text, size), (ssize_t)size);
    close(file);
}

static void expect_refused(enum odsi_err expected)
{
    struct store *store = NULL;
    const enum odsi_err err = store_open(&store, url);
    cr_expect_eq(err, expected, "%s: %s", odsi_err_name(err), odsi_err_text());
    cr_expect_null(store);
    cr_expect(strstr(odsi_err_text(), path), "%s", odsi_err_text());
}

Test(store, refuses_a_file_that_is_no_database)
{
    char text[8192];
    memset(text, 'x', sizeof text);
    write_file(text, sizeof text);
    expect_refused(ODSI_ERR_CORRUPT);
}

Test(store, refuses_and_does_not_touch_the_database_of_another_program)
{
    meddle("CREATE TABLE theirs (x); INSERT INTO theirs VALUES (1)");
    struct stat status;
    cr_assert_eq(stat(path, &status), 0);
    const struct timespec changed = status.st_mtim;
    expect_refused(ODSI_ERR_CORRUPT);
    cr_assert_eq(stat(path, &status), 0);
    cr_expect(changed.tv_sec == status.st_mtim.tv_sec && changed.tv_nsec == status.st_mtim.tv_nsec);
}

Test(store, refuses_a_file_of_a_newer_build)
{
    struct store *store = opened();
    store_close(&store);
    meddle("UPDATE schema SET version = 99");
    expect_refused(ODSI_ERR_UNSUPPORTED);
}

/* Method: a good file with every page after the first one overwritten. */
Test(store, refuses_a_damaged_file)
{
    struct store *store = opened();
    const struct members_wish wish = fixture_wish(1);
    char noise[4096];
    join(store, &wish, FIXTURE_NOW_US);
    store_close(&store);
    memset(noise, 0x5a, sizeof noise);
    const int file = open(path, O_WRONLY);
    cr_assert_geq(file, 0);
    for (off_t at = 4096; at < lseek(file, 0, SEEK_END); at += 4096)
        cr_assert_eq(pwrite(file, noise, sizeof noise, at), (ssize_t)sizeof noise);
    close(file);
    expect_refused(ODSI_ERR_CORRUPT);
}

/* Goal: rows that somebody changed by hand end in an error, never in memory. */
Test(store, reports_rows_that_break_the_rules_and_goes_on_after_they_are_gone)
{
    const char *spoiled[] = {
        "UPDATE member SET worker_id = x'00'",
        "UPDATE member SET model_id = 'text'",
        "UPDATE member SET address = printf('%0300d', 1)",
        "UPDATE member SET model_name = x'ff'",
        "UPDATE member SET layer_end = 4000000000",
        "UPDATE member SET layer_first = -1",
        "UPDATE member SET layer_count = 1099511627776",
        "UPDATE member SET decode_tokens_per_s = 9e999",
        "UPDATE member SET heartbeat_ms = 'soon'",
        "DELETE FROM directory",
    };
    static struct list list;
    for (size_t i = 0; i < sizeof spoiled / sizeof *spoiled; i++) {
        struct store *store = opened();
        const struct members_wish wish = fixture_wish(1);
        join(store, &wish, FIXTURE_NOW_US);
        meddle(spoiled[i]);
        list.count = 0;
        cr_expect_eq(store_read(store, &list.version, add_row, &list), ODSI_ERR_CORRUPT, "%s",
                     spoiled[i]);
        meddle("DELETE FROM member; DELETE FROM directory; INSERT INTO directory VALUES (1, 5)");
        cr_expect_eq(count_of(store), 0);
        join(store, &wish, FIXTURE_NOW_US);
        store_close(&store);
    }
}

Test(store, does_not_let_ranges_outside_the_model_reach_the_assignment)
{
    struct store *store = opened();
    const struct members_wish other = fixture_wish(1);
    const struct members_wish wish = fixture_wish_auto(2, 4);
    struct member row;
    join(store, &other, FIXTURE_NOW_US);
    meddle("UPDATE member SET layer_end = 4000000000");
    cr_expect_eq(store_join(store, &wish, HEARTBEAT_MS, FIXTURE_NOW_US, &row), ODSI_ERR_INVALID);
    meddle("UPDATE member SET layer_first = -5");
    cr_expect_eq(store_join(store, &wish, HEARTBEAT_MS, FIXTURE_NOW_US, &row), ODSI_ERR_CORRUPT);
    store_close(&store);
}

/* Joins until the store refuses; returns how many got in. */
static uint32_t join_until_refused(struct store *store, enum odsi_err *out_err)
{
    for (uint32_t i = 0; i < 5000; i++) {
        const struct members_wish wish = fixture_wish(i);
        struct member row;
        *out_err = store_join(store, &wish, HEARTBEAT_MS, FIXTURE_NOW_US, &row);
        if (*out_err != ODSI_OK)
            return i;
    }
    return 5000;
}

static enum odsi_err count_row(void *context, const struct member *row)
{
    uint32_t *count = context;
    (void)row;
    (*count)++;
    return ODSI_OK;
}

static void expect_count(struct store *store, uint32_t expected)
{
    uint32_t count = 0;
    uint64_t version = 0;
    cr_assert_eq(store_read(store, &version, count_row, &count), ODSI_OK, "%s", odsi_err_text());
    cr_expect_eq(count, expected);
}

Test(store, changes_nothing_when_its_disk_is_full_and_goes_on_when_there_is_room)
{
    struct store *store = NULL;
    enum odsi_err err = ODSI_OK;
    int known = 0;
    cr_assert_eq(store_sqlite_open(&store, path, 32), ODSI_OK, "%s", odsi_err_text());
    const uint64_t version = version_of(store);
    const uint32_t count = join_until_refused(store, &err);
    cr_expect_eq(err, ODSI_ERR_IO);
    cr_expect(strstr(odsi_err_text(), "room"), "%s", odsi_err_text());
    cr_expect_gt(count, 20);
    cr_expect_eq(version_of(store), version + count);
    expect_count(store, count);
    for (uint32_t i = 0; i < count; i++) {
        const struct digest id = fixture_id(i);
        cr_assert_eq(store_leave(store, &id, &known), ODSI_OK, "%s", odsi_err_text());
    }
    const struct members_wish wish = fixture_wish(9000);
    join(store, &wish, FIXTURE_NOW_US);
    expect_count(store, 1);
    store_close(&store);
}

/* Goal: the same when the operating system refuses the write, not SQLite.
 * Method: a limit on the size of any file that this process writes. */
Test(store, survives_writes_that_the_system_refuses)
{
    struct store *store = opened();
    const struct rlimit small = {.rlim_cur = 400000, .rlim_max = RLIM_INFINITY};
    const struct rlimit none = {.rlim_cur = RLIM_INFINITY, .rlim_max = RLIM_INFINITY};
    const struct sigaction ignore = {.sa_handler = SIG_IGN};
    enum odsi_err err = ODSI_OK;
    cr_assert_eq(sigaction(SIGXFSZ, &ignore, NULL), 0);
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &small), 0);
    const uint32_t count = join_until_refused(store, &err);
    cr_expect_eq(err, ODSI_ERR_IO, "%s", odsi_err_text());
    expect_count(store, count);
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &none), 0);
    const struct members_wish wish = fixture_wish(9000);
    join(store, &wish, FIXTURE_NOW_US);
    expect_count(store, count + 1);
    store_close(&store);
    store = opened();
    expect_count(store, count + 1);
    store_close(&store);
}

/* Method: as a user without rights, since root may write everything. */
Test(store, says_that_a_file_may_not_be_written)
{
    struct store *store = opened();
    const struct members_wish wish = fixture_wish(1);
    join(store, &wish, FIXTURE_NOW_US);
    store_close(&store);
    cr_assert_eq(chmod(path, 0444), 0);
    cr_assert_eq(chmod(folder, 0555), 0);
    if (geteuid() == 0)
        cr_assert_eq(seteuid(65534), 0);
    expect_refused(ODSI_ERR_IO);
    if (getuid() == 0)
        cr_assert_eq(seteuid(0), 0);
    cr_assert_eq(chmod(folder, 0755), 0);
}

/* ---- bounds and memory ---- */

/* Goal: the largest swarm fits, no member more, and a large directory is read whole. */
Test(store, holds_as_many_members_as_the_limit_and_no_more)
{
    struct store *store = NULL;
    struct member row;
    cr_assert_eq(store_open(&store, "sqlite::memory:"), ODSI_OK);
    for (uint32_t i = 0; i < LIMIT_MEMBERS_MAX; i++) {
        struct members_wish wish = fixture_wish(i);
        snprintf(wish.address, sizeof wish.address, "h%u:1", i);
        cr_assert_eq(store_join(store, &wish, HEARTBEAT_MS, FIXTURE_NOW_US, &row), ODSI_OK,
                     "%u: %s", i, odsi_err_text());
    }
    struct members_wish one_more = fixture_wish(LIMIT_MEMBERS_MAX);
    snprintf(one_more.address, sizeof one_more.address, "more:1");
    cr_expect_eq(store_join(store, &one_more, HEARTBEAT_MS, FIXTURE_NOW_US, &row), ODSI_ERR_BUSY);
    one_more.worker_id = fixture_id(5); /* one that is in may come back */
    cr_expect_eq(store_join(store, &one_more, HEARTBEAT_MS, FIXTURE_NOW_US, &row), ODSI_OK);
    expect_count(store, LIMIT_MEMBERS_MAX);
    store_close(&store);
}

/* Method: refuse the first, second ... allocation of open and of a join that has to choose. */
Test(store, fails_whole_when_memory_is_short)
{
    struct store *store = NULL;
    struct member row;
    alloc_fail_after(0);
    cr_expect_eq(store_open(&store, url), ODSI_ERR_NO_MEMORY);
    alloc_fail_after(-1);
    cr_expect_null(store);
    store = opened();
    const struct members_wish first = fixture_wish_auto(1, 4);
    const struct members_wish second = fixture_wish_auto(2, 4);
    join(store, &first, FIXTURE_NOW_US);
    const uint64_t version = version_of(store);
    long refused = 0;
    for (;; refused++) {
        alloc_fail_after(refused);
        const enum odsi_err err = store_join(store, &second, HEARTBEAT_MS, FIXTURE_NOW_US, &row);
        alloc_fail_after(-1);
        if (err == ODSI_OK)
            break;
        cr_assert_eq(err, ODSI_ERR_NO_MEMORY);
        cr_assert_eq(version_of(store), version);
    }
    cr_expect_eq(refused, 2);
    cr_expect_eq(row.layer_first, 4);
    store_close(&store);
}
