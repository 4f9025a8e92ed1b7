#include "worker/model/tokenizer.h"

#include "common/base/alloc.h"
#include "tests/unit/model/model_fixture.h"
#include "worker/model/model.h"
#include "worker/model/vocab.h"

#include <criterion/criterion.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MARK "\xe2\x96\x81" /* U+2581, a space in a piece */

enum { NORMAL = 1, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE };

/* ---- tokenizers to try ---------------------------------------------------------------------- */

static void demo_bytes(struct buf *out)
{
    struct gguf *gguf = NULL;
    uint32_t count;
    buf_init(out, TOKENIZER_CANONICAL_SIZE_MAX);
    cr_assert_eq(gguf_open(&gguf, FIXTURE_DEMO), ODSI_OK, "%s", odsi_err_text());
    cr_assert_eq(vocab_canonical(gguf, out, &count), ODSI_OK, "%s", odsi_err_text());
    gguf_close(&gguf);
}

static struct tokenizer *open_bytes(const struct buf *bytes)
{
    struct tokenizer *tokenizer = NULL;
    cr_assert_eq(buf_status(bytes), ODSI_OK);
    cr_assert_eq(tokenizer_open(&tokenizer, bytes->data, bytes->size), ODSI_OK, "%s",
                 odsi_err_text());
    return tokenizer;
}

static struct tokenizer *demo_tokenizer(void)
{
    struct buf bytes;
    demo_bytes(&bytes);
    struct tokenizer *tokenizer = open_bytes(&bytes);
    buf_free(&bytes);
    return tokenizer;
}

struct head {
    uint32_t kind, bos, eos, unknown;
    uint8_t flags[4]; /* add_bos, add_eos, add_space_prefix, ignore_merges */
    uint32_t count;
    uint32_t pre;
    uint32_t end_count;
    uint32_t ends[4];
};

static const struct head usual = {.kind = 1, .bos = 1, .eos = 2, .flags = {1, 0, 1, 0}};

static void put_head(struct buf *out, struct head head)
{
    (void)buf_append_text(out, "ODSITOK2");
    (void)buf_append_u32(out, head.kind);
    (void)buf_append_u32(out, head.pre);
    (void)buf_append_u32(out, head.bos);
    (void)buf_append_u32(out, head.eos);
    (void)buf_append_u32(out, head.unknown);
    (void)buf_append(out, head.flags, 4);
    (void)buf_append_u32(out, head.end_count);
    for (uint32_t i = 0; i < head.end_count && i < 4; i++)
        (void)buf_append_u32(out, head.ends[i]);
    (void)buf_append_u32(out, head.count);
}

/* No merges and no chat template. */
static void put_tail(struct buf *out)
{
    (void)buf_append_u64(out, 0);
}

static void put_token(struct buf *out, float score, int type, const char *piece)
{
    const uint8_t size[2] = {(uint8_t)strlen(piece), (uint8_t)(strlen(piece) >> 8)};
    uint32_t bits;
    memcpy(&bits, &score, sizeof bits);
    (void)buf_append_u32(out, bits);
    (void)buf_append_u8(out, (uint8_t)type);
    (void)buf_append(out, size, 2);
    (void)buf_append_text(out, piece);
}

/* The three specials and 256 bytes, ids 0 to 258. */
static void put_first_tokens(struct buf *out)
{
    put_token(out, 0, UNKNOWN, "<unk>");
    put_token(out, 0, CONTROL, "<s>");
    put_token(out, 0, CONTROL, "</s>");
    for (int byte = 0; byte < 256; byte++) {
        char piece[8];
        snprintf(piece, sizeof piece, "<0x%02X>", byte);
        put_token(out, 0, BYTE, piece);
    }
}

struct piece {
    const char *text;
    float score;
    int type;
};

/* specials, bytes, then these from id 259 on. */
static struct tokenizer *make(const struct piece *pieces, uint32_t count, struct head head)
{
    struct buf bytes;
    buf_init(&bytes, 1u << 20);
    head.count = 259 + count;
    put_head(&bytes, head);
    put_first_tokens(&bytes);
    for (uint32_t i = 0; i < count; i++)
        put_token(&bytes, pieces[i].score, pieces[i].type, pieces[i].text);
    put_tail(&bytes);
    struct tokenizer *tokenizer = open_bytes(&bytes);
    buf_free(&bytes);
    return tokenizer;
}

