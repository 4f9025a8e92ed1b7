#include "worker/gateway/model_choice.h"

#include <criterion/criterion.h>
#include <string.h>

static struct directory_model model(uint8_t id, const char *name, uint32_t workers, int complete)
{
    struct directory_model out = {.name = name, .worker_count = workers, .complete = complete};
    memset(out.model_id.bytes, id, DIGEST_SIZE);
    return out;
}

static void expect_error(const struct directory_model *models, uint32_t count, const char *wanted,
                         enum odsi_err err, const char *word)
{
    const struct directory_model *chosen = models;
    cr_expect_eq(model_choice_find(models, count, wanted, &chosen), err, "%s", odsi_err_text());
    cr_expect_null(chosen);
    cr_expect(strstr(odsi_err_text(), word), "\"%s\" does not mention %s", odsi_err_text(), word);
}

static uint8_t choose(const struct directory_model *models, uint32_t count, const char *wanted)
{
    const struct directory_model *chosen = NULL;
    cr_assert_eq(model_choice_find(models, count, wanted, &chosen), ODSI_OK, "%s", odsi_err_text());
    return chosen->model_id.bytes[0];
}

Test(model_choice, takes_the_only_model_when_none_is_named)
{
    const struct directory_model models[] = {model(0xA1, "tiny", 1, 0), model(0xB2, "big", 1, 1)};
    cr_expect_eq(choose(models, 1, NULL), 0xA1);
    cr_expect_eq(choose(models, 1, ""), 0xA1);
    expect_error(models, 2, "", ODSI_ERR_INVALID, "tiny (a1a1");
    expect_error(models, 0, "", ODSI_ERR_UNAVAILABLE, "no worker serves");
    expect_error(models, 0, "tiny", ODSI_ERR_UNAVAILABLE, "no worker serves");
}

Test(model_choice, finds_by_name_and_by_id)
{
    const struct directory_model models[] = {model(0xA1, "tiny", 1, 1), model(0xB2, "big", 1, 1)};
    char hex[DIGEST_HEX_SIZE];
    digest_to_hex(hex, &models[1].model_id);
    cr_expect_eq(choose(models, 2, "tiny"), 0xA1);
    cr_expect_eq(choose(models, 2, hex), 0xB2);
    expect_error(models, 2, "huge", ODSI_ERR_NOT_FOUND, "tiny (a1a1a1a1a1a1a1a1...), big");
    hex[0] = 'c';
    expect_error(models, 2, hex, ODSI_ERR_NOT_FOUND, "is not served");
}

/* Names prove nothing; a stranger may use one too. What is complete and has more workers wins, and
 * a tie is the client's to decide. */
Test(model_choice, prefers_the_complete_then_the_most_served_of_one_name)
{
    struct directory_model models[] = {model(0xA1, "tiny", 9, 0), model(0xB2, "tiny", 2, 1),
                                       model(0xC3, "tiny", 3, 1), model(0xD4, "big", 9, 1)};
    cr_expect_eq(choose(models, 4, "tiny"), 0xC3);
    cr_expect_eq(choose(models, 2, "tiny"), 0xB2);
    models[1].worker_count = 3;
    expect_error(models, 4, "tiny", ODSI_ERR_INVALID, "c3c3c3c3c3c3c3c3");
    cr_expect(strstr(odsi_err_text(), "big") == NULL);
}

Test(model_choice, lists_many_models_within_its_message)
{
    struct directory_model models[200];
    for (uint32_t i = 0; i < 200; i++)
        models[i] = model((uint8_t)i, "a-model-with-quite-a-long-name", 1, 1);
    expect_error(models, 200, "other", ODSI_ERR_NOT_FOUND, "...");
}
