#include "worker/gateway/text_stream.h"

#include "tests/unit/gateway/gateway_fixture.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

#define BYTE(b) (FIXTURE_BYTE + (uint32_t)(uint8_t)(b))

struct stream {
    struct tokenizer *tokenizer;
    struct text_stream *text;
    char shown[4096]; /* all that was taken so far */
    size_t shown_size;
};

static void stream_open(struct stream *self, const char *const *stops, uint32_t stop_count,
                        int at_start)
{
    struct stop_string strings[LIMIT_STOP_COUNT];
    memset(self, 0, sizeof *self);
    for (uint32_t i = 0; i < stop_count; i++) {
        strings[i].size = (uint32_t)strlen(stops[i]);
        memcpy(strings[i].data, stops[i], strings[i].size);
    }
    self->tokenizer = fixture_tokenizer();
    cr_assert_eq(text_stream_open(&self->text, self->tokenizer, strings, stop_count, at_start),
                 ODSI_OK);
}

static void stream_close(struct stream *self)
{
    text_stream_close(&self->text);
    tokenizer_close(&self->tokenizer);
}

static void take(struct stream *self)
{
    const char *text = NULL;
    size_t size = 0;
    text_stream_take(self->text, 64, &text, &size);
    cr_assert_leq(size, 64);
    cr_assert(text_stream_is_utf8(text, size), "a piece must be valid by itself");
    cr_assert_lt(self->shown_size + size, sizeof self->shown);
    memcpy(self->shown + self->shown_size, text, size);
    self->shown_size += size;
    self->shown[self->shown_size] = '\0';
}

/* Pushes one token and takes what it showed; returns whether a stop string is complete. */
static int push(struct stream *self, uint32_t token)
{
    int stopped = 0;
    cr_assert_eq(text_stream_push(self->text, token, &stopped), ODSI_OK);
    take(self);
    return stopped;
}

static void end(struct stream *self)
{
    cr_assert_eq(text_stream_end(self->text), ODSI_OK);
    do
        take(self);
    while (!text_stream_is_empty(self->text));
}

Test(text_stream, shows_tokens_at_once)
{
    struct stream stream;
    stream_open(&stream, NULL, 0, 0);
    push(&stream, FIXTURE_HELLO);
    cr_expect_str_eq(stream.shown, " hello");
    push(&stream, FIXTURE_EOS);
    push(&stream, FIXTURE_WORLD);
    cr_expect_str_eq(stream.shown, " hello world");
    end(&stream);
    cr_expect_str_eq(stream.shown, " hello world");
    stream_close(&stream);
}

Test(text_stream, drops_the_tokenizers_own_space_at_the_start_of_a_text)
{
    struct stream stream;
    stream_open(&stream, NULL, 0, 1);
    push(&stream, FIXTURE_BOS);
    push(&stream, FIXTURE_HELLO);
    push(&stream, FIXTURE_HELLO);
    cr_expect_str_eq(stream.shown, "hello hello");
    stream_close(&stream);
    stream_open(&stream, NULL, 0, 1);
    push(&stream, FIXTURE_ST);
    push(&stream, FIXTURE_HELLO);
    cr_expect_str_eq(stream.shown, "ST hello");
    stream_close(&stream);
}

Test(text_stream, shows_a_character_only_when_it_is_whole)
{
    struct stream stream;
    stream_open(&stream, NULL, 0, 0);
    push(&stream, BYTE(0xE2));
    cr_expect_str_eq(stream.shown, "");
    push(&stream, BYTE(0x82));
    cr_expect_str_eq(stream.shown, "");
    push(&stream, BYTE(0xAC));
    cr_expect_str_eq(stream.shown, "\xE2\x82\xAC");
    push(&stream, BYTE(0xF0));
    push(&stream, BYTE(0x9F));
    push(&stream, BYTE(0x98));
    push(&stream, BYTE(0x80));
    push(&stream, FIXTURE_EURO);
    cr_expect_str_eq(stream.shown, "\xE2\x82\xAC\xF0\x9F\x98\x80\xE2\x82\xAC");
    stream_close(&stream);
}

Test(text_stream, replaces_what_is_no_character)
{
    struct stream stream;
    stream_open(&stream, NULL, 0, 0);
    push(&stream, BYTE(0xFF));
    push(&stream, BYTE(0x80));
    push(&stream, BYTE('a'));
    push(&stream, BYTE(0)); /* a protobuf string cannot carry it in C */
    push(&stream, BYTE('b'));
    cr_expect_str_eq(stream.shown, "\xEF\xBF\xBD\xEF\xBF\xBD"
                                   "a\xEF\xBF\xBD"
                                   "b");
    stream_close(&stream);
    stream_open(&stream, NULL, 0, 0);
    push(&stream, BYTE(0xE2)); /* a beginning that nothing continues */
    push(&stream, BYTE('c'));
    end(&stream);
    cr_expect_str_eq(stream.shown, "\xEF\xBF\xBD"
                                   "c");
    stream_close(&stream);
    stream_open(&stream, NULL, 0, 0);
    push(&stream, BYTE(0xF0));
    push(&stream, BYTE(0x9F));
    end(&stream);
    cr_expect_str_eq(stream.shown, "\xEF\xBF\xBD", "cut off at the end");
    stream_close(&stream);
}

/* Goal: whatever bytes a model makes, every piece is valid UTF-8, and what is valid comes through
 * unchanged. How: random bytes, with many characters among them, in random order. */