static void expect_ids(const struct tokenizer *tokenizer, const char *text, unsigned flags,
                       uint32_t count, const uint32_t *wanted)
{
    uint32_t ids[256];
    uint32_t got = 256;
    cr_assert_eq(tokenizer_encode(tokenizer, text, strlen(text), flags, ids, &got), ODSI_OK);
    cr_expect_eq(got, count, "\"%s\" gives %u ids", text, got);
    for (uint32_t i = 0; i < got && i < count; i++)
        cr_expect_eq(ids[i], wanted[i], "\"%s\": id %u is %u", text, i, ids[i]);
}
#define EXPECT_IDS_OF(tokenizer, text, flags, ...)                                                 \
    expect_ids(tokenizer, text, flags, sizeof((uint32_t[]){__VA_ARGS__}) / 4,                      \
               (uint32_t[]){__VA_ARGS__})
#define EXPECT_IDS(tokenizer, text, ...) EXPECT_IDS_OF(tokenizer, text, TOKENIZER_BOS, __VA_ARGS__)

/* ---- ids ------------------------------------------------------------------------------------ */

/* Goal: ids are those of SentencePiece. How: the prompts of the reference, which it encoded. */
Test(tokenizer, gives_the_ids_of_the_reference)
{
    struct tokenizer *tokenizer = demo_tokenizer();
    json_error_t error;
    json_t *reference = json_load_file("tests/vectors/odsi-tiny/reference.json", 0, &error);
    cr_assert_not_null(reference, "%s", error.text);
    size_t index;
    json_t *entry;
    json_t *cases = json_object_get(reference, "cases");
    cr_assert_eq(json_array_size(cases), 12);
    json_array_foreach(cases, index, entry)
    {
        uint32_t ids[4096];
        uint32_t count = 4096;
        const json_t *prompt = json_object_get(entry, "prompt");
        const json_t *wanted = json_object_get(entry, "prompt_tokens");
        cr_assert_eq(tokenizer_encode(tokenizer, json_string_value(prompt),
                                      json_string_length(prompt), TOKENIZER_BOS | TOKENIZER_SPECIAL,
                                      ids, &count),
                     ODSI_OK);
        cr_assert_eq(count, json_array_size(wanted), "case %zu", index);
        for (uint32_t i = 0; i < count; i++)
            cr_expect_eq(ids[i], json_integer_value(json_array_get(wanted, i)),
                         "case %zu, token %u", index, i);
    }
    json_decref(reference);
    tokenizer_close(&tokenizer);
}

/* Goal: and so is the text of ids. How: the reference's generated ids and texts. */
Test(tokenizer, gives_the_texts_of_the_reference)
{
    struct tokenizer *tokenizer = demo_tokenizer();
    json_error_t error;
    json_t *reference = json_load_file("tests/vectors/odsi-tiny/reference.json", 0, &error);
    cr_assert_not_null(reference, "%s", error.text);
    size_t index;
    json_t *entry;
    json_array_foreach(json_object_get(reference, "cases"), index, entry)
    {
        const json_t *ids = json_object_get(entry, "greedy_tokens");
        const char *wanted = json_string_value(json_object_get(entry, "greedy_text"));
        struct buf text;
        char piece[TOKENIZER_PIECE_SIZE_MAX];
        buf_init(&text, 1u << 16);
        for (size_t i = 0; i < json_array_size(ids); i++) {
            const uint32_t id = (uint32_t)json_integer_value(json_array_get(ids, i));
            (void)buf_append(&text, piece, tokenizer_piece(tokenizer, id, piece));
        }
        const char *got = buf_text_view(&text);
        cr_expect_str_eq(got[0] == ' ' && wanted[0] != ' ' ? got + 1 : got, wanted, "case %zu",
                         index);
        buf_free(&text);
    }
    json_decref(reference);
    tokenizer_close(&tokenizer);
}

Test(tokenizer, joins_the_best_score_first_and_the_leftmost_among_equals)
{
    const struct piece pieces[] = {
        {MARK, -9, NORMAL}, {"a", -9, NORMAL},   {"b", -9, NORMAL},
        {"c", -9, NORMAL},  {"ab", -2, NORMAL},  {"bc", -1, NORMAL},
        {"aa", -3, NORMAL}, {"abc", -5, NORMAL}, {"cc", -4, NORMAL},
    };
    struct tokenizer *tokenizer = make(pieces, 9, usual);
    EXPECT_IDS(tokenizer, "abc", 1, 259, 266);      /* bc first, then a+bc is abc */
    EXPECT_IDS(tokenizer, "aaa", 1, 259, 265, 260); /* the left pair */
    EXPECT_IDS(tokenizer, "ab", 1, 259, 263);
    EXPECT_IDS(tokenizer, "ccccc", 1, 259, 267, 267, 262);
    EXPECT_IDS(tokenizer, "d", 1, 259, 3 + 'd');
    tokenizer_close(&tokenizer);
}

Test(tokenizer, gives_only_the_bos_for_an_empty_prompt)
{
    struct tokenizer *tokenizer = demo_tokenizer();
    EXPECT_IDS(tokenizer, "", 1);
    tokenizer_close(&tokenizer);
}

