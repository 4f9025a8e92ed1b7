/* Byte-level BPE, special tokens and segments: worker/model/tokenizer.h beyond SentencePiece. */
#include "worker/model/tokenizer.h"

#include "common/base/alloc.h"
#include "tests/unit/model/model_fixture.h"
#include "tests/unit/model/tokenizer_fixture.h"
#include "worker/model/tokenizer_split.h"
#include "worker/model/tokenizer_write.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

static const char *const pipelines[] = {"llama3", "qwen2",  "smollm", "gpt-2",
                                        "tekken", "llama2", "gemma",  "mistral"};
#define PIPELINE_COUNT (sizeof pipelines / sizeof pipelines[0])

static uint32_t id_of(const struct tokenizer *tokenizer, const char *piece)
{
    const uint32_t id = tokenizer_find(tokenizer, piece, strlen(piece));
    cr_assert_neq(id, TOKENIZER_NONE, "%s", piece);
    return id;
}

/* ---- there and back ------------------------------------------------------------------------- */

/* Goal: no text is lost, whatever its bytes and whatever cuts it. How: every pair of bytes, random
 * bytes, and random pieces of text with half characters among them. "<|end|>" takes the white space
 * behind it, so only its parts are in there. */
Test(tokenizer_bytes, gives_every_text_back, .timeout = 120)
{
    static const char *const parts[] = {
        " ",        "  ",      "\n",   "\r\n",
        "\t",       "a",       "the",  " The",
        "'ll",      "1",       "234",  "\xc3\xa9",
        "\xc3",     "\x80",    "\xff", "\xe4\xbd\xa0\xe5\xa5\xbd",
        "[X]",      "[X",      "<s>",  "<|end|",
        "!?",       "/",       "\xcc", "\xf0\x9f\x98\x80",
        "\xc2\xa0", "machine",
    };
    const uint64_t seed = (uint64_t)time(NULL);
    uint64_t state = seed;
    cr_log_info("seed %llu", (unsigned long long)seed);
    for (size_t p = 0; p < PIPELINE_COUNT; p++) {
        struct tokenizer *tokenizer = tokenizer_of_pipeline(pipelines[p]);
        for (uint32_t pair = 0; pair < 65536; pair += 1 + (p > 1 ? 6 : 0)) {
            const char two[2] = {(char)(pair >> 8), (char)pair};
            tokenizer_expect_back(tokenizer, two, 2, 0, seed);
        }
        for (int round = 0; round < 1500; round++) {
            char text[1024];
            size_t size = 0;
            for (uint64_t left = fixture_random(&state) % 80; left > 0; left--) {
                const char *part = parts[fixture_random(&state) % (sizeof parts / sizeof *parts)];
                if (round % 3 == 0)
                    text[size++] = (char)fixture_random(&state);
                else
                    size += (size_t)snprintf(text + size, sizeof text - size, "%s", part);
            }
            tokenizer_expect_back(tokenizer, text, size, round % 2 ? TOKENIZER_BOS : 0, seed);
        }
        tokenizer_close(&tokenizer);
    }
}

/* Goal: a stream of pieces is the text, and is cut between characters only. */
Test(tokenizer_bytes, streams_pieces_that_add_up_to_the_text)
{
    static const char text[] = "the caf\xc3\xa9, \xe4\xbd\xa0\xe5\xa5\xbd \xf0\x9f\x98\x80!";
    struct tokenizer *tokenizer = tokenizer_of_pipeline("qwen2");
    static char piece[TOKENIZER_PIECE_SIZE_MAX];
    char whole[64];
    size_t size = 0, shown = 0;
    uint32_t ids[64];
    uint32_t count = 64;
    cr_assert_eq(tokenizer_encode(tokenizer, text, sizeof text - 1, 0, ids, &count), ODSI_OK);
    for (uint32_t i = 0; i < count; i++) {
        const size_t piece_size = tokenizer_piece(tokenizer, ids[i], piece);
        cr_assert_leq(size + piece_size, sizeof whole);
        memcpy(whole + size, piece, piece_size);
        size += piece_size;
        const size_t until = tokenizer_utf8_whole(whole + shown, size - shown);
        json_t *valid = json_stringn(whole + shown, until);
        cr_expect_not_null(valid, "token %u", i);
        json_decref(valid);
        shown += until;
    }
    cr_expect_eq(shown, sizeof text - 1);
    cr_expect_eq(memcmp(whole, text, shown), 0);
    tokenizer_close(&tokenizer);
}

