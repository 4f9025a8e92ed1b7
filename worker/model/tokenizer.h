/* Text to token ids and back, from the tokenizer that the model file carries.
 *
 * Three kinds: SentencePiece BPE with scores ("llama" in GGUF), byte-level BPE with merges ("gpt2"
 * in GGUF: Llama 3, Qwen, SmolLM), and SentencePiece BPE with merges (Hugging Face folders of
 * Llama 2, Mistral, Gemma, Phi-3). No text is rewritten, neither by Unicode normalization nor by
 * joining spaces, so decode(encode(text)) is text, byte for byte, whatever the bytes. (Exceptions
 * are a vocabulary that cannot spell a byte, and a token with a strip bit in a text where
 * TOKENIZER_SPECIAL looks for it.) The ids are those of llama.cpp and of Hugging Face's tokenizers
 * otherwise; differences: U+2581 in a text is that character, not a space; SentencePiece kinds put
 * their space in front of a text that begins with one, too.
 *
 * Built from canonical bytes so that a gateway without the model file can have it from a worker
 * and check it. Integers are little-endian u32 unless another size is said:
 *   8  "ODSITOK2"
 *   4  kind, enum tokenizer_kind
 *   4  pre-tokenizer, enum tokenizer_pre; 0 unless the kind is byte-level BPE
 *   4  bos id, 4 eos id, 4 unknown id; 0xffffffff: there is none
 *   1  add_bos: the bos belongs in front of a text
 *   1  add_eos: the eos belongs behind it
 *   1  add_space_prefix, enum tokenizer_prefix; 0 for byte-level BPE
 *   1  ignore_merges: a word that is a token is that token, whatever its merges; 0 or 1, and 0
 *      unless the kind is byte-level BPE
 *   4  end count, at most TOKENIZER_ENDS_MAX; then the ids that end an answer besides the eos,
 *      4 each, ascending
 *   4  token count, 1 to LIMIT_VOCAB_MAX; then per token:
 *      4  score, f32 bits, finite; 0.0 unless the kind is SPM
 *      1  type (GGUF's token_type, 1 to 6), plus 0x40: white space before it goes when it is found
 *         in a text, plus 0x80: white space behind it
 *      2  size (u16) and as many bytes of the piece: with U+2581 for a space in the SentencePiece
 *         kinds, the bytes themselves in byte-level BPE
 *   4  merge count, 0 for SPM; then per merge, best first:
 *      4  left id, 4 right id: both normal or byte tokens, as is the one whose text is theirs
 *   4  size of the chat template, at most TOKENIZER_TEMPLATE_SIZE_MAX, 0: none; and its bytes
 *
 * Threads: immutable after open; any thread. */
#ifndef ODSI_WORKER_MODEL_TOKENIZER_H
#define ODSI_WORKER_MODEL_TOKENIZER_H
#include "common/base/err.h"

#include <stddef.h>
#include <stdint.h>

#define TOKENIZER_NONE               UINT32_MAX
#define TOKENIZER_PIECE_SIZE_MAX     65535u
#define TOKENIZER_CANONICAL_SIZE_MAX (32u << 20) /* of the canonical bytes */
#define TOKENIZER_TEXT_SIZE_MAX      (16u << 20) /* of one text to encode */
#define TOKENIZER_TEMPLATE_SIZE_MAX  (256u << 10)
#define TOKENIZER_ENDS_MAX           64u
/* Of a control or user-defined token: every byte of a text may be compared with so many. */
#define TOKENIZER_SPECIAL_SIZE_MAX 128u

/* The numbers are those of the canonical bytes. */
enum tokenizer_kind {
    TOKENIZER_SPM = 1,        /* SentencePiece BPE: pairs join by the score of what they make */
    TOKENIZER_BYTE_BPE = 2,   /* bytes join inside the words of a pre-tokenizer, by rank of merge */
    TOKENIZER_SPM_MERGES = 3, /* as SPM, but pairs join by rank of merge */
};

/* How byte-level BPE cuts a text into words; the names are those of tokenizer.ggml.pre. */
enum tokenizer_pre {
    TOKENIZER_PRE_NONE = 0,
    TOKENIZER_PRE_DEFAULT = 1,
    TOKENIZER_PRE_GPT2 = 2,
    TOKENIZER_PRE_LLAMA3 = 3, /* llama-bpe */
    TOKENIZER_PRE_QWEN2 = 4,
    TOKENIZER_PRE_SMOLLM = 5,
    TOKENIZER_PRE_TEKKEN = 6,
};