Test(tokenizer, adds_what_its_flags_say)
{
    const struct piece pieces[] = {{"a", -1, NORMAL}, {MARK "a", -1, NORMAL}, {MARK, -1, NORMAL}};
    struct head head = usual;
    memcpy(head.flags, (uint8_t[4]){0, 1, 0, 0}, 4);
    struct tokenizer *tokenizer = make(pieces, 3, head);
    EXPECT_IDS(tokenizer, "a", 259, 2);
    EXPECT_IDS(tokenizer, "", 2);
    tokenizer_close(&tokenizer);
    memcpy(head.flags, (uint8_t[4]){1, 1, 1, 0}, 4);
    tokenizer = make(pieces, 3, head);
    EXPECT_IDS(tokenizer, "a", 1, 260, 2);
    EXPECT_IDS(tokenizer, " a", 1, 261, 260, 2);
    tokenizer_close(&tokenizer);
}

/* Goal: text cannot command the model. How: the texts of control, unused, unknown and byte pieces,
 * which must be spelt in others, even when merges could build them. */
Test(tokenizer, never_makes_a_control_token_from_plain_text)
{
    const struct piece pieces[] = {
        {MARK, -1, NORMAL}, {"<", -1, NORMAL},     {"s", -1, NORMAL},           {">", -1, NORMAL},
        {"<s", -1, NORMAL}, {"[X]", -1, UNUSED},   {"<|im_end|>", -1, CONTROL}, {"q", -1, UNUSED},
        {"<0", -1, NORMAL}, {"0x41>", -1, NORMAL}, {"0", -1, NORMAL},
    };
    struct tokenizer *tokenizer = make(pieces, 11, usual);
    EXPECT_IDS(tokenizer, "<s>", 1, 259, 263, 262);
    EXPECT_IDS(tokenizer, "q", 1, 259, 3 + 'q');
    const char *const texts[] = {"<unk>", "</s>", "<|im_end|>", "<0x41>", "<0x41", "<|im_end|"};
    for (size_t i = 0; i < 6; i++) {
        uint32_t ids[64];
        uint32_t count = 64;
        char text[64];
        size_t size = sizeof text;
        cr_assert_eq(
            tokenizer_encode(tokenizer, texts[i], strlen(texts[i]), TOKENIZER_BOS, ids, &count),
            ODSI_OK);
        for (uint32_t k = 1; k < count; k++)
            cr_expect(ids[k] > 2 && ids[k] != 265 && ids[k] != 266, "%s", texts[i]);
        cr_assert_eq(tokenizer_decode(tokenizer, ids, count, text, &size), ODSI_OK);
        cr_expect_eq(size, strlen(texts[i]));
        cr_expect_eq(memcmp(text, texts[i], size), 0, "%s", texts[i]);
    }
    tokenizer_close(&tokenizer);
}

/* ---- the plain algorithm, to compare with --------------------------------------------------- */

struct plain_symbol {
    size_t start, size;
};

static size_t character_size(const uint8_t *text, size_t size)
{
    for (size_t length = 2; length <= 4 && length <= size; length++) {
        /* A whole character is what is whole only with its last byte. */
        if (tokenizer_utf8_whole((const char *)text, length - 1) == 0 &&
            tokenizer_utf8_whole((const char *)text, length) == length)
            return (text[length - 1] & 0xc0) == 0x80 ? length : 1;
    }
    return 1;
}

/* The id of a normal piece with this text, by looking at every token. */
static uint32_t plain_find(const struct tokenizer *tokenizer, const char *text, size_t size,
                           const struct piece *pieces, uint32_t count)
{
    char piece[256];
    (void)tokenizer;
    for (uint32_t i = 0; i < count; i++) {
        size_t written = 0;
        for (const char *from = pieces[i].text; *from;)
            if (strncmp(from, MARK, 3) == 0) {
                piece[written++] = ' ';
                from += 3;
            } else {
                piece[written++] = *from++;
            }
        if (written == size && memcmp(piece, text, size) == 0)
            return i;
    }
    return UINT32_MAX;
}