/* ---- the plain algorithm, to compare with --------------------------------------------------- */

/* Tokens: 256 bytes, then these joined from two earlier ones, in the order of their merges. */
struct plain {
    uint32_t count;
    uint32_t left[64], right[64];
    char texts[320][40];
    uint32_t sizes[320];
};

static void plain_make(struct plain *self, uint64_t *state)
{
    static const char letters[] = "ab \n1\xc3\xa9";
    self->count = 0;
    for (uint32_t byte = 0; byte < 256; byte++) {
        self->texts[byte][0] = (char)byte;
        self->sizes[byte] = 1;
    }
    while (self->count < 40) {
        uint32_t ids[2];
        for (int i = 0; i < 2; i++)
            ids[i] = self->count > 0 && fixture_random(state) % 2
                         ? 256 + (uint32_t)(fixture_random(state) % self->count)
                         : (uint8_t)letters[fixture_random(state) % (sizeof letters - 1)];
        const uint32_t id = 256 + self->count;
        const uint32_t size = self->sizes[ids[0]] + self->sizes[ids[1]];
        if (size > 12)
            continue;
        memcpy(self->texts[id], self->texts[ids[0]], self->sizes[ids[0]]);
        memcpy(self->texts[id] + self->sizes[ids[0]], self->texts[ids[1]], self->sizes[ids[1]]);
        self->sizes[id] = size;
        int is_new = 1;
        for (uint32_t other = 256; other < id; other++)
            is_new &= self->sizes[other] != size ||
                      memcmp(self->texts[other], self->texts[id], size) != 0;
        if (!is_new)
            continue;
        self->left[self->count] = ids[0];
        self->right[self->count] = ids[1];
        self->count++;
    }
}

static struct tokenizer *plain_open(const struct plain *self)
{
    const struct tokenizer_head head = {.kind = TOKENIZER_BYTE_BPE,
                                        .pre = TOKENIZER_PRE_QWEN2,
                                        .bos = TOKENIZER_NONE,
                                        .eos = TOKENIZER_NONE,
                                        .unknown = TOKENIZER_NONE};
    struct buf bytes;
    buf_init(&bytes, 1u << 20);
    tokenizer_write_head(&bytes, &head, 256 + self->count);
    for (uint32_t id = 0; id < 256 + self->count; id++)
        cr_assert_eq(tokenizer_write_token(&bytes, 0, 1, self->texts[id], self->sizes[id]),
                     ODSI_OK);
    tokenizer_write_merge_count(&bytes, self->count);
    for (uint32_t i = 0; i < self->count; i++)
        tokenizer_write_merge(&bytes, self->left[i], self->right[i]);
    cr_assert_eq(tokenizer_write_template(&bytes, NULL, 0), ODSI_OK);
    struct tokenizer *tokenizer = tokenizer_of_bytes(&bytes);
    buf_free(&bytes);
    return tokenizer;
}

struct plain_words {
    const struct plain *plain;
    uint32_t ids[1024];
    uint32_t count;
};

/* The best merge of the word, the leftmost of equals, again and again. */
static enum odsi_err plain_word(void *context, const char *word, size_t size)
{
    struct plain_words *self = context;
    uint32_t *ids = self->ids + self->count;
    uint32_t count = (uint32_t)size;
    for (uint32_t i = 0; i < count; i++)
        ids[i] = (uint8_t)word[i];
    for (;;) {
        uint32_t rank = UINT32_MAX, at = 0;
        for (uint32_t i = 0; i + 1 < count; i++)
            for (uint32_t k = 0; k < self->plain->count && k < rank; k++)
                if (self->plain->left[k] == ids[i] && self->plain->right[k] == ids[i + 1]) {
                    rank = k;
                    at = i;
                }
        if (rank == UINT32_MAX)
            break;
        ids[at] = 256 + rank;
        count--;
        memmove(ids + at + 1, ids + at + 2, (count - at - 1) * sizeof *ids);
    }
    self->count += count;
    return ODSI_OK;
}

/* Goal: the queue and the words that are remembered give the ids that the definition gives.
 * How: random merges over a few bytes, against a search of all pairs at every step; texts are long
 * enough that words come back. */
