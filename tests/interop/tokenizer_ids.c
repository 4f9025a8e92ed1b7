/* The ids that a tokenizer gives to texts, for comparing it with those of others:
 *   tokenizer_ids FOLDER|FILE.gguf [--bench SIZE] <texts.json >ids.json
 * The input is a JSON list of texts, the output a list of lists of ids; a text is encoded as a raw
 * prompt is, with its bos and with special tokens. --bench writes instead how long texts of SIZE
 * bytes take, made of the input again and again. */
#include "common/base/alloc.h"
#include "common/base/buf.h"
#include "worker/model/gguf.h"
#include "worker/model/hf_tokenizer.h"
#include "worker/model/tokenizer.h"
#include "worker/model/vocab.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static double now_s(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static enum odsi_err open_tokenizer(struct tokenizer **out, const char *path)
{
    const size_t size = strlen(path);
    struct buf canonical;
    struct gguf *gguf = NULL;
    uint32_t count;
    enum odsi_err err;
    buf_init(&canonical, TOKENIZER_CANONICAL_SIZE_MAX);
    if (size > 5 && strcmp(path + size - 5, ".gguf") == 0) {
        err = gguf_open(&gguf, path);
        if (err == ODSI_OK)
            err = vocab_canonical(gguf, &canonical, &count);
    } else {
        err = hf_tokenizer_canonical(path, 0, &canonical, &count);
    }
    if (err == ODSI_OK)
        err = tokenizer_open(out, canonical.data, canonical.size);
    gguf_close(&gguf);
    buf_free(&canonical);
    return err;
}

static json_t *ids_of(const struct tokenizer *tokenizer, const json_t *text)
{
    const size_t size = json_string_length(text);
    uint32_t *ids = NULL;
    uint32_t count = (uint32_t)(3 * size + 4);
    json_t *list = json_array();
    enum odsi_err err = alloc_zeroed(&ids, count, sizeof *ids);
    if (err == ODSI_OK)
        err = tokenizer_encode(tokenizer, json_string_value(text), size,
                               TOKENIZER_BOS | TOKENIZER_SPECIAL, ids, &count);
    for (uint32_t i = 0; err == ODSI_OK && i < count; i++)
        json_array_append_new(list, json_integer(ids[i]));
    alloc_free(ids);
    if (err == ODSI_OK)
        return list;
    json_decref(list);
    return NULL;
}

static enum odsi_err print_ids(const struct tokenizer *tokenizer, const json_t *texts)
{
    json_t *all = json_array();
    size_t index;
    const json_t *text;
    enum odsi_err err = ODSI_OK;
    json_array_foreach(texts, index, text)
    {
        if (json_array_append_new(all, ids_of(tokenizer, text)) != 0)
            err = odsi_fail(ODSI_ERR_INVALID, "text %zu: %s", index, odsi_err_text());
        if (err != ODSI_OK)
            break;
    }
    if (err == ODSI_OK && json_dumpf(all, stdout, JSON_COMPACT) != 0)
        err = odsi_fail(ODSI_ERR_IO, "the output cannot be written");
    json_decref(all);
    return err;
}

static enum odsi_err bench(const struct tokenizer *tokenizer, const json_t *texts, size_t size)
{
    struct buf text;
    uint32_t *ids = NULL;
    uint32_t count = (uint32_t)(3 * size + 4);
    double best = 1e9;
    buf_init(&text, size);
    for (size_t i = 0; json_array_size(texts) > 0 && text.size < size; i++) {
        const json_t *one = json_array_get(texts, i % json_array_size(texts));
        const size_t room = size - text.size;
        const size_t length =
            json_string_length(one) + 1 < room ? json_string_length(one) + 1 : room;
        (void)buf_append(&text, json_string_value(one), length - 1);
        (void)buf_append_u8(&text, '\n');
    }
    enum odsi_err err = alloc_zeroed(&ids, count, sizeof *ids);
    for (int round = 0; err == ODSI_OK && round < 5; round++) {
        const double start = now_s();
        count = (uint32_t)(3 * size + 4);
        err = tokenizer_encode(tokenizer, (const char *)text.data, text.size, TOKENIZER_BOS, ids,
                               &count);
        best = now_s() - start < best ? now_s() - start : best;
    }
    if (err == ODSI_OK)
        printf("%zu bytes, %u tokens, %.1f ms, %.1f MB/s\n", text.size, count, 1e3 * best,
               (double)text.size / best / 1e6);
    alloc_free(ids);
    buf_free(&text);
    return err;
}

int main(int argc, char **argv)
{
    struct tokenizer *tokenizer = NULL;
    json_error_t error;
    if (argc != 2 && !(argc == 4 && strcmp(argv[2], "--bench") == 0)) {
        fprintf(stderr, "usage: tokenizer_ids FOLDER|FILE.gguf [--bench SIZE] <texts.json\n");
        return 2;
    }
    json_t *texts = json_loadf(stdin, JSON_ALLOW_NUL, &error);
    enum odsi_err err = ODSI_OK;
    if (!json_is_array(texts))
        err = odsi_fail(ODSI_ERR_INVALID, "the input is no JSON list: %s", error.text);
    const double start = now_s();
    if (err == ODSI_OK)
        err = open_tokenizer(&tokenizer, argv[1]);
    if (err == ODSI_OK && argc == 4)
        fprintf(stderr, "opened in %.2f s\n", now_s() - start);
    if (err == ODSI_OK)
        err = argc == 4 ? bench(tokenizer, texts, strtoul(argv[3], NULL, 10))
                        : print_ids(tokenizer, texts);
    if (err != ODSI_OK)
        fprintf(stderr, "tokenizer_ids: %s\n", odsi_err_text());
    tokenizer_close(&tokenizer);
    json_decref(texts);
    return err == ODSI_OK ? 0 : 1;
}