/* Joins the best pair again and again, searching all of them each time. Returns the ids. */
static uint32_t plain_encode(const struct tokenizer *tokenizer, const char *body, size_t body_size,
                             const struct piece *pieces, uint32_t count, uint32_t *ids)
{
    char text[512] = " ";
    struct plain_symbol symbols[512];
    uint32_t symbol_count = 0, id_count = 0;
    memcpy(text + 1, body, body_size);
    for (size_t at = 0; at < body_size + 1;) {
        const size_t size = character_size((const uint8_t *)text + at, body_size + 1 - at);
        symbols[symbol_count++] = (struct plain_symbol){at, size};
        at += size;
    }
    for (;;) {
        uint32_t best = UINT32_MAX;
        float best_score = 0;
        for (uint32_t i = 0; i + 1 < symbol_count; i++) {
            const uint32_t piece = plain_find(tokenizer, text + symbols[i].start,
                                              symbols[i].size + symbols[i + 1].size, pieces, count);
            if (piece != UINT32_MAX && (best == UINT32_MAX || pieces[piece].score > best_score)) {
                best = i;
                best_score = pieces[piece].score;
            }
        }
        if (best == UINT32_MAX)
            break;
        symbols[best].size += symbols[best + 1].size;
        symbol_count--;
        memmove(&symbols[best + 1], &symbols[best + 2],
                (symbol_count - best - 1) * sizeof symbols[0]);
    }
    ids[id_count++] = 1;
    for (uint32_t i = 0; i < symbol_count; i++) {
        const uint32_t piece =
            plain_find(tokenizer, text + symbols[i].start, symbols[i].size, pieces, count);
        if (piece != UINT32_MAX)
            ids[id_count++] = 259 + piece;
        else
            for (size_t k = 0; k < symbols[i].size; k++)
                ids[id_count++] = 3 + (uint32_t)(uint8_t)text[symbols[i].start + k];
    }
    return id_count;
}

/* Goal: the queue gives the ids that the definition gives. How: random vocabularies over a few
 * letters, with many equal scores and texts, against a search of all pairs at every step. */
Test(tokenizer, joins_as_the_plain_algorithm_does)
{
    static const char *const letters[] = {MARK, "a", "b", "\xc3\xa9", "\xf0\x9f\xa6\x8a"};
    static const char *const text_letters[] = {" ",    "a",  "b", "\xc3\xa9", "\xf0\x9f\xa6\x8a",
                                               "\xc3", MARK, "x"};
    uint64_t seed = (uint64_t)time(NULL);
    cr_log_info("seed %llu", (unsigned long long)seed);
    const uint64_t printed = seed;
    for (int round = 0; round < 300; round++) {
        char texts[40][64];
        struct piece pieces[40];
        for (uint32_t i = 0; i < 40; i++) {
            const uint64_t length = i < 5 ? 1 : 2 + fixture_random(&seed) % 4;
            texts[i][0] = '\0';
            for (uint64_t k = 0; k < length; k++)
                strncat(texts[i], letters[i < 5 ? i : fixture_random(&seed) % 5], 8);
            pieces[i] = (struct piece){texts[i], -(float)(fixture_random(&seed) % 4), NORMAL};
        }
        struct tokenizer *tokenizer = make(pieces, 40, usual);
        for (int text_index = 0; text_index < 10; text_index++) {
            char text[400] = "";
            uint32_t wanted[1024], got[1024];
            const uint64_t length = 1 + fixture_random(&seed) % 60;
            for (uint64_t k = 0; k < length; k++)
                strncat(text, text_letters[fixture_random(&seed) % 8], 8);
            const uint32_t wanted_count =
                plain_encode(tokenizer, text, strlen(text), pieces, 40, wanted);
            uint32_t count = 1024;
            cr_assert_eq(
                tokenizer_encode(tokenizer, text, strlen(text), TOKENIZER_BOS, got, &count),
                ODSI_OK);
            cr_assert_eq(count, wanted_count, "seed %llu, text \"%s\"", (unsigned long long)printed,
                         text);
            cr_assert_eq(memcmp(got, wanted, count * sizeof got[0]), 0, "seed %llu, text \"%s\"",
                         (unsigned long long)printed, text);
        }
        tokenizer_close(&tokenizer);
    }
}

/* ---- there and back ------------------------------------------------------------------------- */

static void expect_same(const struct tokenizer *tokenizer, const char *text, size_t size,
                        uint64_t seed)
{
    static uint32_t ids[20000];
    static char back[20000];
    uint32_t count = 20000;
    size_t back_size = sizeof back;
    cr_assert_eq(tokenizer_encode(tokenizer, text, size, TOKENIZER_BOS, ids, &count), ODSI_OK, "%s",
                 odsi_err_text());
    cr_assert_eq(tokenizer_decode(tokenizer, ids, count, back, &back_size), ODSI_OK);
    cr_assert_eq(back_size, size, "seed %llu", (unsigned long long)seed);
    cr_assert_eq(memcmp(back, text, size), 0, "seed %llu", (unsigned long long)seed);
}

/* Goal: no text is lost, whatever its bytes. How: texts that are known to be hard, all bytes and
 * pairs of bytes, random bytes, random pieces of UTF-8 and of the vocabulary's own words. */
