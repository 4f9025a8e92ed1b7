/* A machine of worker/gateway/generate.h under test and all that it wanted so far; fails the test
 * when it asks for what it never should. */
#ifndef ODSI_TESTS_UNIT_GATEWAY_TALK_H
#define ODSI_TESTS_UNIT_GATEWAY_TALK_H
#include "tests/unit/gateway/gateway_fixture.h"
#include "worker/gateway/generate.h"

#define TALK_SECOND_US 1000000u

/* A machine under test and everything it wanted so far. */
struct talk {
    struct tokenizer *tokenizer;
    struct generate *machine;
    struct generate_config config;
    uint32_t prompt[2048];
    struct generate_stage stages[4];
    uint32_t stage_count;
    uint64_t now_us;
    int client_reads; /* takes every piece at once */

    uint32_t epoch; /* of the last OPEN */
    uint32_t open_count[4];
    uint32_t close_count[4];
    uint32_t new_tokens_asked; /* in the last OPEN */
    uint32_t penalty_count;
    uint32_t penalty_last;
    uint64_t open_budget_us;
    uint64_t stage_budgets_us[4];
    uint32_t step_count;
    uint32_t step_positions; /* sent on this path, all in order */
    uint32_t held_counts[4]; /* what the stages say that they hold */
    uint32_t key_count;      /* in the last OPEN */
    struct digest key_last;
    uint32_t prompt_count;
    uint32_t step_largest;
    uint64_t step_budget_us; /* of the last step */
    uint64_t step_stage_budget_us;
    uint32_t step_tokens[4096];
    int sampled;
    char text[131072];
    size_t text_size;
    uint32_t tokens[4096];
    uint32_t token_count;
    uint32_t emit_count;
    uint32_t reroute_count;
    uint32_t blamed;
    uint32_t other;
    int certain;
    int finished;
    int failed;
    struct generate_summary summary;
    struct odsi_failure failure;
};

/* A prompt of so many tokens over so many stages; config may be changed until talk_open. */
void talk_prepare(struct talk *self, uint32_t prompt_count, uint32_t stage_count);
/* Begins; the stages are asked to open. */
void talk_open(struct talk *self);
void talk_close(struct talk *self);
/* Takes all actions there are. */
void talk_pump(struct talk *self);
/* All stages say that they are open and hold what is in held_counts. */
void talk_open_all(struct talk *self);
struct generate_token talk_token_at(const struct talk *self, uint32_t position, uint32_t token);
/* The last stage sends a token; what the machine says to it. */
enum odsi_err talk_send(struct talk *self, const struct generate_token *token);
/* The next token of a good worker. */
void talk_say(struct talk *self, uint32_t token);
#endif
