#include "coordinator/members.h"

#include "common/base/alloc.h"
#include "odsi/v1/coordinator.pb-c.h"
#include "tests/unit/coordinator/coordinator_fixture.h"

#include <criterion/criterion.h>
#include <math.h>

#define HEARTBEAT_MS 1000u
#define SECOND_US    1000000u

static struct member joined(const struct members_wish *wish, uint64_t now_us)
{
    const struct members_facts nobody = {0};
    struct member row;
    cr_assert_eq(members_join(&row, wish, &nobody, HEARTBEAT_MS, now_us), ODSI_OK);
    return row;
}

/* ---- fields ---- */

Test(members, accepts_addresses_that_others_can_reach)
{
    const char *good[] = {"10.0.0.1:7700", "my-host.example:1", "a_b:65535", "[::1]:7700",
                          "[2001:db8::7]:443"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        struct members_wish wish = fixture_wish(1);
        snprintf(wish.address, sizeof wish.address, "%s", good[i]);
        cr_expect_eq(members_check_wish(&wish), ODSI_OK, "%s: %s", good[i], odsi_err_text());
    }
}

Test(members, refuses_addresses_that_nobody_could_use)
{
    const char *bad[] = {"",           "host",      "host:",    ":7700",       "host:0",
                         "host:65536", "host:07",   "host:77x", "ho st:1",     "user@host:1",
                         "0.0.0.0:1",  "[::]:1",    "[]:1",     "[::1:1",      "host/x:1",
                         "host:1\n",   "h\x01st:1", "::1:77:",  "host:999999", "h\xc3\xb6st:1",
                         "[zz]:1",     "host: 1",   "host:-1",  "host:+1"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct members_wish wish = fixture_wish(1);
        memset(wish.address, 0, sizeof wish.address);
        memcpy(wish.address, bad[i], strlen(bad[i]));
        cr_expect_eq(members_check_wish(&wish), ODSI_ERR_INVALID, "'%s'", bad[i]);
    }
    struct members_wish wish = fixture_wish(1);
    memset(wish.address, 'a', sizeof wish.address); /* no NUL at all */
    cr_expect_eq(members_check_wish(&wish), ODSI_ERR_INVALID);
}

static enum odsi_err check_name(const char *name)
{
    struct members_wish wish = fixture_wish(1);
    memset(wish.model.name, 0, sizeof wish.model.name);
    memcpy(wish.model.name, name, strlen(name));
    return members_check_wish(&wish);
}

Test(members, accepts_only_printable_utf8_as_a_model_name)
{
    const char *bad[] = {"",
                         "a\nb",
                         "\x7f",
                         "\xff",
                         "\xc3",
                         "\xc3(",
                         "\xc0\xaf",
                         "\xe0\x80\xaf",
                         "\xed\xa0\x80",
                         "\xf4\x90\x80\x80",
                         "\xc2\x85",
                         "\x80",
                         "\xf8\x88\x80\x80\x80"};
    cr_expect_eq(check_name("Llama 3.1 8B"), ODSI_OK);
    cr_expect_eq(check_name("\xe6\xa8\xa1\xe5\x9e\x8b \xf0\x9f\xa6\x99 \xc3\xa4"), ODSI_OK);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        cr_expect_eq(check_name(bad[i]), ODSI_ERR_INVALID, "name %zu", i);
}

