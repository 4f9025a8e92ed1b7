#include "worker/gateway/request.h"

#include "common/base/alloc.h"

#include <criterion/criterion.h>
#include <math.h>
#include <string.h>

static void expect_invalid(struct request *request, const char *field)
{
    cr_expect_eq(request_check(request), ODSI_ERR_INVALID, "%s", field);
    cr_expect(strstr(odsi_err_text(), field), "\"%s\" does not name %s", odsi_err_text(), field);
}

Test(request, refuses_bad_sampling_values_by_name)
{
    struct request request = {0};
    cr_assert_eq(request_check(&request), ODSI_OK);
    const float bad[] = {-0.1f, NAN, INFINITY, -INFINITY};
    for (size_t i = 0; i < 4; i++) {
        request = (struct request){.sampling = {.temperature = bad[i]}};
        expect_invalid(&request, "temperature");
        request = (struct request){.sampling = {.top_p = bad[i]}};
        expect_invalid(&request, "top_p");
        request = (struct request){.sampling = {.min_p = bad[i]}};
        expect_invalid(&request, "min_p");
        request = (struct request){.sampling = {.repetition_penalty = bad[i]}};
        expect_invalid(&request, "repetition_penalty");
    }
    request = (struct request){.sampling = {.top_p = 1.5f}};
    expect_invalid(&request, "top_p");
    request = (struct request){.sampling = {.penalty_window = LIMIT_PENALTY_TOKENS + 1}};
    expect_invalid(&request, "penalty_window");
}

Test(request, fills_in_the_penaltys_window_and_drops_a_penalty_that_is_off)
{
    struct request request = {.sampling = {.repetition_penalty = 1.1f}};
    cr_assert_eq(request_check(&request), ODSI_OK);
    cr_expect_eq(request.sampling.penalty_window, REQUEST_PENALTY_WINDOW);
    request = (struct request){.sampling = {.repetition_penalty = 1.0f, .penalty_window = 9}};
    cr_assert_eq(request_check(&request), ODSI_OK);
    cr_expect_eq(request.sampling.penalty_window, 0);
    cr_expect_float_eq((double)request.sampling.repetition_penalty, 0.0, 0.0);
}

Test(request, takes_a_prompt_or_tokens_but_not_both)
{
    uint32_t tokens[2] = {1, 2};
    char prompt[] = "text";
    struct request request = {.prompt = prompt, .prompt_size = 4};
    cr_expect_eq(request_check(&request), ODSI_OK);
    request.prompt_tokens = tokens;
    request.prompt_token_count = 2;
    expect_invalid(&request, "more than one is given");
    request.prompt_size = 0;
    cr_expect_eq(request_check(&request), ODSI_OK);
    request.prompt_token_count = 0;
    request.prompt_size = LIMIT_PROMPT_SIZE + 1;
    expect_invalid(&request, "prompt");
}

Test(request, takes_messages_instead_of_a_prompt)
{
    struct chat_message message = {CHAT_USER, "text", 4};
    uint32_t token = 1;
    char prompt[] = "text";
    struct request request = {.messages = &message, .message_count = 1};
    cr_expect_eq(request_check(&request), ODSI_OK);
    request.prompt = prompt;
    request.prompt_size = 4;
    expect_invalid(&request, "more than one is given");
    request.prompt_size = 0;
    request.prompt_tokens = &token;
    request.prompt_token_count = 1;
    expect_invalid(&request, "more than one is given");
}

Test(request, bounds_stop_strings)
{
    struct request request = {0};
    char text[LIMIT_STOP_SIZE + 1];
    memset(text, 'a', sizeof text);
    cr_expect_eq(request_add_stop(&request, text, 0), ODSI_ERR_INVALID);
    cr_expect_eq(request_add_stop(&request, text, sizeof text), ODSI_ERR_INVALID);
    cr_expect_eq(request_add_stop(&request, "\xFF", 1), ODSI_ERR_INVALID);
    for (uint32_t i = 0; i < LIMIT_STOP_COUNT; i++)
        cr_expect_eq(request_add_stop(&request, text, sizeof text - 1), ODSI_OK);
    cr_expect_eq(request_add_stop(&request, "b", 1), ODSI_ERR_INVALID);
    cr_expect_eq(request.stop_count, LIMIT_STOP_COUNT);
    request_free(&request);
}

Test(request, bounds_the_models_name)
{
    char name[LIMIT_NAME_SIZE + 1];
    memset(name, 'm', sizeof name);
    name[LIMIT_NAME_SIZE] = '\0';
    struct request request = {.model = name};
    expect_invalid(&request, "model");
    name[LIMIT_NAME_SIZE - 1] = '\0';
    cr_expect_eq(request_check(&request), ODSI_OK);
}
