#include "worker/gateway/encoder.h"

#include "common/base/alloc.h"

#include <pthread.h>
#include <string.h>

/* A byte becomes at most three tokens (a space that only bytes can spell), and a bos and a space
 * may stand in front. */
#define TOKENS_PER_BYTE 3u
#define TOKENS_MORE     4u
/* A chat template puts less than that around a message; what it prints once is text of its own. */
#define TOKENS_PER_TURN 256u

struct encoder_job {
    struct encoder_job *next;
    struct model_card *card; /* released on the loop's thread */
    char *text;              /* the prompt, or the contents of messages one after the other */
    size_t size;
    struct chat_message *messages; /* [message_count]; NULL: text is a prompt */
    uint32_t message_count;
    uint32_t token_max;
    /* What came out; written by the thread before the job is posted back. */
    uint32_t *tokens;
    uint32_t count;
    struct odsi_failure failure;
    /* Loop thread only; NULL once cancelled. */
    void (*on_encoded)(void *user, enum odsi_err err, uint32_t *tokens, uint32_t count);
    void *user;
};

struct encoder {
    struct rpc_loop *loop;
    pthread_t thread;
    pthread_mutex_t lock; /* guards what follows */
    pthread_cond_t changed;
    struct encoder_job *first;
    struct encoder_job **last;
    size_t waiting_size;
    int closing;
    struct encoder_job *undelivered; /* by the thread only, until it was joined */
};

/* Loop thread. */
static void job_free(struct encoder_job *job)
{
    model_store_release(&job->card);
    alloc_free(job->text);
    alloc_free(job->messages);
    alloc_free(job->tokens);
    alloc_free(job);
}

/* Loop thread: hands the result over. */
static void deliver(void *context)
{
    struct encoder_job *job = context;
    if (job->on_encoded) {
        uint32_t *tokens = job->tokens;
        job->tokens = NULL;
        if (job->failure.err != ODSI_OK)
            odsi_fail(job->failure.err, "%s", job->failure.text);
        job->on_encoded(job->user, job->failure.err, tokens, job->count);
    }
    job_free(job);
}

static void encode(struct encoder_job *job)
{
    const struct tokenizer *tokenizer = model_store_tokenizer_view(job->card);
    size_t most = TOKENS_PER_BYTE * job->size + TOKENS_MORE;
    if (job->messages) {
        size_t template_size = 0;
        tokenizer_template_view(tokenizer, &template_size);
        most += (size_t)job->message_count * TOKENS_PER_TURN + TOKENS_PER_BYTE * template_size;
    }
    job->count = most < job->token_max ? (uint32_t)most : job->token_max;
    enum odsi_err err = alloc_zeroed(&job->tokens, job->count, sizeof *job->tokens);
    if (err == ODSI_OK && job->messages)
        err = chat_template_encode(tokenizer, job->messages, job->message_count, job->tokens,
                                   &job->count);
    else if (err == ODSI_OK)
        err = tokenizer_encode(tokenizer, job->text, job->size, TOKENIZER_BOS | TOKENIZER_SPECIAL,
                               job->tokens, &job->count);
    if (err != ODSI_OK)
        odsi_failure_take(&job->failure, err);
    if (err != ODSI_OK && err != ODSI_ERR_RANGE)
        job->count = 0;
}

static struct encoder_job *take(struct encoder *self)
{
    pthread_mutex_lock(&self->lock);
    while (!self->first && !self->closing)
        pthread_cond_wait(&self->changed, &self->lock);
    struct encoder_job *job = self->closing ? NULL : self->first;
    if (job) {
        self->first = job->next;
        if (!self->first)
            self->last = &self->first;
        self->waiting_size -= job->size;
    }
    pthread_mutex_unlock(&self->lock);
    return job;
}

static void *run(void *context)
{
    struct encoder *self = context;
    struct encoder_job *job;
    while ((job = take(self))) {
        encode(job);
        if (rpc_loop_post(self->loop, deliver, job) == ODSI_OK)
            continue;
        job->next = self->undelivered;
        self->undelivered = job;
    }
    return NULL;
}