/* Method: a valid wish with one field spoiled at a time. */
Test(members, refuses_every_field_outside_its_limits)
{
#define SPOILED(field, value)                                                                      \
    do {                                                                                           \
        struct members_wish wish = fixture_wish(1);                                                \
        cr_assert_eq(members_check_wish(&wish), ODSI_OK);                                          \
        wish.field = value;                                                                        \
        cr_expect_eq(members_check_wish(&wish), ODSI_ERR_INVALID, #field " = " #value);            \
    } while (0)
    SPOILED(model.layer_count, 0);
    SPOILED(model.layer_count, LIMIT_LAYERS_MAX + 1);
    SPOILED(model.layer_count, 11); /* layers [0, 12) no longer fit */
    SPOILED(model.context_length, 0);
    SPOILED(model.context_length, LIMIT_CONTEXT_MAX + 1);
    SPOILED(model.numerics_version, 0);
    SPOILED(layer_first, 12);
    SPOILED(layer_end, 13);
    SPOILED(layer_end, UINT32_MAX);
    SPOILED(layer_end, 0); /* asks for a choice but says no capacity */
    SPOILED(capability.memory_size, UINT64_MAX);
    SPOILED(capability.kv_token_capacity, (uint64_t)1 << 63);
    SPOILED(capability.prefill_tokens_per_s, NAN);
    SPOILED(capability.prefill_tokens_per_s, -1.0f);
    SPOILED(capability.decode_tokens_per_s, INFINITY);
    SPOILED(capability.backend[0], '\n');
#undef SPOILED
    struct members_wish wish = fixture_wish(1);
    memset(wish.capability.backend, 'x', sizeof wish.capability.backend);
    cr_expect_eq(members_check_wish(&wish), ODSI_ERR_INVALID, "backend without an end");
}

Test(members, checks_heartbeats_and_stored_rows_by_the_same_rules)
{
    const struct members_wish wish = fixture_wish(1);
    struct member row = joined(&wish, FIXTURE_NOW_US);
    struct members_beat beat = {.load = {.kv_tokens_free = UINT64_MAX}};
    cr_expect_eq(members_check_beat(&beat), ODSI_ERR_INVALID);
    beat.load.kv_tokens_free = 5;
    beat.capability.decode_tokens_per_s = NAN;
    cr_expect_eq(members_check_beat(&beat), ODSI_OK, "a capability that is not there");
    beat.has_capability = 1;
    cr_expect_eq(members_check_beat(&beat), ODSI_ERR_INVALID);
    cr_expect_eq(members_check_row(&row), ODSI_OK);
    row.layer_end = 13;
    cr_expect_eq(members_check_row(&row), ODSI_ERR_CORRUPT);
    row.layer_end = 12;
    row.heartbeat_ms = 0;
    cr_expect_eq(members_check_row(&row), ODSI_ERR_CORRUPT);
}

Test(members, need_no_more_room_after_a_heartbeat)
{
    const struct members_wish wish = fixture_wish(1);
    struct member row = joined(&wish, FIXTURE_NOW_US);
    struct members_beat beat = {.has_capability = 1};
    const uint32_t before = members_entry_size(&row);
    memset(beat.capability.backend, 'b', sizeof beat.capability.backend - 1);
    (void)members_hear(&row, &beat, FIXTURE_NOW_US);
    cr_expect_eq(members_entry_size(&row), before);
}

/* Goal: the sum of entry sizes really bounds a Directory message.
 * Method: a Member with every field at its longest, packed. */
Test(members, knows_the_most_bytes_a_member_takes_in_a_message)
{
    static const float speed = 1.0f;
    struct members_wish wish = fixture_wish(1);
    memset(wish.address, 0, sizeof wish.address);
    struct member row = joined(&wish, FIXTURE_NOW_US);
    char empty[] = "";
    uint8_t id[DIGEST_SIZE] = {0};
    Odsi__V1__ModelDescription model = ODSI__V1__MODEL_DESCRIPTION__INIT;
    Odsi__V1__LayerRange layers = ODSI__V1__LAYER_RANGE__INIT;
    Odsi__V1__Capability capability = ODSI__V1__CAPABILITY__INIT;
    Odsi__V1__Load load = ODSI__V1__LOAD__INIT;
    Odsi__V1__Member member = ODSI__V1__MEMBER__INIT;
    model.model_id = (ProtobufCBinaryData){.len = DIGEST_SIZE, .data = id};
    model.name = row.model.name;
    model.layer_count = LIMIT_LAYERS_MAX;
    model.context_length = LIMIT_CONTEXT_MAX;
    model.numerics_version = UINT32_MAX;
    layers.first = LIMIT_LAYERS_MAX - 1;
    layers.end = LIMIT_LAYERS_MAX;
    capability.memory_size = capability.kv_token_capacity = (uint64_t)INT64_MAX;
    capability.prefill_tokens_per_s = capability.decode_tokens_per_s = speed;
    capability.thread_count = UINT32_MAX;
    load.session_count = load.queued_step_count = UINT32_MAX;
    load.kv_tokens_free = (uint64_t)INT64_MAX;
    member.worker_id = model.model_id;
    member.address = empty;
    member.model = &model;
    member.layers = &layers;
    member.capability = &capability;
    member.load = &load;
    member.ready = 1;
    member.silent_ms = UINT32_MAX;
    memset(row.capability.backend, 'b', sizeof row.capability.backend - 1);
    capability.backend = row.capability.backend;
    memset(row.model.name, 'n', sizeof row.model.name - 1);
    /* Its own size, and a tag and a length of two bytes in the list. */
    cr_expect_leq(odsi__v1__member__get_packed_size(&member) + 3, members_entry_size(&row));
}

/* ---- joining ---- */

Test(members, gives_the_layers_that_were_asked_for)
{
    struct members_wish wish = fixture_wish(1);
    wish.layer_first = 3;
    wish.layer_end = 7;
    const struct member row = joined(&wish, FIXTURE_NOW_US);
    cr_expect_eq(row.layer_first, 3);
    cr_expect_eq(row.layer_end, 7);
    cr_expect_eq(row.heard_at_us, FIXTURE_NOW_US);
    cr_expect_eq(row.heartbeat_ms, HEARTBEAT_MS);
    cr_expect_eq(row.ready, 0);
    cr_expect_str_eq(row.address, "10.0.0.1:1001");
}

Test(members, leaves_a_returning_member_the_layers_it_had)
{
    struct members_wish wish = fixture_wish_auto(1, 4);
    struct member before = joined(&wish, FIXTURE_NOW_US);
    before.layer_first = 6; /* not where a newcomer would be put */
    before.layer_end = 10;
    const struct members_facts facts = {.self = &before};
    struct member row;
    cr_assert_eq(members_join(&row, &wish, &facts, HEARTBEAT_MS, FIXTURE_NOW_US), ODSI_OK);
    cr_expect_eq(row.layer_first, 6);
    cr_expect_eq(row.layer_end, 10);
    wish.layer_capacity = 5; /* with other room it is as good as new */
    cr_assert_eq(members_join(&row, &wish, &facts, HEARTBEAT_MS, FIXTURE_NOW_US), ODSI_OK);
    cr_expect_eq(row.layer_first, 0);
    cr_expect_eq(row.layer_end, 5);
    wish.layer_capacity = 4;
    wish.model.id.bytes[0]++; /* with another model too */
    cr_assert_eq(members_join(&row, &wish, &facts, HEARTBEAT_MS, FIXTURE_NOW_US), ODSI_OK);
    cr_expect_eq(row.layer_first, 0);
}

Test(members, keeps_an_address_for_its_member_until_that_one_is_overdue)
{
    const struct members_wish first = fixture_wish(1);
    struct members_wish second = fixture_wish(2);
    const struct member holder = joined(&first, FIXTURE_NOW_US);
    const struct members_facts facts = {.holder = &holder};
    struct member row;
    memcpy(second.address, first.address, sizeof second.address);
    const uint64_t overdue_us = FIXTURE_NOW_US + members_overdue_us(HEARTBEAT_MS);
    cr_expect_eq(members_join(&row, &second, &facts, HEARTBEAT_MS, FIXTURE_NOW_US),
                 ODSI_ERR_EXISTS);
    cr_expect_eq(members_join(&row, &second, &facts, HEARTBEAT_MS, overdue_us), ODSI_ERR_EXISTS);
    cr_expect_eq(members_join(&row, &second, &facts, HEARTBEAT_MS, overdue_us + 1), ODSI_OK);
}

Test(members, refuses_to_grow_beyond_what_a_directory_can_carry)
{
    const struct members_wish wish = fixture_wish(1);
    struct member row;
    struct members_facts facts = {.member_count = LIMIT_MEMBERS_MAX - 1};
    cr_expect_eq(members_join(&row, &wish, &facts, HEARTBEAT_MS, FIXTURE_NOW_US), ODSI_OK);
    facts.member_count = LIMIT_MEMBERS_MAX;
    cr_expect_eq(members_join(&row, &wish, &facts, HEARTBEAT_MS, FIXTURE_NOW_US), ODSI_ERR_BUSY);
    facts.member_count = 1;
    facts.directory_size = MEMBERS_DIRECTORY_SIZE_MAX - members_entry_size(&row);
    cr_expect_eq(members_join(&row, &wish, &facts, HEARTBEAT_MS, FIXTURE_NOW_US), ODSI_OK);
    facts.directory_size++;
    cr_expect_eq(members_join(&row, &wish, &facts, HEARTBEAT_MS, FIXTURE_NOW_US), ODSI_ERR_BUSY);
}

/* ---- heartbeats and time ---- */

Test(members, takes_load_and_readiness_from_a_heartbeat)
{
    const struct members_wish wish = fixture_wish(1);
    struct member row = joined(&wish, FIXTURE_NOW_US);
    struct members_beat beat = {.load = {3, 2, 1000}};
    cr_expect_eq(members_hear(&row, &beat, FIXTURE_NOW_US + 5), 0, "load is no change");
    cr_expect_eq(row.load.session_count, 3);
    cr_expect_eq(row.heard_at_us, FIXTURE_NOW_US + 5);
    cr_expect_float_eq(row.capability.decode_tokens_per_s, 80.0f, 0.0f);
    beat.ready = 7;
    beat.has_capability = 1;
    cr_expect_eq(members_hear(&row, &beat, FIXTURE_NOW_US + 6), 1, "readiness is one");
    cr_expect_eq(members_hear(&row, &beat, FIXTURE_NOW_US + 7), 0);
    cr_expect_eq(row.ready, 1);
    cr_expect_float_eq(row.capability.decode_tokens_per_s, 0.0f, 0.0f);
}

Test(members, is_gone_after_three_missed_heartbeats_and_not_before)
{
    const struct members_wish wish = fixture_wish(1);
    const struct member row = joined(&wish, FIXTURE_NOW_US);
    const uint64_t since_us = FIXTURE_NOW_US - SECOND_US;
    cr_expect_not(members_is_expired(&row, since_us, FIXTURE_NOW_US));
    cr_expect_not(members_is_expired(&row, since_us, FIXTURE_NOW_US + 3 * SECOND_US));
    cr_expect_not(members_is_expired(&row, since_us, FIXTURE_NOW_US + 3500000));
    cr_expect(members_is_expired(&row, since_us, FIXTURE_NOW_US + 3500001));
    cr_expect_not(members_is_expired(&row, since_us, FIXTURE_NOW_US - SECOND_US),
                  "a clock set back");
}

Test(members, is_not_blamed_for_time_in_which_nobody_listened)
{
    const struct members_wish wish = fixture_wish(1);
    const struct member row = joined(&wish, FIXTURE_NOW_US);
    const uint64_t started_us = FIXTURE_NOW_US + 60 * SECOND_US;
    cr_expect_not(members_is_expired(&row, started_us, started_us + 3 * SECOND_US));
    cr_expect(members_is_expired(&row, started_us, started_us + 4 * SECOND_US));
}

Test(members, start_to_count_silence_anew_after_a_stop_or_a_jump_of_the_clock)
{
    struct members_listener listener;
    uint64_t now_us = FIXTURE_NOW_US;
    members_listener_init(&listener, SECOND_US, now_us);
    for (int i = 0; i < 10; i++)
        cr_expect_eq(members_listen(&listener, now_us += SECOND_US + 100000), FIXTURE_NOW_US);
    now_us += 10 * SECOND_US; /* stopped, or the clock went ahead */
    cr_expect_eq(members_listen(&listener, now_us), now_us);
    cr_expect_eq(members_listen(&listener, now_us + SECOND_US), now_us);
    now_us -= 3600 * (uint64_t)SECOND_US; /* set back */
    cr_expect_eq(members_listen(&listener, now_us), now_us);
}
