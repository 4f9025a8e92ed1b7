#include "worker/model/chat_layout.h"

#include <string.h>

/* The words of a template that prints text alone. */
#define PRINTS(text)                                                                               \
    {                                                                                              \
        text, "{{`" text "`}}"                                                                     \
    }
/* Behind the user's last message the answer begins at once. */
#define AT_ONCE                                                                                    \
    {                                                                                              \
        "", ""                                                                                     \
    }

/* ChatML is written in three ways; what they print is the same. */
#define CHATML                                                                                     \
    .before = {"<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n"},           \
    .after = {"<|im_end|>\n", "<|im_end|>\n", "<|im_end|>\n"},                                     \
    .answers = {PRINTS("<|im_start|>assistant\n"), PRINTS("<|im_start|>assistant\n<think>\n")},    \
    .default_from = "`<|im_start|>system\n", .default_to = "<|im_end|>\n`"
/* Other formats with the same marks, and system messages that are made up as the template runs. */
#define CHATML_LACKS                                                                               \
    {                                                                                              \
        "<|im_sep|>", "system_prompt", "enable_thinking%}", "|trim+`", "a function calling AI"     \
    }

#define LLAMA_3                                                                                    \
    .before = {"<|start_header_id|>system<|end_header_id|>\n\n",                                   \
               "<|start_header_id|>user<|end_header_id|>\n\n",                                     \
               "<|start_header_id|>assistant<|end_header_id|>\n\n"},                               \
    .after = {"<|eot_id|>", "<|eot_id|>", "<|eot_id|>"},                                           \
    .answers = {PRINTS("<|start_header_id|>assistant<|end_header_id|>\n\n")}
#define LLAMA_3_TURN                                                                               \
    "`<|start_header_id|>`+message.role+`<|end_header_id|>\n\n`+message.content|trim+`<|eot_id|>`"

#define GEMMA                                                                                      \
    .before = {"", "<start_of_turn>user\n", "<start_of_turn>model\n"},                             \
    .after = {"", "<end_of_turn>\n", "<end_of_turn>\n"},                                           \
    .answers = {PRINTS("<start_of_turn>model\n")}, .flags = CHAT_ALTERNATES | CHAT_TRIMS

#define PHI_3                                                                                      \
    .before = {"<|system|>\n", "<|user|>\n", "<|assistant|>\n"},                                   \
    .after = {"<|end|>\n", "<|end|>\n", "<|end|>\n"}, .answers = {PRINTS("<|assistant|>\n")}

