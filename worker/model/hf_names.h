/* The names of tensors: those of Hugging Face checkpoints become those of GGUF
 * ("model.layers.0.self_attn.q_proj.weight" becomes "blk.0.attn_q.weight"). Pure; any thread. */
#ifndef ODSI_WORKER_MODEL_HF_NAMES_H
#define ODSI_WORKER_MODEL_HF_NAMES_H
#include "common/base/limits.h"
#include "worker/model/hf_config.h"

enum hf_names_kind {
    HF_NAMES_UNKNOWN = 0, /* not a tensor of this family */
    HF_NAMES_TENSOR = 1,  /* *out is its canonical name */
    HF_NAMES_IGNORED = 2, /* says nothing that the model computes with */
};

/* out has LIMIT_TENSOR_NAME_SIZE + 1 bytes. Two names have the same canonical one only in a model
 * that sees, whose text part has been kept in two places; a file with both is refused as having
 * the tensor twice. */
enum hf_names_kind hf_names_canonical(const struct hf_config *config, const char *name, char *out);
#endif