Test(tokenizer_bytes, joins_as_the_plain_algorithm_does, .timeout = 60)
{
    static const char *const parts[] = {"a",  "b", "ab",       " ",  " a",
                                        "\n", "1", "\xc3\xa9", "ba", "!"};
    const uint64_t seed = (uint64_t)time(NULL);
    uint64_t state = seed;
    cr_log_info("seed %llu", (unsigned long long)seed);
    struct tokenizer_split *split = NULL;
    struct tokenizer_split_scratch *scratch = NULL;
    cr_assert_eq(tokenizer_split_open(&split, TOKENIZER_PRE_QWEN2), ODSI_OK);
    cr_assert_eq(tokenizer_split_scratch_open(&scratch, 1024), ODSI_OK);
    for (int round = 0; round < 60; round++) {
        static struct plain plain;
        plain_make(&plain, &state);
        struct tokenizer *tokenizer = plain_open(&plain);
        for (int i = 0; i < 20; i++) {
            char text[1024];
            size_t size = 0;
            for (uint64_t left = fixture_random(&state) % 400; left > 0; left--)
                size += (size_t)snprintf(text + size, sizeof text - size, "%s",
                                         parts[fixture_random(&state) % 10]);
            struct plain_words words = {.plain = &plain};
            cr_assert_eq(tokenizer_split_words(split, scratch, text, size, plain_word, &words),
                         ODSI_OK);
            tokenizer_expect_ids(tokenizer, text, size, 0, words.ids, words.count);
        }
        tokenizer_close(&tokenizer);
    }
    tokenizer_split_scratch_close(&scratch);
    tokenizer_split_close(&split);
}

/* ---- words ---------------------------------------------------------------------------------- */

static enum odsi_err put_word(void *context, const char *word, size_t size)
{
    struct buf *out = context;
    (void)buf_append_u8(out, '|');
    return buf_append(out, word, size);
}

static void expect_words(uint32_t pre, const char *text, const char *wanted)
{
    struct tokenizer_split *split = NULL;
    struct tokenizer_split_scratch *scratch = NULL;
    struct buf words;
    buf_init(&words, 4096);
    cr_assert_eq(tokenizer_split_open(&split, pre), ODSI_OK);
    cr_assert_eq(tokenizer_split_scratch_open(&scratch, strlen(text)), ODSI_OK);
    cr_assert_eq(tokenizer_split_words(split, scratch, text, strlen(text), put_word, &words),
                 ODSI_OK);
    cr_expect_str_eq(buf_text_view(&words), wanted, "%u: \"%s\" is cut \"%s\"", pre, text,
                     buf_text_view(&words));
    buf_free(&words);
    tokenizer_split_scratch_close(&scratch);
    tokenizer_split_close(&split);
}

Test(tokenizer_bytes, cuts_words_as_the_models_do)
{
    expect_words(TOKENIZER_PRE_LLAMA3, "I'LL see  12345!\n\n x", "|I|'LL| see| | |123|45|!\n\n| x");
    expect_words(TOKENIZER_PRE_QWEN2, "I'll see 123", "|I|'ll| see| |1|2|3");
    expect_words(TOKENIZER_PRE_GPT2, "I'll I'LL 123\n\nx", "|I|'ll| I|'|LL| 123|\n|\n|x");
    expect_words(TOKENIZER_PRE_SMOLLM, "a  12 b", "|a|  |1|2| b");
    expect_words(TOKENIZER_PRE_TEKKEN, "HTTPServer fooBar/\n", "|HTTPServer| foo|Bar|/\n");
    expect_words(TOKENIZER_PRE_DEFAULT, "a, 12345 b", "|a|,| |123|45| b");
    expect_words(TOKENIZER_PRE_LLAMA3, "", "");
}

/* ---- special tokens ------------------------------------------------------------------------- */

Test(tokenizer_bytes, takes_control_tokens_only_where_they_are_meant)
{
    for (size_t p = 0; p < PIPELINE_COUNT; p++) {
        struct tokenizer *tokenizer = tokenizer_of_pipeline(pipelines[p]);
        const uint32_t end = id_of(tokenizer, "<|end|>");
        uint32_t ids[64];
        uint32_t count = 64;
        tokenizer_expect_ids(tokenizer, "<|end|>", 7, TOKENIZER_SPECIAL, &end, 1);
        cr_assert_eq(tokenizer_encode(tokenizer, "<|end|>", 7, 0, ids, &count), ODSI_OK);
        cr_expect_gt(count, 1);
        for (uint32_t i = 0; i < count; i++)
            cr_expect_neq(ids[i], end);
        tokenizer_expect_back(tokenizer, "<|end|> <s></s>", 15, 0, 0);
        tokenizer_close(&tokenizer);
    }
}

