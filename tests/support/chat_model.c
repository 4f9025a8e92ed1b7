#include "tests/support/chat_model.h"

#include "common/base/buf.h"
#include "common/base/bytes.h"
#include "common/base/io.h"

#include <criterion/criterion.h>
#include <string.h>

#define HEAD_SIZE      24u /* magic, version, counts of tensors and keys */
#define KEYS_AT        16u
#define ALIGNMENT      32u
#define TEXT_TYPE      8u
#define MODEL_SIZE_MAX (64u << 20)

/* Tensors lie at offsets from the end of the head, which is padded to ALIGNMENT: so the key, with
 * spaces behind its text, takes a multiple of that. */
void chat_model_write(const char *path, const char *from, const char *template)
{
    static const char key[] = "tokenizer.chat_template";
    struct buf model, out;
    buf_init(&model, MODEL_SIZE_MAX);
    buf_init(&out, MODEL_SIZE_MAX);
    cr_assert_eq(io_read_file(from, &model), ODSI_OK, "%s", odsi_err_text());
    cr_assert_gt(model.size, HEAD_SIZE);
    const size_t unpadded = 8 + strlen(key) + 4 + 8 + strlen(template);
    const size_t padding = (ALIGNMENT - unpadded % ALIGNMENT) % ALIGNMENT;
    (void)buf_append(&out, model.data, KEYS_AT);
    (void)buf_append_u64(&out, bytes_load_u64(model.data + KEYS_AT) + 1);
    (void)buf_append_u64(&out, strlen(key));
    (void)buf_append_text(&out, key);
    (void)buf_append_u32(&out, TEXT_TYPE);
    (void)buf_append_u64(&out, strlen(template) + padding);
    (void)buf_append_text(&out, template);
    for (size_t i = 0; i < padding; i++)
        (void)buf_append_u8(&out, ' ');
    (void)buf_append(&out, model.data + HEAD_SIZE, model.size - HEAD_SIZE);
    cr_assert_eq(buf_status(&out), ODSI_OK);
    cr_assert_eq(io_write_file(path, out.data, out.size, 0644, 0), ODSI_OK, "%s", odsi_err_text());
    buf_free(&model);
    buf_free(&out);
}
