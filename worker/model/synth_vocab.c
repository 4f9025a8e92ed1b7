#include "worker/model/synth_vocab.h"

#include "kernels/det.h"

#include <stdio.h>
#include <string.h>

#define KEY(name)    "tokenizer.ggml." name
#define BYTE_COUNT   256u
#define SPECIALS_MAX 8u
#define NONE         UINT32_MAX
#define WORD_SIZE    32u
#define SPM_SPACE    "\xe2\x96\x81" /* U+2581 */

/* GGUF's token_type. */
enum { TYPE_NORMAL = 1, TYPE_UNKNOWN, TYPE_CONTROL, TYPE_BYTE = 6 };

struct kind {
    const char *pre;                   /* NULL: SentencePiece, else the pre-tokenizer of a BPE */
    const char *first[SPECIALS_MAX];   /* special tokens in front of everything */
    const char *last[SPECIALS_MAX];    /* and behind it */
    const char *bos, *eos, *unk, *pad; /* NULL: none */
    int add_bos;
    int no_space_prefix; /* SentencePiece: no space of its own in front of a text */
    const char *chat;    /* NULL: a model that does not chat */
};

/* The templates are short forms of those that models of the kind carry: the same turns, without
 * tools and checks. */
#define CHAT_LLAMA2                                                                                \
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"               \
    "{% set system_message = messages[0]['content'] %}{% else %}"                                  \
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"                \
    "{% for message in loop_messages %}{% if loop.index0 == 0 and system_message != false %}"      \
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}" \
    "{% else %}{% set content = message['content'] %}{% endif %}"                                  \
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content | trim + ' [/INST]' }}"  \
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content | trim + ' ' + eos_token }}"        \
    "{% endif %}{% endfor %}"
#define CHAT_MISTRAL                                                                               \
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"               \
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"                                            \
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"                \
    "{% endif %}{% endfor %}"
#define CHAT_GEMMA                                                                                 \
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"                                      \
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"   \
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"                    \
    "{% set role = message['role'] %}{% endif %}"                                                  \
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}"      \
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"
#define CHAT_PHI3                                                                                  \
    "{% for message in messages %}"                                                                \
    "{{'<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n'}}{% endfor %}"         \
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
#define CHAT_LLAMA3                                                                                \
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "     \
    "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}"                      \
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"     \
    "{% endfor %}{% if add_generation_prompt %}"                                                   \
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
#define CHAT_QWEN                                                                                  \
    "{% for message in messages %}"                                                                \
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"     \
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

static const struct kind kinds[] = {
    [SYNTH_VOCABULARY_LLAMA2] = {.first = {"<unk>", "<s>", "</s>"},
                                 .bos = "<s>",
                                 .eos = "</s>",
                                 .unk = "<unk>",
                                 .add_bos = 1,
                                 .chat = CHAT_LLAMA2},
    [SYNTH_VOCABULARY_MISTRAL] = {.first = {"<unk>", "<s>", "</s>", "[INST]", "[/INST]"},
                                  .bos = "<s>",
                                  .eos = "</s>",
                                  .unk = "<unk>",
                                  .add_bos = 1,
                                  .chat = CHAT_MISTRAL},
    [SYNTH_VOCABULARY_GEMMA] = {.first = {"<pad>", "<eos>", "<bos>", "<unk>"},
                                .last = {"<start_of_turn>", "<end_of_turn>"},
                                .bos = "<bos>",
                                .eos = "<eos>",
                                .unk = "<unk>",
                                .pad = "<pad>",
                                .add_bos = 1,
                                .no_space_prefix = 1,
                                .chat = CHAT_GEMMA},
    [SYNTH_VOCABULARY_PHI3] = {.first = {"<unk>", "<s>", "</s>"},
                               .last = {"<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>",
                                        "<|user|>"},
                               .bos = "<s>",
                               .eos = "<|endoftext|>",
                               .unk = "<unk>",
                               .pad = "<|endoftext|>",
                               .add_bos = 1,
                               .chat = CHAT_PHI3},
    [SYNTH_VOCABULARY_LLAMA3] = {.pre = "llama-bpe",
                                 .last = {"<|begin_of_text|>", "<|end_of_text|>",
                                          "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"},
                                 .bos = "<|begin_of_text|>",
                                 .eos = "<|eot_id|>",
                                 .add_bos = 1,
                                 .chat = CHAT_LLAMA3},
    [SYNTH_VOCABULARY_QWEN] = {.pre = "qwen2",
                               .last = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"},
                               .bos = "<|endoftext|>",
                               .eos = "<|im_end|>",
                               .pad = "<|endoftext|>",
                               .chat = CHAT_QWEN},
};