/* A vocabulary of 256 bytes and these, ids from 256 on. */
struct named {
    const char *piece;
    uint8_t type;
};

static struct tokenizer *open_named(const struct named *named, uint32_t count)
{
    const struct tokenizer_head head = {.kind = TOKENIZER_BYTE_BPE,
                                        .pre = TOKENIZER_PRE_GPT2,
                                        .bos = 256,
                                        .eos = TOKENIZER_NONE,
                                        .unknown = TOKENIZER_NONE,
                                        .add_bos = 1};
    struct buf bytes;
    buf_init(&bytes, 1u << 20);
    tokenizer_write_head(&bytes, &head, 256 + count);
    for (uint32_t byte = 0; byte < 256; byte++) {
        const char text = (char)byte;
        cr_assert_eq(tokenizer_write_token(&bytes, 0, 1, &text, 1), ODSI_OK);
    }
    for (uint32_t i = 0; i < count; i++)
        cr_assert_eq(
            tokenizer_write_token(&bytes, 0, named[i].type, named[i].piece, strlen(named[i].piece)),
            ODSI_OK);
    tokenizer_write_merge_count(&bytes, 0);
    cr_assert_eq(tokenizer_write_template(&bytes, "{{ x }}", 7), ODSI_OK);
    struct tokenizer *tokenizer = tokenizer_of_bytes(&bytes);
    buf_free(&bytes);
    return tokenizer;
}

#define EXPECT_IDS(tokenizer, text, flags, ...)                                                    \
    tokenizer_expect_ids(tokenizer, text, strlen(text), flags, (uint32_t[]){__VA_ARGS__},          \
                         sizeof((uint32_t[]){__VA_ARGS__}) / 4)

Test(tokenizer_bytes, takes_the_longest_special_token_and_strips_what_it_says)
{
    const struct named named[] = {
        {"<s>", 3},        {"<a", 3},  {"<a>", 3}, {"<abc>", 3}, {"<l>", 3 | 0x40},
        {"<r>", 3 | 0x80}, {"[U]", 4}, {"<a>", 3}, {"[U]!", 3},
    };
    enum { S = TOKENIZER_SPECIAL };
    struct tokenizer *tokenizer = open_named(named, 9);
    EXPECT_IDS(tokenizer, "<a><abc><ab", S, 258, 259, 257, 'b');
    EXPECT_IDS(tokenizer, "x \n<l> y", S, 'x', 260, ' ', 'y');
    EXPECT_IDS(tokenizer, "x <r> \n\t y", S, 'x', ' ', 261, 'y');
    EXPECT_IDS(tokenizer, "<r> <l>", S, 261, 260);
    EXPECT_IDS(tokenizer, "<r>   ", S, 261);
    EXPECT_IDS(tokenizer, "[U]!", S, 264);
    EXPECT_IDS(tokenizer, "[U]!", 0, 262, '!');
    EXPECT_IDS(tokenizer, "[U]", TOKENIZER_BOS, 256, 262);
    EXPECT_IDS(tokenizer, "<s>", TOKENIZER_BOS | S, 256, 256);
    EXPECT_IDS(tokenizer, "<a>", 0, '<', 'a', '>');
    cr_expect_eq(tokenizer_find(tokenizer, "<a>", 3), 258, "the first of equals");
    cr_expect_eq(tokenizer_find(tokenizer, "<ab", 3), TOKENIZER_NONE);
    cr_expect_eq(tokenizer_find(tokenizer, "a", 1), 'a');
    cr_expect_eq(tokenizer_find(tokenizer, "", 0), TOKENIZER_NONE);
    tokenizer_close(&tokenizer);
}

/* Goal: special tokens are found as the definition says. How: random names over two letters in
 * random texts, against a search for the longest at every byte. */