/* Where the SentencePiece kinds put a space of their own. */
enum tokenizer_prefix {
    TOKENIZER_PREFIX_NEVER = 0,
    TOKENIZER_PREFIX_ALWAYS = 1, /* at the start and behind each control or user-defined token */
    TOKENIZER_PREFIX_START = 2,  /* at the start of the text only */
};

enum tokenizer_flag {
    TOKENIZER_BOS = 1,     /* bos in front and eos behind, where the model wants them */
    TOKENIZER_SPECIAL = 2, /* control tokens written out in the text are meant as such */
};

struct tokenizer;

/* Errors: ODSI_ERR_CORRUPT (with what and where), ODSI_ERR_UNSUPPORTED (kind, pre-tokenizer, or a
 * special token of more than TOKENIZER_SPECIAL_SIZE_MAX bytes), ODSI_ERR_NO_MEMORY.
 * data may be freed afterwards. */
ODSI_MUST_USE enum odsi_err tokenizer_open(struct tokenizer **out, const uint8_t *data,
                                           size_t size);
void tokenizer_close(struct tokenizer **self);

uint32_t tokenizer_vocab_size(const struct tokenizer *self);
uint32_t tokenizer_eos(const struct tokenizer *self);
uint32_t tokenizer_bos(const struct tokenizer *self);
/* Whether TOKENIZER_BOS puts a bos in front. */
int tokenizer_adds_bos(const struct tokenizer *self);
/* Whether a generated id ends the answer (eos and its kin). */
int tokenizer_is_end(const struct tokenizer *self, uint32_t id);
/* The id of the control, user-defined or normal token with this text, looked for in that order;
 * TOKENIZER_NONE when there is none. */
uint32_t tokenizer_find(const struct tokenizer *self, const char *piece, size_t size);
/* The chat template of the model, Jinja text without a NUL behind it; *size is 0 when there is
 * none. Valid as long as self. */
const char *tokenizer_template_view(const struct tokenizer *self, size_t *size);

/* Ids of text. flags are of enum tokenizer_flag. Without TOKENIZER_SPECIAL, text never becomes a
 * control token: what looks like one is spelt in others. User-defined tokens are words of the
 * vocabulary and are always found; of several that begin at one byte the longest counts.
 * *count is capacity on entry and the number written on return. Time is at most n log n in size.
 * Errors: ODSI_ERR_RANGE (more than *count tokens; *count then holds how many there are),
 * ODSI_ERR_INVALID (longer than TOKENIZER_TEXT_SIZE_MAX), ODSI_ERR_NO_MEMORY. */
ODSI_MUST_USE enum odsi_err tokenizer_encode(const struct tokenizer *self, const char *text,
                                             size_t size, unsigned flags, uint32_t *tokens,
                                             uint32_t *count);

/* A part of a text whose author may write control tokens, or may not. */
struct tokenizer_segment {
    const char *text;
    size_t size;
    int is_special; /* TOKENIZER_SPECIAL holds in this part */
};

/* Ids of the segments' texts one behind the other, as if they were one text: words, merges and the
 * space in front do not see the borders. Only a control token that lies in one is_special segment
 * with all its bytes is taken as such. flags: TOKENIZER_BOS or 0. The rest is as in
 * tokenizer_encode. */
ODSI_MUST_USE enum odsi_err tokenizer_encode_segments(const struct tokenizer *self,
                                                      const struct tokenizer_segment *segments,
                                                      size_t segment_count, unsigned flags,
                                                      uint32_t *tokens, uint32_t *count);

/* The text of id, a control token's as a prompt writes it, without a NUL behind it; *size is 0 for
 * an id outside the vocabulary. Valid as long as self. */
const char *tokenizer_text_view(const struct tokenizer *self, uint32_t id, size_t *size);

/* The bytes that id adds to a text: a control token adds none; the space that add_space_prefix
 * put in front of a prompt is the caller's to drop (tokenizer_decode does). Writes at most
 * TOKENIZER_PIECE_SIZE_MAX bytes and returns how many; 0 for an id outside the vocabulary. */
size_t tokenizer_piece(const struct tokenizer *self, uint32_t id, char *out);

/* The text of a whole sequence: control tokens and the spaces that add_space_prefix put in front
 * dropped. *size is capacity on entry and the length on return.
 * Errors: ODSI_ERR_RANGE (*size then holds the length). */
ODSI_MUST_USE enum odsi_err tokenizer_decode(const struct tokenizer *self, const uint32_t *tokens,
                                             uint32_t count, char *out, size_t *size);

/* Streaming: how many of the size bytes at text are whole UTF-8 characters, so that a stream never
 * splits one. Bytes that can never become valid UTF-8 count as whole. */
size_t tokenizer_utf8_whole(const char *text, size_t size);
#endif