Test(tokenizer, gives_every_text_back)
{
    static const char *const hard[] = {
        "",
        " ",
        "  ",
        " a",
        "a ",
        "\n",
        "\t\r\n",
        MARK,
        " " MARK,
        MARK " ",
        MARK MARK "a",
        "\xe2\x96",
        "\xe2\x96\xe2\x96\x81\x81",
        "<s>",
        "</s>",
        "<unk>",
        "<0x41>",
        "\xef\xbb\xbfx",
        "\xff\xfe",
        "\xed\xa0\x80",
        "\xf4\x90\x80\x80",
        "\xc0\x80",
        "Once upon a time",
        "Zo\xc3\xab",
    };
    struct tokenizer *tokenizer = demo_tokenizer();
    uint64_t seed = (uint64_t)time(NULL);
    const uint64_t printed = seed;
    char text[600];
    for (size_t i = 0; i < sizeof hard / sizeof hard[0]; i++)
        expect_same(tokenizer, hard[i], strlen(hard[i]), 0);
    for (uint32_t pair = 0; pair < 65536; pair++) {
        const char two[2] = {(char)(pair >> 8), (char)pair};
        expect_same(tokenizer, two, 1 + (pair & 1), 0);
        expect_same(tokenizer, two, 2, 0);
    }
    for (int round = 0; round < 3000; round++) {
        const size_t size = fixture_random(&seed) % sizeof text;
        static const char some[] = " \xe2\x96\x81 aeionst\n\xf0\x9f\xa6\x8a\xc3";
        for (size_t i = 0; i < size; i++)
            text[i] = round % 2 ? (char)fixture_random(&seed)
                                : some[fixture_random(&seed) % (sizeof some - 1)];
        expect_same(tokenizer, text, size, printed);
    }
    tokenizer_close(&tokenizer);
}

/* Goal: streaming gives the same text as decoding at once. */
Test(tokenizer, gives_pieces_that_add_up_to_the_text)
{
    struct tokenizer *tokenizer = demo_tokenizer();
    const char text[] = "One day, Zo\xc3\xab saw\n a fox \xf0\x9f\xa6\x8a!";
    uint32_t ids[128];
    uint32_t count = 128;
    struct buf joined;
    static char piece[TOKENIZER_PIECE_SIZE_MAX];
    buf_init(&joined, 4096);
    cr_assert_eq(tokenizer_encode(tokenizer, text, strlen(text), TOKENIZER_BOS, ids, &count),
                 ODSI_OK);
    for (uint32_t i = 0; i < count; i++)
        (void)buf_append(&joined, piece, tokenizer_piece(tokenizer, ids[i], piece));
    cr_expect_str_eq(buf_text_view(&joined) + 1, text);
    cr_expect_eq(joined.data[0], ' ');
    cr_expect_eq(tokenizer_piece(tokenizer, 1, piece), 0, "bos");
    cr_expect_eq(tokenizer_piece(tokenizer, 2, piece), 0, "eos");
    cr_expect_eq(tokenizer_piece(tokenizer, 1024, piece), 0, "outside");
    cr_expect_eq(tokenizer_piece(tokenizer, UINT32_MAX, piece), 0);
    buf_free(&joined);
    tokenizer_close(&tokenizer);
}

Test(tokenizer, says_how_much_room_it_needs)
{
    struct tokenizer *tokenizer = demo_tokenizer();
    const char text[] = "Once upon a time";
    uint32_t ids[64];
    uint32_t whole = 64;
    char back[64];
    size_t size;
    cr_assert_eq(tokenizer_encode(tokenizer, text, 16, TOKENIZER_BOS, ids, &whole), ODSI_OK);
    for (uint32_t room = 0; room < whole; room++) {
        uint32_t count = room;
        ids[room] = 12345;
        cr_expect_eq(tokenizer_encode(tokenizer, text, 16, TOKENIZER_BOS, ids, &count),
                     ODSI_ERR_RANGE);
        cr_expect_eq(count, whole);
        cr_expect_eq(ids[room], 12345, "nothing is written behind the room");
    }
    cr_assert_eq(tokenizer_encode(tokenizer, text, 16, TOKENIZER_BOS, ids, &whole), ODSI_OK);
    for (size_t room = 0; room < 16; room++) {
        size = room;
        back[room] = '#';
        cr_expect_eq(tokenizer_decode(tokenizer, ids, whole, back, &size), ODSI_ERR_RANGE);
        cr_expect_eq(size, 16);
        cr_expect_eq(back[room], '#');
    }
    size = 16;
    cr_expect_eq(tokenizer_decode(tokenizer, ids, whole, back, &size), ODSI_OK);
    uint32_t count = 64;
    cr_expect_eq(tokenizer_encode(tokenizer, text, (size_t)TOKENIZER_TEXT_SIZE_MAX + 1,
                                  TOKENIZER_BOS, ids, &count),
                 ODSI_ERR_INVALID);
    tokenizer_close(&tokenizer);
}