Test(tokenizer_bytes, finds_special_tokens_as_a_plain_search_does)
{
    const uint64_t seed = (uint64_t)time(NULL);
    uint64_t state = seed;
    cr_log_info("seed %llu", (unsigned long long)seed);
    for (int round = 0; round < 200; round++) {
        char names[20][12];
        struct named named[20] = {{"<s>", 3}};
        for (uint32_t i = 1; i < 20; i++) {
            const size_t size = 2 + fixture_random(&state) % 8;
            for (size_t k = 0; k < size; k++)
                names[i][k] = "ab"[fixture_random(&state) % 2];
            names[i][size] = '\0';
            named[i] = (struct named){names[i], fixture_random(&state) % 2 ? 3 : 4};
            for (uint32_t other = 1; other < i; other++)
                if (strcmp(names[other], names[i]) == 0)
                    named[i].type = 5;
        }
        struct tokenizer *tokenizer = open_named(named, 20);
        char text[128];
        uint32_t wanted[128];
        uint32_t count = 0;
        const unsigned flags = round % 2 ? TOKENIZER_SPECIAL : 0;
        for (size_t i = 0; i < sizeof text; i++)
            text[i] = "ab"[fixture_random(&state) % 2];
        for (size_t at = 0; at < sizeof text;) {
            uint32_t best = 0;
            size_t best_size = 1;
            for (uint32_t i = 1; i < 20; i++) {
                const size_t size = strlen(names[i]);
                if ((named[i].type == 4 || (named[i].type == 3 && flags)) && size > best_size &&
                    size <= sizeof text - at && memcmp(text + at, names[i], size) == 0) {
                    best = 256 + i;
                    best_size = size;
                }
            }
            wanted[count++] = best ? best : (uint8_t)text[at];
            at += best_size;
        }
        tokenizer_expect_ids(tokenizer, text, sizeof text, flags, wanted, count);
        tokenizer_close(&tokenizer);
    }
}

/* ---- segments ------------------------------------------------------------------------------- */

static void expect_segments(const struct tokenizer *tokenizer,
                            const struct tokenizer_segment *segments, size_t count,
                            const char *same_as, unsigned flags)
{
    uint32_t wanted[256], got[256];
    uint32_t wanted_count = 256, got_count = 256;
    cr_assert_eq(
        tokenizer_encode(tokenizer, same_as, strlen(same_as), flags, wanted, &wanted_count),
        ODSI_OK);
    cr_assert_eq(tokenizer_encode_segments(tokenizer, segments, count, flags, got, &got_count),
                 ODSI_OK);
    cr_assert_eq(got_count, wanted_count, "%s", same_as);
    cr_expect_eq(memcmp(got, wanted, got_count * sizeof *got), 0, "%s", same_as);
}

/* Goal: a text in segments gets the ids of the whole, wherever the borders are, in every family;
 * a message cannot forge a control token, not even with the help of its neighbours. */
Test(tokenizer_bytes, encodes_segments_as_the_whole_but_for_forged_tokens)
{
    static const char whole[] = "<s>the machine's  caf\xc3\xa9\n\n <|end|>once [X] upon <s>";
    for (size_t p = 0; p < PIPELINE_COUNT; p++) {
        struct tokenizer *tokenizer = tokenizer_of_pipeline(pipelines[p]);
        for (size_t cut = 3; cut <= 26; cut++) { /* behind <s>, before <|end|> */
            const struct tokenizer_segment segments[] = {
                {whole, 3, 1},
                {whole + 3, cut - 3, 0},
                {NULL, 0, 1},
                {whole + cut, sizeof whole - 1 - cut, 1},
            };
            expect_segments(tokenizer, segments, 4, whole,
                            TOKENIZER_SPECIAL | (cut % 2 ? TOKENIZER_BOS : 0));
        }
        expect_segments(tokenizer, NULL, 0, "", TOKENIZER_BOS);
        const struct tokenizer_segment forged[][3] = {
            {{"a", 1, 1}, {"<|end|>", 7, 0}, {"b", 1, 1}},
            {{"a<|en", 5, 1}, {"d|>", 3, 0}, {"b", 1, 1}},
            {{"a<|en", 5, 1}, {"d|>b", 4, 1}, {"", 0, 1}},
            {{"a", 1, 1}, {"<|end|", 6, 0}, {">b", 2, 1}},
        };
        for (size_t i = 0; i < 4; i++)
            expect_segments(tokenizer, forged[i], 3, "a<|end|>b", 0);
        tokenizer_close(&tokenizer);
    }
}

/* ---- speed ---------------------------------------------------------------------------------- */

