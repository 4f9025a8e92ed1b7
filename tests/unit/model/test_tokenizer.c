#include "common/base/alloc.h"
#include "worker/model/model.h"
#include "worker/model/tokenizer.h"

#include <criterion/criterion.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>

#define DEMO "deploy/demo/odsi-tiny-q8_0.gguf"

static struct tokenizer *demo_tokenizer(void)
{
    struct model *model = NULL;
    struct tokenizer *tokenizer = NULL;
    const uint8_t *data;
    size_t size;
    cr_assert_eq(model_open(&model, DEMO, NULL, NULL, NULL), ODSI_OK, "%s", odsi_err_text());
    model_tokenizer_view(model, &data, &size);
    cr_assert_eq(tokenizer_open(&tokenizer, data, size), ODSI_OK, "%s", odsi_err_text());
    model_close(&model);
    return tokenizer;
}

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
                                      json_string_length(prompt), ids, &count),
                     ODSI_OK);
        cr_assert_eq(count, json_array_size(wanted), "case %zu", index);
        for (uint32_t i = 0; i < count; i++)
            cr_expect_eq(ids[i], json_integer_value(json_array_get(wanted, i)),
                         "case %zu, token %u", index, i);
    }
    json_decref(reference);
    tokenizer_close(&tokenizer);
}