/* Goal: a long prompt takes no quadratic time. How: a megabyte that joins over and over; looking
 * at every pair for every join would take hours. */
Test(tokenizer, encodes_a_megabyte_quickly, .timeout = 120)
{
    const struct piece pieces[] = {{MARK, -9, NORMAL},       {"a", -9, NORMAL},
                                   {"aa", -1, NORMAL},       {"aaaa", -1, NORMAL},
                                   {"aaaaaaaa", -1, NORMAL}, {"aaaaaaaaaaaaaaaa", -1, NORMAL}};
    const size_t size = 1u << 20;
    struct tokenizer *tokenizer = make(pieces, 6, usual);
    char *text = NULL;
    uint32_t *ids = NULL;
    uint32_t count = 1u << 20;
    cr_assert_eq(alloc_zeroed(&text, size, 1), ODSI_OK);
    cr_assert_eq(alloc_zeroed(&ids, count, sizeof *ids), ODSI_OK);
    memset(text, 'a', size);
    const clock_t start = clock();
    cr_assert_eq(tokenizer_encode(tokenizer, text, size, TOKENIZER_BOS, ids, &count), ODSI_OK);
    cr_expect((double)(clock() - start) / CLOCKS_PER_SEC < 20.0);
    cr_expect_eq(count, 2 + size / 16);
    alloc_free(text);
    alloc_free(ids);
    tokenizer_close(&tokenizer);
}

/* ---- ends, unknowns, characters ------------------------------------------------------------- */

Test(tokenizer, knows_its_special_ids)
{
    const struct piece pieces[] = {{"<|im_end|>", 0, CONTROL},
                                   {"<end_of_turn>", 0, USER_DEFINED},
                                   {"<|eot_id|>", 0, NORMAL},
                                   {"<|im_start|>", 0, CONTROL}};
    struct head head = usual;
    head.end_count = 2;
    head.ends[0] = 259;
    head.ends[1] = 260;
    struct tokenizer *tokenizer = make(pieces, 4, head);
    cr_expect_eq(tokenizer_vocab_size(tokenizer), 263);
    cr_expect_eq(tokenizer_bos(tokenizer), 1);
    cr_expect_eq(tokenizer_eos(tokenizer), 2);
    cr_expect(tokenizer_is_end(tokenizer, 2));
    cr_expect(tokenizer_is_end(tokenizer, 259));
    cr_expect(tokenizer_is_end(tokenizer, 260));
    cr_expect_not(tokenizer_is_end(tokenizer, 261), "a normal piece is text");
    cr_expect_not(tokenizer_is_end(tokenizer, 262));
    cr_expect_not(tokenizer_is_end(tokenizer, 1));
    cr_expect_not(tokenizer_is_end(tokenizer, 263));
    tokenizer_close(&tokenizer);
}

Test(tokenizer, uses_unknown_where_a_byte_has_no_token)
{
    struct buf bytes;
    struct tokenizer *tokenizer = NULL;
    char text[64];
    size_t size = sizeof text;
    buf_init(&bytes, 4096);
    struct head head = {.kind = 1, .bos = TOKENIZER_NONE, .eos = TOKENIZER_NONE, .count = 2};
    put_head(&bytes, head);
    put_token(&bytes, 0, UNKNOWN, "<unk>");
    put_token(&bytes, 0, NORMAL, "a");
    put_tail(&bytes);
    tokenizer = open_bytes(&bytes);
    EXPECT_IDS(tokenizer, "aba", 1, 0, 1);
    cr_expect_eq(tokenizer_decode(tokenizer, (uint32_t[]){1, 0, 1}, 3, text, &size), ODSI_OK);
    cr_expect_eq(size, 5);
    cr_expect_eq(memcmp(text,
                        "a\xef\xbf\xbd"
                        "a",
                        5),
                 0);
    tokenizer_close(&tokenizer);

    buf_reset(&bytes);
    head.unknown = TOKENIZER_NONE;
    put_head(&bytes, head);
    put_token(&bytes, 0, NORMAL, "b");
    put_token(&bytes, 0, NORMAL, "a");
    cr_expect_eq(tokenizer_open(&tokenizer, bytes.data, bytes.size), ODSI_ERR_CORRUPT);
    cr_expect_not_null(strstr(odsi_err_text(), "byte 0 has no token"));

    /* Found by fuzzing: an unknown token that is the bos too adds nothing to a text. */
    buf_reset(&bytes);
    head.unknown = head.bos = 1;
    put_head(&bytes, head);
    put_token(&bytes, 0, NORMAL, "b");
    put_token(&bytes, 0, CONTROL, "<s>");
    cr_expect_eq(tokenizer_open(&tokenizer, bytes.data, bytes.size), ODSI_ERR_CORRUPT);
    buf_free(&bytes);
}