/* Goal: no text takes quadratic time. How: megabytes of one letter, of spaces before a word, of
 * letters without a space, of halves of characters, in every family. */
Test(tokenizer_bytes, encodes_megabytes_of_one_word_quickly, .timeout = 300)
{
    static const char *const parts[] = {"a", " ", "the", "\xe2\x96", "\n", "<|end|", "ab1!"};
    const size_t size = 1u << 20;
    char *text = NULL;
    uint32_t *ids = NULL;
    cr_assert_eq(alloc_zeroed(&text, size, 1), ODSI_OK);
    cr_assert_eq(alloc_zeroed(&ids, 3 * size, sizeof *ids), ODSI_OK);
    for (size_t p = 0; p < PIPELINE_COUNT; p++) {
        struct tokenizer *tokenizer = tokenizer_of_pipeline(pipelines[p]);
        for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++) {
            uint32_t count = (uint32_t)(3 * size);
            const size_t part_size = strlen(parts[i]);
            for (size_t at = 0; at < size; at++)
                text[at] = parts[i][at % part_size];
            text[size - 1] = 'x';
            const clock_t start = clock();
            cr_assert_eq(tokenizer_encode(tokenizer, text, size, TOKENIZER_SPECIAL, ids, &count),
                         ODSI_OK, "%s", odsi_err_text());
            cr_expect((double)(clock() - start) / CLOCKS_PER_SEC < 20.0, "%s", pipelines[p]);
        }
        tokenizer_close(&tokenizer);
    }
    alloc_free(text);
    alloc_free(ids);
}

/* ---- threads -------------------------------------------------------------------------------- */

struct worker {
    const struct tokenizer *tokenizer;
    uint32_t ids[256];
    uint32_t count;
    int wrong;
};

static void *encode_again_and_again(void *context)
{
    static const char text[] = "the machine's 123 words, [X] <s> \xff and the machine's again\n\n";
    struct worker *self = context;
    for (int round = 0; round < 200; round++) {
        uint32_t ids[256];
        uint32_t count = 256;
        self->wrong |= tokenizer_encode(self->tokenizer, text, sizeof text - 1, TOKENIZER_SPECIAL,
                                        ids, &count) != ODSI_OK;
        self->wrong |=
            round > 0 && (count != self->count || memcmp(ids, self->ids, count * sizeof *ids) != 0);
        memcpy(self->ids, ids, count * sizeof *ids);
        self->count = count;
    }
    return NULL;
}

/* Goal: threads share a tokenizer without a lock. How: four of them, under the thread sanitizer. */
Test(tokenizer_bytes, serves_many_threads_at_once)
{
    for (size_t p = 0; p < PIPELINE_COUNT; p += 3) {
        struct tokenizer *tokenizer = tokenizer_of_pipeline(pipelines[p]);
        static struct worker workers[4];
        pthread_t threads[4];
        for (int i = 0; i < 4; i++) {
            workers[i] = (struct worker){.tokenizer = tokenizer};
            cr_assert_eq(pthread_create(&threads[i], NULL, encode_again_and_again, &workers[i]), 0);
        }
        for (int i = 0; i < 4; i++)
            cr_assert_eq(pthread_join(threads[i], NULL), 0);
        for (int i = 0; i < 4; i++) {
            cr_expect_not(workers[i].wrong);
            cr_expect_eq(workers[i].count, workers[0].count);
            cr_expect_eq(memcmp(workers[i].ids, workers[0].ids, workers[0].count * 4), 0);
        }
        tokenizer_close(&tokenizer);
    }
}

/* ---- bytes that lie ------------------------------------------------------------------------- */

/* Where the merges of the llama3 vocabulary begin, counted from the end: no template follows. */
static size_t merges_at(const struct buf *bytes, uint32_t merge_count)
{
    return bytes->size - 4 - 8 * (size_t)merge_count - 4;
}

static void expect_open(const struct buf *bytes, enum odsi_err err, const char *says)
{
    struct tokenizer *tokenizer = NULL;
    cr_expect_eq(tokenizer_open(&tokenizer, bytes->data, bytes->size), err, "%s", says);
    cr_expect_not_null(strstr(odsi_err_text(), says), "\"%s\" does not say \"%s\"", odsi_err_text(),
                       says);
    tokenizer_close(&tokenizer);
}