Test(text_stream, makes_valid_text_of_any_bytes)
{
    static const char *const pieces[] = {"a", "\xC3\xA9", "\xE2\x82\xAC", "\xF0\x9F\x98\x80"};
    struct fixture_random random = {0xC0FFEE};
    for (int round = 0; round < 300; round++) {
        struct stream stream;
        char expected[1024] = "";
        size_t expected_size = 0;
        const int valid_only = round % 2;
        stream_open(&stream, NULL, 0, 0);
        for (int i = 0; i < 40; i++) {
            const char *piece = pieces[fixture_random_below(&random, 4)];
            if (!valid_only && fixture_random_below(&random, 3) == 0) {
                push(&stream, BYTE(fixture_random_below(&random, 256)));
                continue;
            }
            for (size_t j = 0; j < strlen(piece); j++) {
                expected[expected_size++] = piece[j];
                push(&stream, BYTE(piece[j]));
            }
        }
        end(&stream);
        if (valid_only)
            cr_assert_str_eq(stream.shown, expected);
        stream_close(&stream);
    }
}

Test(text_stream, cuts_before_a_stop_string_across_tokens)
{
    const char *const stops[] = {"never", "STOP"};
    struct stream stream;
    stream_open(&stream, stops, 2, 0);
    cr_expect_not(push(&stream, FIXTURE_HELLO));
    cr_expect_not(push(&stream, FIXTURE_ST));
    cr_expect_str_eq(stream.shown, " hello", "ST may become STOP");
    cr_expect(push(&stream, FIXTURE_OP));
    end(&stream);
    cr_expect_str_eq(stream.shown, " hello");
    stream_close(&stream);
}

Test(text_stream, shows_what_did_not_become_a_stop_string)
{
    const char *const stops[] = {"STOP"};
    struct stream stream;
    stream_open(&stream, stops, 1, 0);
    push(&stream, FIXTURE_ST);
    push(&stream, FIXTURE_ST);
    cr_expect_str_eq(stream.shown, "ST");
    push(&stream, FIXTURE_HELLO);
    cr_expect_str_eq(stream.shown, "STST hello");
    push(&stream, BYTE('S'));
    end(&stream);
    cr_expect_str_eq(stream.shown, "STST helloS");
    stream_close(&stream);
}

Test(text_stream, cuts_at_the_first_of_several_stop_strings)
{
    const char *const stops[] = {"world", "lo w", "h"};
    struct stream stream;
    stream_open(&stream, stops, 2, 0);
    cr_expect_not(push(&stream, FIXTURE_HELLO));
    cr_expect(push(&stream, FIXTURE_WORLD));
    end(&stream);
    cr_expect_str_eq(stream.shown, " hel");
    stream_close(&stream);
    stream_open(&stream, stops, 3, 1);
    cr_expect(push(&stream, FIXTURE_HELLO));
    end(&stream);
    cr_expect_str_eq(stream.shown, "", "the tokenizer's space before the stop is dropped");
    stream_close(&stream);
}

/* A stop string that begins inside a character's bytes must not hide the start of the character. */
Test(text_stream, finds_a_stop_string_of_several_byte_characters)
{
    const char *const stops[] = {"\xE2\x82\xAC!"};
    struct stream stream;
    stream_open(&stream, stops, 1, 0);
    push(&stream, FIXTURE_EURO);
    cr_expect_str_eq(stream.shown, "");
    push(&stream, BYTE(0xE2));
    push(&stream, BYTE(0x82));
    cr_expect_str_eq(stream.shown, "\xE2\x82\xAC");
    push(&stream, BYTE(0xAC));
    cr_expect(push(&stream, BYTE('!')));
    end(&stream);
    cr_expect_str_eq(stream.shown, "\xE2\x82\xAC");
    stream_close(&stream);
}

/* Goal: the text is the same however much of it a reader takes at a time. */
Test(text_stream, is_cut_for_a_small_reader_between_characters)
{
    struct stream stream;
    int stopped = 0;
    stream_open(&stream, NULL, 0, 0);
    for (int i = 0; i < 3; i++)
        cr_assert_eq(text_stream_push(stream.text, FIXTURE_EURO, &stopped), ODSI_OK);
    const char *text = NULL;
    size_t size = 0;
    text_stream_take(stream.text, 4, &text, &size);
    cr_expect_eq(size, 3);
    text_stream_take(stream.text, 7, &text, &size);
    cr_expect_eq(size, 6);
    cr_expect(text_stream_is_empty(stream.text));
    stream_close(&stream);
}

Test(text_stream, holds_a_bounded_amount_for_a_reader_that_does_not_read)
{
    struct stream stream;
    int stopped = 0;
    enum odsi_err err = ODSI_OK;
    uint32_t count = 0;
    stream_open(&stream, NULL, 0, 0);
    while (err == ODSI_OK && count <= TEXT_STREAM_SIZE_MAX / 300 + 1) {
        err = text_stream_push(stream.text, FIXTURE_LONG, &stopped);
        count++;
    }
    cr_expect_eq(err, ODSI_ERR_RANGE);
    cr_expect_eq(count, TEXT_STREAM_SIZE_MAX / 300 + 1);
    stream_close(&stream);
}

Test(text_stream, knows_valid_utf8)
{
    cr_expect(text_stream_is_utf8("", 0));
    cr_expect(text_stream_is_utf8("a\xC3\xA9\xE2\x82\xAC\xF4\x8F\xBF\xBF", 10));
    static const char *const bad[] = {"\xC0\x80",     "\xC1\xBF",         "\xE0\x9F\xBF",
                                      "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xF8\x88\x80\x80\x80",
                                      "\x80",         "\xE2\x82",         "\xC3"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        cr_expect_not(text_stream_is_utf8(bad[i], strlen(bad[i])), "case %zu", i);
    cr_expect_not(text_stream_is_utf8("a\0b", 3));
}