/* Whether some bytes after text make its last character whole: tried out with all there are. */
static int can_be_completed(const char *text, size_t size)
{
    static const uint8_t tails[][3] = {{0x80, 0, 0},    {0x80, 0x80, 0},    {0x80, 0x80, 0x80},
                                       {0xa0, 0, 0},    {0xa0, 0x80, 0},    {0xa0, 0x80, 0x80},
                                       {0x90, 0x80, 0}, {0x90, 0x80, 0x80}, {0xbf, 0xbf, 0xbf}};
    for (size_t i = 0; i < sizeof tails / sizeof tails[0]; i++)
        for (size_t length = 1; length <= 3; length++) {
            char whole[8];
            memcpy(whole, text, size);
            memcpy(whole + size, tails[i], length);
            json_t *value = json_stringn(whole, size + length); /* NULL unless valid UTF-8 */
            json_decref(value);
            if (value)
                return 1;
        }
    return 0;
}

/* Goal: a stream is cut exactly before a character that is not whole yet. How: all texts of two
 * bytes against another UTF-8 decoder, and the cases of RFC 3629 that look like characters. */
Test(tokenizer, cuts_streams_between_characters)
{
    for (uint32_t bits = 0; bits < 1u << 16; bits++) {
        const char text[2] = {(char)(bits >> 8), (char)bits};
        size_t wanted = 2;
        if (can_be_completed(text, 2) && (uint8_t)text[0] >= 0xe0)
            wanted = 0;
        else if ((uint8_t)text[1] >= 0x80 && can_be_completed(text + 1, 1))
            wanted = 1;
        cr_assert_eq(tokenizer_utf8_whole(text, 2), wanted, "%02x %02x", (uint8_t)text[0],
                     (uint8_t)text[1]);
    }
    cr_expect_eq(tokenizer_utf8_whole("", 0), 0);
    cr_expect_eq(tokenizer_utf8_whole("a\xf0\x9f\xa6", 4), 1);
    cr_expect_eq(tokenizer_utf8_whole("a\xf0\x9f\xa6\x8a", 5), 5);
    cr_expect_eq(tokenizer_utf8_whole("a\xf0\x8f\x80", 4), 4, "overlong: never valid");
    cr_expect_eq(tokenizer_utf8_whole("\x80\x80\x80\x80", 4), 4);
    cr_expect_eq(tokenizer_utf8_whole("\xe2\x96", 2), 0);
    cr_expect_eq(tokenizer_utf8_whole("\xed\xa0", 2), 2, "a surrogate: never valid");
}

/* ---- bytes that lie ------------------------------------------------------------------------- */

static void expect_refused(struct head head, void (*put_tokens)(struct buf *out), enum odsi_err err,
                           const char *says)
{
    struct buf bytes;
    struct tokenizer *tokenizer = NULL;
    buf_init(&bytes, 1u << 20);
    put_head(&bytes, head);
    put_first_tokens(&bytes);
    if (put_tokens)
        put_tokens(&bytes);
    else if (err != ODSI_ERR_CORRUPT || strstr(says, "cut off") == NULL)
        put_tail(&bytes);
    cr_expect_eq(tokenizer_open(&tokenizer, bytes.data, bytes.size), err, "%s", says);
    cr_expect_null(tokenizer);
    cr_expect_not_null(strstr(odsi_err_text(), says), "\"%s\" does not say \"%s\"", odsi_err_text(),
                       says);
    buf_free(&bytes);
}

static void put_type_0(struct buf *out)
{
    put_token(out, 0, 0, "x");
}

static void put_type_7(struct buf *out)
{
    put_token(out, 0, 7, "x");
}

static void put_nan(struct buf *out)
{
    put_token(out, __builtin_nanf(""), NORMAL, "x");
}

static void put_infinity(struct buf *out)
{
    put_token(out, __builtin_inff(), NORMAL, "x");
}

static void put_bad_byte(struct buf *out)
{
    put_token(out, 0, BYTE, "<0xg0>");
}

static void put_long_piece(struct buf *out)
{
    (void)buf_append(out,
                     "\0\0\0\0\1\xff\xff"
                     "abc",
                     10);
}

static void put_more_bytes(struct buf *out)
{
    put_tail(out);
    (void)buf_append_u8(out, 0);
}

