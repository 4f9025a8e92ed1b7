/* A model file with a chat template, for tests: another one's bytes with one more key. */
#ifndef ODSI_TESTS_SUPPORT_CHAT_MODEL_H
#define ODSI_TESTS_SUPPORT_CHAT_MODEL_H

/* The template of Zephyr and TinyLlama, whose turns end with the eos: it needs no token that the
 * demo model has not. */
#define CHAT_MODEL_ZEPHYR                                                                          \
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"                          \
    "{{ '<|user|>\\n' + message['content'] + eos_token }}\n"                                       \
    "{% elif message['role'] == 'system' %}\n"                                                     \
    "{{ '<|system|>\\n' + message['content'] + eos_token }}\n"                                     \
    "{% elif message['role'] == 'assistant' %}\n"                                                  \
    "{{ '<|assistant|>\\n' + message['content'] + eos_token }}\n{% endif %}\n"                     \
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"           \
    "{% endfor %}"

/* Writes to path the GGUF file at from with tokenizer.chat_template in front of its keys. Fails the
 * test when that cannot be done. */
void chat_model_write(const char *path, const char *from, const char *template);
#endif
