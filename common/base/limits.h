/* Every limit of the protocol and the programs, in one place, related to each other.
 * Whatever comes from a peer, a file or a flag is checked against these before anything is
 * allocated for it. */
#ifndef ODSI_COMMON_BASE_LIMITS_H
#define ODSI_COMMON_BASE_LIMITS_H
#include "common/base/assert.h"

/* Model shape (worker/model). */
#define LIMIT_LAYERS_MAX       1024u
#define LIMIT_DIM_MAX          65536u
#define LIMIT_FFN_MAX          262144u
#define LIMIT_HEADS_MAX        1024u
#define LIMIT_HEAD_DIM_MAX     512u
#define LIMIT_VOCAB_MAX        1048576u
#define LIMIT_CONTEXT_MAX      1048576u
#define LIMIT_EXPERTS_MAX      1024u
#define LIMIT_EXPERTS_USED_MAX 64u
#define LIMIT_TENSORS_MAX      65536u
#define LIMIT_TENSOR_NAME_SIZE 128u

/* Requests. */
#define LIMIT_PROMPT_SIZE    (4u << 20) /* bytes of prompt text in one request */
#define LIMIT_CHAT_MESSAGES  1024u      /* messages of a conversation; LIMIT_PROMPT_SIZE for all */
#define LIMIT_STOP_COUNT     8u         /* stop strings in one request */
#define LIMIT_STOP_SIZE      64u        /* bytes in one stop string */
#define LIMIT_PENALTY_TOKENS 1024u      /* window of the repetition penalty */

/* Hop protocol. */
#define LIMIT_STAGES_MAX      128u   /* workers in one path */
#define LIMIT_STEP_TOKENS     512u   /* positions in one step */
#define LIMIT_SESSIONS_MAX    4096u  /* sessions open on one worker */
#define LIMIT_STEP_QUEUE      1024u  /* steps waiting on one worker */
#define LIMIT_HOP_HEADER_SIZE 32768u /* bytes of a step's header; 128 stages' timings fit */
/* The largest step of a model of that dim. */
#define LIMIT_HOP_MESSAGE_SIZE_OF(dim) (LIMIT_STEP_TOKENS * (dim)*4u + LIMIT_HOP_HEADER_SIZE + 64u)
#define LIMIT_HOP_MESSAGE_SIZE         LIMIT_HOP_MESSAGE_SIZE_OF(LIMIT_DIM_MAX)
#define LIMIT_CONTROL_MESSAGE_SIZE     (4u << 20)  /* any message without activations */
#define LIMIT_UNPACK_SIZE              (32u << 20) /* memory of one unpacked protobuf message */
#define LIMIT_SEND_QUEUE_SIZE          (64u << 20) /* bytes queued towards one peer */

/* Directory. */
#define LIMIT_MEMBERS_MAX  16384u /* workers known to one coordinator store */
#define LIMIT_ADDRESS_SIZE 256u   /* bytes of host:port */
#define LIMIT_NAME_SIZE    128u   /* bytes of a model's name */

ODSI_STATIC_ASSERT(LIMIT_PROMPT_SIZE <= LIMIT_CONTROL_MESSAGE_SIZE, "a prompt fits in a message");
#endif