/* In this order, the first that fits. */
static const struct chat_layout layouts[] = {
    {.name = "chatml",
     .needs = {"`<|im_start|>`+message.role+`\n`+message.content+`<|im_end|>\n`"},
     .lacks = CHATML_LACKS,
     CHATML},
    /* Qwen 1.5: the end mark is left away behind a last answer, which we never render. */
    {.name = "chatml",
     .needs = {"{{`<|im_start|>`+message.role+`\n`+message.content}}", "{{`<|im_end|>\n`}}"},
     .lacks = CHATML_LACKS,
     CHATML},
    {.name = "chatml",
     .needs = {"{%set content=message.content%}",
               "`<|im_start|>`+message.role+`\n`+content+`<|im_end|>\n`"},
     .lacks = CHATML_LACKS,
     CHATML},
    {.name = "chatml",
     .needs = {"`<|im_start|>user\n`+message.content+`<|im_end|>\n`",
               "`<|im_start|>assistant\n`+message.content+`<|im_end|>\n`",
               "`<|im_start|>system\n`+message.content+`<|im_end|>\n`"},
     .lacks = CHATML_LACKS,
     CHATML},
    {.name = "mistral-v7",
     .needs = {"{{`[INST] `+message.content+`[/INST]`}}",
               "{{`[SYSTEM_PROMPT] `+message.content+`[/SYSTEM_PROMPT]`}}",
               "{{` `+message.content+eos_token}}"},
     .before = {"[SYSTEM_PROMPT] ", "[INST] ", " "},
     .after = {"[/SYSTEM_PROMPT]", "[/INST]", "{eos}"},
     .answers = {AT_ONCE}},
    {.name = "mistral-v7-tekken",
     .needs = {"`[INST]`", "`[/INST]`", "`[SYSTEM_PROMPT]`+", "+`[/SYSTEM_PROMPT]`}}",
               "{{message.content+eos_token}}"},
     .lacks = {"[THINK]"},
     .before = {"[SYSTEM_PROMPT]", "[INST]", ""},
     .after = {"[/SYSTEM_PROMPT]", "[/INST]", "{eos}"},
     .answers = {AT_ONCE}},
    {.name = "mistral-v3-tekken",
     .needs = {"{%if loop.last and system_message is defined%}",
               "{{`[INST]`+system_message+`\n\n`+message.content+`[/INST]`}}",
               "{{message.content+eos_token}}"},
     .before = {"", "[INST]", ""},
     .after = {"", "[/INST]", "{eos}"},
     .answers = {AT_ONCE},
     .system = CHAT_SYSTEM_LAST_USER,
     .fold_before = "",
     .fold_after = "\n\n"},
    {.name = "mistral-v3",
     .needs = {"{%if loop.last and system_message is defined%}",
               "{{`[INST] `+system_message+`\n\n`+message.content+`[/INST]`}}",
               "{{` `+message.content|trim+eos_token}}"},
     .before = {"", "[INST] ", " "},
     .after = {"", "[/INST]", "{eos}"},
     .answers = {AT_ONCE},
     .system = CHAT_SYSTEM_LAST_USER,
     .fold_before = "",
     .fold_after = "\n\n",
     .flags = CHAT_TRIMS_ANSWERS},
    {.name = "mistral-v3",
     .needs = {"{%if loop.last and system_message is defined%}",
               "{{`[INST] `+system_message+`\n\n`+message.content+`[/INST]`}}",
               "{{` `+message.content+eos_token}}"},
     .before = {"", "[INST] ", " "},
     .after = {"", "[/INST]", "{eos}"},
     .answers = {AT_ONCE},
     .system = CHAT_SYSTEM_LAST_USER,
     .fold_before = "",
     .fold_after = "\n\n"},
    {.name = "mistral-v1",
     .needs = {"{%if loop.first and system_message is defined%}",
               "{{` [INST] `+system_message+`\n\n`+message.content+` [/INST]`}}",
               "{{` `+message.content+eos_token}}"},
     .before = {"", " [INST] ", " "},
     .after = {"", " [/INST]", "{eos}"},
     .answers = {AT_ONCE},
     .system = CHAT_SYSTEM_FIRST_USER,
     .fold_before = "",
     .fold_after = "\n\n"},
    {.name = "mistral-v0.1",
     .needs = {"{{`[INST] `+message.content+` [/INST]`}}", "{{message.content+eos_token+` `}}"},
     .before = {"", "[INST] ", ""},
     .after = {"", " [/INST]", "{eos} "},
     .answers = {AT_ONCE},
     .system = CHAT_SYSTEM_REFUSED},
    {.name = "mistral-v0.2",
     .needs = {"{{`[INST] `+message.content+` [/INST]`}}", "{{message.content+eos_token}}"},
     .before = {"", "[INST] ", ""},
     .after = {"", " [/INST]", "{eos}"},
     .answers = {AT_ONCE},
     .system = CHAT_SYSTEM_REFUSED},
    {.name = "llama-2",
     .needs = {"`<<SYS>>\n`+system_message+`\n<</SYS>>\n\n`+message.content",
               "{{bos_token+`[INST] `+content|trim+` [/INST]`}}",
               "{{` `+content|trim+` `+eos_token}}"},
     .lacks = {"{%elif true==true "}, /* a system message of its own */
     .before = {"", "{bos}[INST] ", " "},
     .after = {"", " [/INST]", " {eos}"},
     .answers = {AT_ONCE},
     .system = CHAT_SYSTEM_FIRST_USER,
     .fold_before = "<<SYS>>\n",
     .fold_after = "\n<</SYS>>\n\n",
     .flags = CHAT_TRIMS_FOLDED | CHAT_TRIMS_ANSWERS},
    {.name = "llama-3.1",
     .needs = {LLAMA_3_TURN, "{{`Cutting Knowledge Date: December 2023\n`}}",
               "{{`Today Date: `+date_string+`\n\n`}}", "{%set date_string=`"},
     .default_from = "{%set date_string=`",
     .default_to = "`%}",
     .flags = CHAT_TRIMS | CHAT_DATED_SYSTEM,
     LLAMA_3},
    {.name = "llama-3",
     .needs = {LLAMA_3_TURN},
     .lacks = {"Cutting Knowledge Date", "tools", "functions"},
     .flags = CHAT_TRIMS,
     LLAMA_3},
    {.name = "gemma",
     .needs = {"{{`<start_of_turn>`+role+`\n`+message.content|trim+`<end_of_turn>\n`}}",
               "System role not supported"},
     .system = CHAT_SYSTEM_REFUSED,
     GEMMA},
    {.name = "gemma-3",
     .needs = {"{%set first_user_prefix=messages[0].content+`\n\n`%}",
               "{{`<start_of_turn>`+role+`\n`+(first_user_prefix if loop.first else``)}}",
               "{{message.content|trim}}", "{{`<end_of_turn>\n`}}"},
     .system = CHAT_SYSTEM_FIRST_USER,
     .fold_before = "",
     .fold_after = "\n\n",
     GEMMA},
    {.name = "phi-3",
     .needs = {"{{`<|system|>\n`+message.content+`<|end|>\n`}}",
               "{{`<|user|>\n`+message.content+`<|end|>\n`}}",
               "{{`<|assistant|>\n`+message.content+`<|end|>\n`}}",
               "{%if message.role==`system`and message.content%}"},
     .flags = CHAT_SKIPS_EMPTY,
     PHI_3},
    {.name = "phi-3", .needs = {"{{`<|`+message.role+`|>\n`+message.content+`<|end|>\n`}}"}, PHI_3},
    /* The first Phi-3: every user message opens the answer too. */
    {.name = "phi-3-first",
     .needs = {"{{`<|user|>\n`+message.content+`<|end|>\n<|assistant|>\n`}}",
               "{{message.content+`<|end|>\n`}}"},
     .before = {"", "<|user|>\n", ""},
     .after = {"", "<|end|>\n<|assistant|>\n", "<|end|>\n"},
     .answers = {AT_ONCE},
     .system = CHAT_SYSTEM_REFUSED,
     .flags = CHAT_ALTERNATES},
    {.name = "zephyr",
     .needs = {"{{`<|system|>\n`+message.content+eos_token}}`\n`",
               "{{`<|user|>\n`+message.content+eos_token}}`\n`",
               "{{`<|assistant|>\n`+message.content+eos_token}}`\n`", "{{`<|assistant|>`}}`\n`"},
     .before = {"<|system|>\n", "<|user|>\n", "<|assistant|>\n"},
     .after = {"{eos}\n", "{eos}\n", "{eos}\n"},
     .answers = {{"<|assistant|>\n", "{{`<|assistant|>`}}`\n`"}}},
};
#define LAYOUT_COUNT (sizeof layouts / sizeof *layouts)

static int fits(const struct chat_layout *layout, const char *source)
{
    for (size_t i = 0; i < CHAT_LAYOUT_NEEDS && layout->needs[i]; i++)
        if (!strstr(source, layout->needs[i]))
            return 0;
    for (size_t i = 0; i < CHAT_LAYOUT_NEEDS && layout->lacks[i]; i++)
        if (strstr(source, layout->lacks[i]))
            return 0;
    return 1;
}

const struct chat_layout *chat_layout_find(const char *source, const char **answer)
{
    for (size_t i = 0; i < LAYOUT_COUNT; i++) {
        if (!fits(&layouts[i], source))
            continue;
        for (size_t k = 0; k < CHAT_LAYOUT_ANSWERS && layouts[i].answers[k].text; k++) {
            *answer = layouts[i].answers[k].text;
            if (strstr(source, layouts[i].answers[k].words))
                return &layouts[i];
        }
    }
    *answer = NULL;
    return NULL;
}

const struct chat_layout *chat_layout_at(size_t index)
{
    return index < LAYOUT_COUNT ? &layouts[index] : NULL;
}