Test(tokenizer_bytes, refuses_heads_and_merges_that_lie)
{
    json_t *json = tokenizer_pipeline("llama3");
    struct buf bytes;
    tokenizer_canonical(&bytes, json);
    const size_t merge_count =
        json_array_size(json_object_get(json_object_get(json, "model"), "merges"));
    const size_t merges = merges_at(&bytes, (uint32_t)merge_count);
    struct {
        size_t at;
        uint8_t value;
        enum odsi_err err;
        const char *says;
    } const cases[] = {
        {8, 4, ODSI_ERR_UNSUPPORTED, "kind 4"},
        {8, 1, ODSI_ERR_CORRUPT, "only byte-level BPE has"},
        {8, 3, ODSI_ERR_CORRUPT, "only byte-level BPE has"},
        {12, 77, ODSI_ERR_UNSUPPORTED, "pre-tokenizer 77"},
        {12, 0, ODSI_ERR_UNSUPPORTED, "pre-tokenizer 0"},
        {30, 1, ODSI_ERR_CORRUPT, "puts no space in front"},
        {32, 65, ODSI_ERR_CORRUPT, "65 ends"},
        {merges, (uint8_t)(merge_count + 1), ODSI_ERR_CORRUPT, "merges are cut off"},
        {merges + 7, 1, ODSI_ERR_CORRUPT, "merge 0 is outside the vocabulary"},
        {merges + 4, 0xff, ODSI_ERR_CORRUPT, "merge 0 is not of two normal tokens"},
        {bytes.size - 4, 1, ODSI_ERR_CORRUPT, "template is cut off"},
        {bytes.size - 1, 1, ODSI_ERR_CORRUPT, "template is cut off"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const uint8_t kept = bytes.data[cases[i].at];
        bytes.data[cases[i].at] = cases[i].value;
        expect_open(&bytes, cases[i].err, cases[i].says);
        bytes.data[cases[i].at] = kept;
    }
    struct tokenizer *tokenizer = tokenizer_of_bytes(&bytes);
    tokenizer_close(&tokenizer);
    buf_free(&bytes);
    json_decref(json);
}

Test(tokenizer_bytes, refuses_ends_and_templates_that_lie)
{
    struct tokenizer_head head = {.kind = TOKENIZER_BYTE_BPE,
                                  .pre = TOKENIZER_PRE_GPT2,
                                  .bos = TOKENIZER_NONE,
                                  .eos = TOKENIZER_NONE,
                                  .unknown = TOKENIZER_NONE,
                                  .end_count = 2,
                                  .ends = {5, 5}};
    struct buf bytes;
    buf_init(&bytes, 1u << 20);
    tokenizer_write_head(&bytes, &head, 1);
    expect_open(&bytes, ODSI_ERR_CORRUPT, "ends do not ascend");
    buf_reset(&bytes);
    head.ends[1] = 6;
    tokenizer_write_head(&bytes, &head, 1);
    cr_assert_eq(tokenizer_write_token(&bytes, 0, 1, "a", 1), ODSI_OK);
    expect_open(&bytes, ODSI_ERR_CORRUPT, "an end is outside");
    buf_reset(&bytes);
    head.end_count = 0;
    tokenizer_write_head(&bytes, &head, 1);
    cr_assert_eq(tokenizer_write_token(&bytes, 0, 1, "a", 1), ODSI_OK);
    expect_open(&bytes, ODSI_ERR_CORRUPT, "byte 0 has no token");
    buf_reset(&bytes);
    tokenizer_write_head(&bytes, &head, 1);
    char name[TOKENIZER_SPECIAL_SIZE_MAX + 1];
    memset(name, 'x', sizeof name);
    cr_assert_eq(tokenizer_write_token(&bytes, 0, 3, name, sizeof name), ODSI_OK);
    expect_open(&bytes, ODSI_ERR_UNSUPPORTED, "special token 0 has 129 bytes");
    cr_expect_eq(tokenizer_write_template(&bytes, name, TOKENIZER_TEMPLATE_SIZE_MAX + 1),
                 ODSI_ERR_UNSUPPORTED);
    buf_free(&bytes);
}

/* Goal: a byte without a token shows itself, as in vocabularies that lack bytes which UTF-8 never
 * has. */
Test(tokenizer_bytes, spells_a_byte_without_a_token_as_a_replacement_character)
{
    json_t *json = tokenizer_pipeline("gpt-2");
    json_t *vocab = json_object_get(json_object_get(json, "model"), "vocab");
    cr_assert_eq(json_object_del(vocab, "\xc3\xbf"), 0); /* U+00FF stands for byte 0xff */
    struct buf bytes;
    tokenizer_canonical(&bytes, json);
    struct tokenizer *tokenizer = tokenizer_of_bytes(&bytes);
    uint32_t ids[8];
    uint32_t count = 8;
    char text[16];
    size_t size = sizeof text;
    cr_assert_eq(tokenizer_encode(tokenizer, "a\xff", 2, 0, ids, &count), ODSI_OK);
    cr_assert_eq(tokenizer_decode(tokenizer, ids, count, text, &size), ODSI_OK);
    cr_expect_eq(size, 4);
    cr_expect_eq(memcmp(text, "a\xef\xbf\xbd", 4), 0);
    tokenizer_close(&tokenizer);
    buf_free(&bytes);
    json_decref(json);
}

/* Goal: no cut and no changed byte brings it to misbehave; what opens can be used. */
Test(tokenizer_bytes, survives_cuts_and_changed_bytes, .timeout = 120)
{
    static const uint8_t masks[] = {0x01, 0x80, 0xff};
    static const char *const names[] = {"llama3", "llama2"};
    for (size_t n = 0; n < 2; n++) {
        struct buf bytes;
        json_t *json = tokenizer_pipeline(names[n]);
        tokenizer_canonical(&bytes, json);
        for (size_t size = 0; size < bytes.size; size += size < 200 ? 1 : 13) {
            struct tokenizer *tokenizer = NULL;
            uint8_t *copy = NULL;
            cr_assert_eq(alloc_zeroed(&copy, size, 1), ODSI_OK);
            memcpy(copy, bytes.data, size);
            cr_expect_eq(tokenizer_open(&tokenizer, copy, size), ODSI_ERR_CORRUPT, "%zu", size);
            alloc_free(copy);
        }
        for (size_t at = 0; at < bytes.size; at += at < 600 ? 1 : 7) {
            struct tokenizer *tokenizer = NULL;
            uint32_t ids[64];
            uint32_t count = 64;
            bytes.data[at] ^= masks[at % 3];
            const enum odsi_err err = tokenizer_open(&tokenizer, bytes.data, bytes.size);
            if (err == ODSI_OK)
                cr_expect_eq(tokenizer_encode(tokenizer, "Once <s> \xff", 10, TOKENIZER_SPECIAL,
                                              ids, &count),
                             ODSI_OK);
            else
                cr_expect(err == ODSI_ERR_CORRUPT || err == ODSI_ERR_UNSUPPORTED);
            tokenizer_close(&tokenizer);
            bytes.data[at] ^= masks[at % 3];
        }
        buf_free(&bytes);
        json_decref(json);
    }
}

Test(tokenizer_bytes, reports_every_allocation_that_fails)
{
    static const char *const names[] = {"smollm", "gemma"};
    for (size_t n = 0; n < 2; n++) {
        struct buf bytes;
        struct tokenizer *tokenizer = NULL;
        json_t *json = tokenizer_pipeline(names[n]);
        char text[600];
        uint32_t ids[2000];
        tokenizer_canonical(&bytes, json);
        memset(text, 'a', sizeof text);
        long failing = 0;
        for (enum odsi_err err = ODSI_ERR_NO_MEMORY; err != ODSI_OK; failing++) {
            alloc_fail_after(failing);
            err = tokenizer_open(&tokenizer, bytes.data, bytes.size);
            alloc_fail_after(-1);
            cr_assert(err == ODSI_OK || err == ODSI_ERR_NO_MEMORY, "%s", odsi_err_text());
            cr_assert_eq(tokenizer != NULL, err == ODSI_OK);
        }
        cr_expect_gt(failing, 8);
        failing = 0;
        for (enum odsi_err err = ODSI_ERR_NO_MEMORY; err != ODSI_OK; failing++) {
            uint32_t count = 2000;
            alloc_fail_after(failing);
            err = tokenizer_encode(tokenizer, text, sizeof text, 0, ids, &count);
            alloc_fail_after(-1);
            cr_assert(err == ODSI_OK || err == ODSI_ERR_NO_MEMORY, "%s", odsi_err_text());
        }
        cr_expect_gt(failing, 4);
        tokenizer_close(&tokenizer);
        buf_free(&bytes);
        json_decref(json);
    }
}
