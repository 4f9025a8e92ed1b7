/* Chat templates, which come with model files of strangers, and conversations, which come from
 * clients: the input is a template up to the first zero byte, then messages, each a byte for its
 * role and a text up to the next one. What is rendered must be its segments, and every segment that
 * does not count as the template's a part of some message.
 *
 * Run by `make fuzz`; the seeds are in tests/vectors/fuzz_chat. */
#include "common/base/assert.h"
#include "worker/model/chat_template.h"

#include <string.h>

#define MESSAGES_MAX 16u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The bytes up to the next zero byte; *at moves behind it. */
static const char *take(const uint8_t *data, size_t size, size_t *at, size_t *taken)
{
    const uint8_t *first = data + *at;
    const uint8_t *end = memchr(first, 0, size - *at);
    *taken = end ? (size_t)(end - first) : size - *at;
    *at += *taken + (end ? 1 : 0);
    return (const char *)first;
}

static int is_in_a_message(const char *text, size_t size, const struct chat_message *messages,
                           uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        if (memmem(messages[i].content, messages[i].size, text, size))
            return 1;
    return 0;
}

static void check(const struct chat_prompt *prompt, const struct chat_message *messages,
                  uint32_t count)
{
    size_t at = 0;
    for (uint32_t i = 0; i < prompt->segment_count; i++) {
        const struct chat_segment *segment = &prompt->segments[i];
        ODSI_ASSERT(segment->size > 0 && segment->size <= prompt->text.size - at);
        ODSI_ASSERT(i == 0 || segment->is_special != prompt->segments[i - 1].is_special);
        ODSI_ASSERT(segment->is_special || is_in_a_message((const char *)prompt->text.data + at,
                                                           segment->size, messages, count));
        at += segment->size;
    }
    ODSI_ASSERT(at == prompt->text.size);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct chat_message messages[MESSAGES_MAX];
    struct chat_template *template = NULL;
    struct chat_prompt prompt = {0};
    uint32_t count = 0;
    size_t at = 0;
    size_t template_size = 0;
    const char *text = take(data, size, &at, &template_size);
    while (at < size && count < MESSAGES_MAX) {
        struct chat_message *message = &messages[count++];
        message->role = (enum chat_role)(data[at++] % CHAT_ROLE_COUNT);
        message->content = take(data, size, &at, &message->size);
    }
    if (chat_template_open(&template, text, template_size) == ODSI_OK &&
        chat_template_render(template, "<s>", "</s>", messages, count, &prompt) == ODSI_OK)
        check(&prompt, messages, count);
    chat_template_prompt_free(&prompt);
    chat_template_close(&template);
    return 0;
}
