/* Prefix reuse as the gateway sees it: keys out, what stages hold in, the rest of the prompt. */
#include "tests/unit/gateway/talk.h"
#include "worker/engine/prefix_key.h"

#include <criterion/criterion.h>
#include <string.h>

/* Goal: the stages are told what the prompt begins with, and the prompt is sent from where the one
 * that holds the least begins. */
Test(generate_prefix, sends_only_what_some_stage_does_not_hold)
{
    static const struct {
        uint32_t held[3], begin;
    } cases[] = {{{0, 0, 0}, 0},       {{1984, 1984, 1984}, 1984}, {{1984, 640, 1024}, 640},
                 {{1984, 1984, 0}, 0}, {{64, 63, 1984}, 63},       {{1500, 1984, 1984}, 1500}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct talk talk;
        struct digest keys[2000 / 64];
        talk_prepare(&talk, 2000, 3);
        memset(talk.config.prefix_seed.bytes, 9, DIGEST_SIZE);
        memcpy(talk.held_counts, cases[i].held, sizeof cases[i].held);
        talk_open(&talk);
        prefix_key_chain(keys, &talk.config.prefix_seed, talk.prompt, 2000 / 64);
        cr_expect_eq(talk.key_count, 31);
        cr_expect(digest_equal(&talk.key_last, &keys[30]));
        cr_expect_eq(talk.prompt_count, 2000);
        talk_open_all(&talk);
        cr_expect_eq(talk.step_positions, 2000);
        cr_expect(talk.sampled);
        cr_expect_eq(memcmp(talk.step_tokens + cases[i].begin, talk.prompt + cases[i].begin,
                            (2000 - cases[i].begin) * 4),
                     0);
        cr_expect_eq(talk.step_tokens[0], cases[i].begin == 0 ? FIXTURE_BOS : 0);
        talk_say(&talk, FIXTURE_EOS);
        cr_expect(talk.finished);
        cr_expect_eq(talk.summary.reused_count, cases[i].begin);
        cr_expect_eq(talk.summary.prompt_count, 2000);
        talk_close(&talk);
    }
}

/* Goal: after a failure the new path is asked for the text so far, and may hold some of it. */
Test(generate_prefix, another_path_begins_where_it_can)
{
    struct talk talk;
    talk_prepare(&talk, 127, 2);
    talk_open(&talk);
    cr_expect_eq(talk.key_count, 1);
    talk_open_all(&talk);
    talk_say(&talk, FIXTURE_HELLO);
    talk_say(&talk, FIXTURE_WORLD);
    generate_link_broken(talk.machine, 1, "socket closed", talk.now_us);
    talk_pump(&talk);
    generate_set_path(talk.machine, talk.stages, 2, talk.now_us);
    talk_pump(&talk);
    cr_expect_eq(talk.key_count, 2, "a page of prompt and answer");
    cr_expect_eq(talk.prompt_count, 129);
    talk.held_counts[0] = 128;
    talk.held_counts[1] = 64;
    memset(talk.step_tokens, 0, sizeof talk.step_tokens);
    talk_open_all(&talk);
    cr_expect_eq(talk.step_positions, 129);
    cr_expect_eq(talk.step_tokens[63], 0);
    cr_expect_eq(talk.step_tokens[64], talk.prompt[64]);
    cr_expect_eq(talk.step_tokens[128], FIXTURE_WORLD);
    talk_say(&talk, FIXTURE_EOS);
    cr_expect(talk.finished);
    cr_expect_str_eq(talk.text, " hello world");
    cr_expect_eq(talk.summary.reused_count, 0, "the first token came without");
    talk_close(&talk);
}

Test(generate_prefix, leaves_a_stage_that_says_it_holds_what_it_cannot)
{
    static const uint32_t lies[] = {128, 129, 65, UINT32_MAX};
    for (size_t i = 0; i < 4; i++) {
        struct talk talk;
        talk_prepare(&talk, i == 2 ? 127 : 128, 2);
        talk_open(&talk);
        cr_expect_eq(generate_opened(talk.machine, 0, talk.epoch, i == 2 ? 64 : 127, talk.now_us),
                     ODSI_OK);
        cr_expect_eq(generate_opened(talk.machine, 1, talk.epoch, lies[i], talk.now_us),
                     ODSI_ERR_CORRUPT, "%u", lies[i]);
        talk_pump(&talk);
        cr_expect_eq(talk.reroute_count, 1);
        cr_expect_eq(talk.blamed, 1);
        cr_expect(talk.certain);
        cr_expect(strstr(talk.failure.text, "it says that it holds"), "%s", talk.failure.text);
        cr_expect_eq(talk.close_count[0] + talk.close_count[1], 2);
        cr_expect_eq(talk.step_count, 0);
        talk_close(&talk);
    }
}