Test(tokenizer, refuses_bytes_that_lie)
{
    const struct head head = {.kind = 1, .bos = 1, .eos = 2, .flags = {1, 0, 1, 0}, .count = 259};
    struct head changed = head;
    struct head more = head;
    more.count = 260;
    expect_refused(more, put_type_0, ODSI_ERR_CORRUPT, "token 259 has type 0");
    expect_refused(more, put_type_7, ODSI_ERR_CORRUPT, "token 259 has type 7");
    expect_refused(more, put_nan, ODSI_ERR_CORRUPT, "token 259 has no finite score");
    expect_refused(more, put_infinity, ODSI_ERR_CORRUPT, "token 259 has no finite score");
    expect_refused(more, put_bad_byte, ODSI_ERR_CORRUPT, "token 259 is not a byte");
    expect_refused(more, put_long_piece, ODSI_ERR_CORRUPT, "token 259 is cut off");
    expect_refused(more, NULL, ODSI_ERR_CORRUPT, "token 259 is cut off");
    expect_refused(head, put_type_0, ODSI_ERR_CORRUPT, "template is cut off");
    expect_refused(head, put_more_bytes, ODSI_ERR_CORRUPT, "bytes follow");
    changed.kind = 4;
    expect_refused(changed, NULL, ODSI_ERR_UNSUPPORTED, "kind 4");
    changed = head;
    changed.count = UINT32_MAX;
    expect_refused(changed, NULL, ODSI_ERR_CORRUPT, "4294967295 tokens");
    changed.count = 0;
    expect_refused(changed, NULL, ODSI_ERR_CORRUPT, "0 tokens");
    changed = head;
    changed.bos = 259;
    expect_refused(changed, NULL, ODSI_ERR_CORRUPT, "outside the vocabulary");
    changed = head;
    changed.bos = TOKENIZER_NONE;
    expect_refused(changed, NULL, ODSI_ERR_CORRUPT, "does not have");
    for (int i = 0; i < 4; i++) {
        changed = head;
        changed.flags[i] = 3;
        expect_refused(changed, NULL, ODSI_ERR_CORRUPT, "flag");
    }
}

/* Goal: no cut and no changed byte brings it to misbehave; what opens can be used. */
Test(tokenizer, survives_cuts_and_changed_bytes)
{
    static const uint8_t masks[] = {0x01, 0x80, 0xff};
    struct buf bytes;
    demo_bytes(&bytes);
    for (size_t size = 0; size < bytes.size; size++) {
        struct tokenizer *tokenizer = NULL;
        uint8_t *copy = NULL;
        if (size > 2000 && size % 61 != 0)
            continue;
        cr_assert_eq(alloc_zeroed(&copy, size, 1), ODSI_OK);
        memcpy(copy, bytes.data, size);
        cr_expect_eq(tokenizer_open(&tokenizer, copy, size), ODSI_ERR_CORRUPT, "cut at %zu", size);
        alloc_free(copy);
    }
    for (size_t at = 0; at < bytes.size; at += at < 6000 ? 1 : 17) {
        struct tokenizer *tokenizer = NULL;
        uint32_t ids[64];
        uint32_t count = 64;
        const uint8_t mask = masks[at % 3];
        bytes.data[at] ^= mask;
        const enum odsi_err err = tokenizer_open(&tokenizer, bytes.data, bytes.size);
        if (err == ODSI_OK)
            cr_expect_eq(
                tokenizer_encode(tokenizer, "Once upon \xff", 11, TOKENIZER_BOS, ids, &count),
                ODSI_OK);
        else
            cr_expect(err == ODSI_ERR_CORRUPT || err == ODSI_ERR_UNSUPPORTED);
        tokenizer_close(&tokenizer);
        bytes.data[at] ^= mask;
    }
    buf_free(&bytes);
}

Test(tokenizer, reports_every_allocation_that_fails)
{
    struct buf bytes;
    struct tokenizer *tokenizer = NULL;
    uint32_t ids[64];
    long failing = 0;
    demo_bytes(&bytes);
    for (;; failing++) {
        alloc_fail_after(failing);
        const enum odsi_err err = tokenizer_open(&tokenizer, bytes.data, bytes.size);
        alloc_fail_after(-1);
        if (err == ODSI_OK)
            break;
        cr_assert_eq(err, ODSI_ERR_NO_MEMORY);
        cr_assert_null(tokenizer);
    }
    cr_expect_eq(failing, 7, "%ld", failing);
    for (failing = 0;; failing++) {
        uint32_t count = 64;
        alloc_fail_after(failing);
        const enum odsi_err err =
            tokenizer_encode(tokenizer, "a text", 6, TOKENIZER_BOS, ids, &count);
        alloc_fail_after(-1);
        if (err == ODSI_OK)
            break;
        cr_assert_eq(err, ODSI_ERR_NO_MEMORY);
    }
    cr_expect_eq(failing, 3);
    tokenizer_close(&tokenizer);
    tokenizer_close(&tokenizer);
    buf_free(&bytes);
}