/* Where the parts of a vocabulary lie: first specials, bytes, words, last specials. */
struct layout {
    const struct kind *kind;
    uint32_t bytes_at, words_at, last_at, size;
};

static uint32_t special_count(const char *const specials[SPECIALS_MAX])
{
    uint32_t count = 0;
    while (count < SPECIALS_MAX && specials[count])
        count++;
    return count;
}

static struct layout layout_of(enum synth_vocabulary vocabulary, uint32_t size)
{
    const struct kind *kind = &kinds[vocabulary];
    const uint32_t first = special_count(kind->first);
    return (struct layout){.kind = kind,
                           .bytes_at = first,
                           .words_at = first + BYTE_COUNT,
                           .last_at = size - special_count(kind->last),
                           .size = size};
}

uint32_t synth_vocab_size_min(enum synth_vocabulary vocabulary)
{
    const struct kind *kind = &kinds[vocabulary];
    return special_count(kind->first) + BYTE_COUNT + special_count(kind->last);
}

/* ---- words ----------------------------------------------------------------------------------- */

/* The letters of the index-th word, 0 a space, 1 to 26 a to z; returns how many.
 * SentencePiece: from one letter on, spaces anywhere. BPE: from two on, as one is a byte, and a
 * space at the start only, as the pre-tokenizer leaves no other. */
static uint32_t word_letters(int is_bpe, uint32_t index, uint8_t letters[8])
{
    const uint32_t base = is_bpe ? 26 : 27;
    uint32_t length = is_bpe ? 2 : 1;
    uint32_t words = is_bpe ? 27 * 26 : 27;
    for (; index >= words; words *= base, length++)
        index -= words;
    for (uint32_t i = length; i-- > 1; index /= base)
        letters[i] = (uint8_t)(index % base + (is_bpe ? 1 : 0));
    letters[0] = (uint8_t)index;
    return length;
}

/* Appends the letter to text as the kind's vocabulary writes it. */
static void append_letter(char text[WORD_SIZE], int is_bpe, uint8_t letter)
{
    const size_t size = strlen(text);
    if (letter > 0)
        snprintf(text + size, WORD_SIZE - size, "%c", 'a' + letter - 1);
    else
        snprintf(text + size, WORD_SIZE - size, "%s", is_bpe ? "\xc4\xa0" : SPM_SPACE);
}

/* The index-th byte in the alphabet of byte-level BPE: first the 188 printable bytes as the
 * character of their number, then the others as U+0100 and on. */
static uint32_t bpe_character(uint32_t index)
{
    if (index < 94)
        return '!' + index;
    if (index < 94 + 12)
        return 0xa1 + (index - 94);
    if (index < 188)
        return 0xae + (index - 106);
    return 0x100 + (index - 188);
}

static void put_utf8(char text[WORD_SIZE], uint32_t character)
{
    if (character < 0x80)
        snprintf(text, WORD_SIZE, "%c", (char)character);
    else
        snprintf(text, WORD_SIZE, "%c%c", (char)(0xc0 | character >> 6),
                 (char)(0x80 | (character & 0x3f)));
}

static void put_token(struct gguf_writer *out, const struct layout *layout, uint32_t id)
{
    const int is_bpe = layout->kind->pre != NULL;
    char text[WORD_SIZE] = "";
    if (id < layout->bytes_at) {
        snprintf(text, sizeof text, "%s", layout->kind->first[id]);
    } else if (id >= layout->last_at) {
        snprintf(text, sizeof text, "%s", layout->kind->last[id - layout->last_at]);
    } else if (id >= layout->words_at) {
        uint8_t letters[8];
        const uint32_t length = word_letters(is_bpe, id - layout->words_at, letters);
        for (uint32_t i = 0; i < length; i++)
            append_letter(text, is_bpe, letters[i]);
    } else if (is_bpe) {
        put_utf8(text, bpe_character(id - layout->bytes_at));
    } else {
        snprintf(text, sizeof text, "<0x%02X>", id - layout->bytes_at);
    }
    gguf_writer_item_text(out, text, strlen(text));
}

