#include "worker/cli/cli_chat.h"

#include "common/base/alloc.h"

#include <criterion/criterion.h>
#include <string.h>

static void expect_line(const char *line, enum cli_chat_line wanted, const char *wanted_rest)
{
    const char *rest = NULL;
    size_t size = 0;
    cr_expect_eq(cli_chat_read(line, strlen(line), &rest, &size), wanted, "%s", line);
    if (wanted_rest) {
        cr_assert_eq(size, strlen(wanted_rest), "%s", line);
        cr_expect_eq(memcmp(rest, wanted_rest, size), 0, "%s", line);
    }
}

Test(cli_chat, tells_commands_from_what_is_said)
{
    expect_line("hello /quit", CLI_CHAT_SAY, "hello /quit");
    expect_line("  hello", CLI_CHAT_SAY, "  hello");
    expect_line(" /quit", CLI_CHAT_SAY, " /quit");
    expect_line("//quit", CLI_CHAT_SAY, "/quit");
    expect_line("//", CLI_CHAT_SAY, "/");
    expect_line("", CLI_CHAT_NOTHING, NULL);
    expect_line(" \t ", CLI_CHAT_NOTHING, NULL);
    expect_line("/quit", CLI_CHAT_QUIT, "");
    expect_line("/quit  ", CLI_CHAT_QUIT, "");
    expect_line("/reset", CLI_CHAT_RESET, "");
    expect_line("/help", CLI_CHAT_HELP, "");
    expect_line("/system", CLI_CHAT_SYSTEM, "");
    expect_line("/system  be brief ", CLI_CHAT_SYSTEM, "be brief ");
    expect_line("/quite", CLI_CHAT_UNKNOWN, NULL);
    expect_line("/", CLI_CHAT_UNKNOWN, NULL);
    expect_line("/System x", CLI_CHAT_UNKNOWN, NULL);
}

static void expect_view(struct cli_chat *chat, uint32_t count, const char *const *wanted)
{
    uint32_t got = 0;
    const struct cli_message *messages = cli_chat_view(chat, &got);
    cr_assert_eq(got, count, "%u messages", got);
    for (uint32_t i = 0; i < count; i++) {
        cr_expect_str_eq(messages[i].role, wanted[2 * i]);
        cr_expect_str_eq(messages[i].content, wanted[2 * i + 1]);
    }
}

Test(cli_chat, keeps_the_turns_behind_the_system_message)
{
    struct cli_chat chat = {0};
    expect_view(&chat, 0, NULL);
    cr_assert_eq(cli_chat_set_system(&chat, "brief!", 5), ODSI_OK);
    expect_view(&chat, 0, NULL);
    cr_assert_eq(cli_chat_add(&chat, "user", "question", 5), ODSI_OK);
    cr_assert_eq(cli_chat_add(&chat, "assistant", "", 0), ODSI_OK);
    expect_view(&chat, 3,
                (const char *const[]){"system", "brief", "user", "quest", "assistant", ""});
    cr_assert_eq(cli_chat_set_system(&chat, NULL, 0), ODSI_OK);
    expect_view(&chat, 2, (const char *const[]){"user", "quest", "assistant", ""});
    cli_chat_drop_last(&chat);
    cr_assert_eq(cli_chat_set_system(&chat, "x", 1), ODSI_OK);
    expect_view(&chat, 2, (const char *const[]){"system", "x", "user", "quest"});
    cli_chat_reset(&chat);
    expect_view(&chat, 0, NULL);
    cr_assert_eq(cli_chat_add(&chat, "user", "again", 5), ODSI_OK);
    expect_view(&chat, 2, (const char *const[]){"system", "x", "user", "again"});
    cli_chat_free(&chat);
}

Test(cli_chat, holds_as_many_messages_as_a_request_may)
{
    struct cli_chat chat = {0};
    uint32_t count = 0;
    cr_assert_eq(cli_chat_set_system(&chat, "s", 1), ODSI_OK);
    while (count < LIMIT_CHAT_MESSAGES && cli_chat_add(&chat, "user", "u", 1) == ODSI_OK)
        count++;
    cr_expect_eq(count, LIMIT_CHAT_MESSAGES - 1);
    cr_expect_eq(cli_chat_add(&chat, "user", "u", 1), ODSI_ERR_RANGE);
    cli_chat_view(&chat, &count);
    cr_expect_eq(count, LIMIT_CHAT_MESSAGES);
    cli_chat_free(&chat);
}

/* Method: refuse every allocation in turn; what was there stays, and nothing leaks. */
Test(cli_chat, loses_nothing_when_memory_is_short)
{
    for (long round = 0; round < 2; round++) {
        struct cli_chat chat = {0};
        alloc_fail_after(round);
        cr_expect_eq(cli_chat_add(&chat, "user", "u", 1), ODSI_ERR_NO_MEMORY);
        alloc_fail_after(-1);
        expect_view(&chat, 0, NULL);
        cr_assert_eq(cli_chat_set_system(&chat, "s", 1), ODSI_OK);
        alloc_fail_after(0);
        cr_expect_eq(cli_chat_set_system(&chat, "t", 1), ODSI_ERR_NO_MEMORY);
        alloc_fail_after(-1);
        cr_assert_eq(cli_chat_add(&chat, "user", "u", 1), ODSI_OK);
        expect_view(&chat, 2, (const char *const[]){"system", "s", "user", "u"});
        cli_chat_free(&chat);
    }
}