enum odsi_err encoder_open(struct encoder **out, struct rpc_loop *loop)
{
    struct encoder *self = NULL;
    *out = NULL;
    const enum odsi_err err = alloc_zeroed(&self, 1, sizeof *self);
    if (err != ODSI_OK)
        return err;
    self->loop = loop;
    self->last = &self->first;
    pthread_mutex_init(&self->lock, NULL);
    pthread_cond_init(&self->changed, NULL);
    if (pthread_create(&self->thread, NULL, run, self) != 0) {
        pthread_cond_destroy(&self->changed);
        pthread_mutex_destroy(&self->lock);
        alloc_free(self);
        return odsi_fail(ODSI_ERR_NO_MEMORY, "cannot start the thread that tokenizes");
    }
    *out = self;
    return ODSI_OK;
}

static void free_list(struct encoder_job *job)
{
    while (job) {
        struct encoder_job *next = job->next;
        job_free(job);
        job = next;
    }
}

void encoder_close(struct encoder **self_pointer)
{
    struct encoder *self = *self_pointer;
    if (!self)
        return;
    pthread_mutex_lock(&self->lock);
    self->closing = 1;
    pthread_cond_signal(&self->changed);
    pthread_mutex_unlock(&self->lock);
    pthread_join(self->thread, NULL);
    free_list(self->first);
    free_list(self->undelivered);
    pthread_cond_destroy(&self->changed);
    pthread_mutex_destroy(&self->lock);
    alloc_free(self);
    *self_pointer = NULL;
}

/* Takes job over, also on error. */
static enum odsi_err enqueue(struct encoder *self, struct encoder_job **out,
                             struct encoder_job *job)
{
    enum odsi_err err = ODSI_OK;
    pthread_mutex_lock(&self->lock);
    if (self->waiting_size + job->size > ENCODER_QUEUE_SIZE) {
        err = odsi_fail(ODSI_ERR_BUSY, "too many long prompts are waiting; try again later");
    } else {
        self->waiting_size += job->size;
        *self->last = job;
        self->last = &job->next;
        pthread_cond_signal(&self->changed);
    }
    pthread_mutex_unlock(&self->lock);
    if (err != ODSI_OK)
        job_free(job);
    else
        *out = job;
    return err;
}

enum odsi_err encoder_start(struct encoder *self, struct encoder_job **out, struct model_card *card,
                            const char *text, size_t size, uint32_t token_max,
                            void (*on_encoded)(void *user, enum odsi_err err, uint32_t *tokens,
                                               uint32_t count),
                            void *user)
{
    struct encoder_job *job = NULL;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&job, 1, sizeof *job);
    if (err != ODSI_OK)
        return err;
    *job = (struct encoder_job){.card = model_store_share(card),
                                .size = size,
                                .token_max = token_max,
                                .on_encoded = on_encoded,
                                .user = user};
    err = alloc_text(&job->text, text, size);
    if (err == ODSI_OK)
        return enqueue(self, out, job);
    job_free(job);
    return err;
}

static enum odsi_err copy_messages(struct encoder_job *job, const struct chat_message *messages,
                                   uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        job->size += messages[i].size;
    enum odsi_err err = alloc_zeroed(&job->text, job->size, 1);
    if (err == ODSI_OK)
        err = alloc_zeroed(&job->messages, count, sizeof *job->messages);
    if (err != ODSI_OK)
        return err;
    char *at = job->text;
    for (uint32_t i = 0; i < count; i++) {
        memcpy(at, messages[i].content, messages[i].size);
        job->messages[i] = messages[i];
        job->messages[i].content = at;
        at += messages[i].size;
    }
    job->message_count = count;
    return ODSI_OK;
}

enum odsi_err encoder_start_chat(
    struct encoder *self, struct encoder_job **out, struct model_card *card,
    const struct chat_message *messages, uint32_t message_count, uint32_t token_max,
    void (*on_encoded)(void *user, enum odsi_err err, uint32_t *tokens, uint32_t count), void *user)
{
    struct encoder_job *job = NULL;
    *out = NULL;
    enum odsi_err err = alloc_zeroed(&job, 1, sizeof *job);
    if (err != ODSI_OK)
        return err;
    *job = (struct encoder_job){.card = model_store_share(card),
                                .token_max = token_max,
                                .on_encoded = on_encoded,
                                .user = user};
    err = copy_messages(job, messages, message_count);
    if (err == ODSI_OK)
        return enqueue(self, out, job);
    job_free(job);
    return err;
}

void encoder_cancel(struct encoder_job **job)
{
    if (*job)
        (*job)->on_encoded = NULL;
    *job = NULL;
}