/* A word is its beginning and its last letter. */
static void put_merge(struct gguf_writer *out, uint32_t index)
{
    uint8_t letters[8];
    char text[WORD_SIZE] = "";
    const uint32_t length = word_letters(1, index, letters);
    for (uint32_t i = 0; i < length; i++) {
        if (i == length - 1)
            snprintf(text + strlen(text), WORD_SIZE - strlen(text), " ");
        append_letter(text, 1, letters[i]);
    }
    gguf_writer_item_text(out, text, strlen(text));
}

/* ---- keys ------------------------------------------------------------------------------------ */

static uint32_t type_of(const struct layout *layout, uint32_t id)
{
    const struct kind *kind = layout->kind;
    if (id < layout->bytes_at)
        return kind->unk && strcmp(kind->first[id], kind->unk) == 0 ? TYPE_UNKNOWN : TYPE_CONTROL;
    if (id >= layout->last_at)
        return TYPE_CONTROL;
    return id < layout->words_at && !kind->pre ? TYPE_BYTE : TYPE_NORMAL;
}

static uint32_t special_id(const struct layout *layout, const char *text)
{
    for (uint32_t i = 0; i < layout->bytes_at; i++)
        if (strcmp(layout->kind->first[i], text) == 0)
            return i;
    for (uint32_t i = layout->last_at; i < layout->size; i++)
        if (strcmp(layout->kind->last[i - layout->last_at], text) == 0)
            return i;
    return NONE;
}

static void put_special(struct gguf_writer *out, const struct layout *layout, const char *key,
                        const char *text)
{
    if (text)
        gguf_writer_u32(out, key, special_id(layout, text));
}

static void put_scores(struct gguf_writer *out, const struct layout *layout)
{
    gguf_writer_array(out, KEY("scores"), GGUF_F32, layout->size);
    for (uint32_t id = 0; id < layout->size; id++) {
        const int is_word = id >= layout->words_at && id < layout->last_at;
        gguf_writer_item_u32(out, det_bits(is_word ? -(float)(id - layout->words_at) : 0.0f));
    }
}

static void put_merges(struct gguf_writer *out, const struct layout *layout)
{
    const uint32_t count = layout->last_at - layout->words_at;
    gguf_writer_array(out, KEY("merges"), GGUF_TEXT, count);
    for (uint32_t i = 0; i < count; i++)
        put_merge(out, i);
}

void synth_vocab_write(struct gguf_writer *out, enum synth_vocabulary vocabulary, uint32_t size)
{
    const struct layout layout = layout_of(vocabulary, size);
    const struct kind *kind = layout.kind;
    gguf_writer_text(out, KEY("model"), kind->pre ? "gpt2" : "llama");
    gguf_writer_text(out, KEY("pre"), kind->pre ? kind->pre : "default");
    gguf_writer_array(out, KEY("tokens"), GGUF_TEXT, size);
    for (uint32_t id = 0; id < size; id++)
        put_token(out, &layout, id);
    gguf_writer_array(out, KEY("token_type"), GGUF_I32, size);
    for (uint32_t id = 0; id < size; id++)
        gguf_writer_item_u32(out, type_of(&layout, id));
    if (kind->pre)
        put_merges(out, &layout);
    else
        put_scores(out, &layout);
    put_special(out, &layout, KEY("bos_token_id"), kind->bos);
    put_special(out, &layout, KEY("eos_token_id"), kind->eos);
    put_special(out, &layout, KEY("unknown_token_id"), kind->unk);
    put_special(out, &layout, KEY("padding_token_id"), kind->pad);
    gguf_writer_bool(out, KEY("add_bos_token"), kind->add_bos);
    gguf_writer_bool(out, KEY("add_eos_token"), 0);
    if (!kind->pre)
        gguf_writer_bool(out, KEY("add_space_prefix"), !kind->no_space_prefix);
    if (kind->chat)
        gguf_writer_text(out, "tokenizer.chat_template", kind->chat);
}
