/* The contract of every op: shapes, order of operations, limits. kernels/NUMERICS.md has the same
 * rules in prose; kernels/ref/ is the definition in plain C.
 *
 * Legend: shapes are [slowest][...][fastest]; f32 is IEEE-754 binary32, f16 binary16; fma(a,b,c)
 * rounds once. All vectors of one call are distinct unless an op says that out may be x. A "row"
 * is one token position of one session; ops never look across rows except attention, which reads
 * the row's own session from the paged KV cache. */
#ifndef ODSI_KERNELS_OPS_H
#define ODSI_KERNELS_OPS_H
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Part of the contract of a session and of every receipt; see NUMERICS.md. */
#define NUMERICS_VERSION 1u

#define OPS_BLOCK       32u  /* elements of one Q8 block */
#define OPS_STRANDS     8u   /* contiguous pieces of a dot product's K dimension */
#define OPS_LANES       256u /* lanes of a long sum: index modulo 256 */
#define OPS_TILE_TOKENS 64u  /* absolute positions of one attention tile */
#define KV_PAGE_TOKENS  64u  /* tokens of one KV page: exactly one attention tile */

/* Numbers are those of GGUF (ggml_type). */
enum tensor_type { TENSOR_F32 = 0, TENSOR_F16 = 1, TENSOR_Q8_0 = 8 };

/* A matrix [rows][cols] on a backend, repacked as that backend likes it; row-major in its source.
 * Q8_0 source: per 32 columns one f16 scale, then 32 int8 (34 bytes), cols a multiple of 32. */
struct weight;

/* Rotation table, rounded from binary64 once on the host (kernels/rope_table.h makes it):
 * [positions][head_dim/2] of cosine and of sine. */
struct rope_table {
    const float *cos_dev;
    const float *sin_dev;
    uint32_t position_count;
    uint32_t half_dim;
};

/* The keys and values of all sessions: page_count pages of f16, each laid out
 * [layer][k=0|v=1][kv_head][KV_PAGE_TOKENS][head_dim]. layers counts the span of this worker. */
struct kv_pool {
    uint16_t *pages_dev;
    uint32_t page_count;
    uint32_t layers;
    uint32_t kv_heads;
    uint32_t head_dim;
};

/* Which session and position each row of a call belongs to. position[r] is absolute;
 * page_table[r][p / KV_PAGE_TOKENS] is the page that holds position p of row r's session.
 * Host memory, valid for the call. Rows of one session come in ascending position. */
struct op_batch {
    uint32_t rows;
    const uint32_t *position;          /* [rows] */
    const uint32_t *const *page_table; /* [rows] */
};

/* The ops (functions of struct backend_ops in backend.h):
 *
 * embed      out[rows][cols]: row tokens[r] of table, converted to f32 (Q8_0: scale * q, one
 *            rounding). tokens is host memory; each id < table rows.
 *
 * rmsnorm    out[rows][cols]. Lane i of 256 starts at 0 and takes sum = fma(x[c], x[c], sum) for
 *            c = i, i+256, ... in order; then for width = 128, 64, ..., 1:
 *            lane[i] += lane[i + width]. mean = lane[0] / (float)cols;
 *            scale = 1 / sqrt(mean + eps), or NaN when mean is not finite (a row whose squares
 *            overflow must not become silent zeros); out = (x * scale) * weight. out may be x.
 *
 * matmul     out[rows][w.rows] from x[rows][w.cols]: each element one dot product over w.cols.
 *            F32, F16: the columns are cut into 8 contiguous strands of ceil(cols/8); strand s
 *            starts at 0 and takes sum = fma(w, x, sum) in order; result = 0 + s0 + s1 ... + s7,
 *            left to right (starting from +0, so the result is never -0).
 *            Q8_0: x is quantized per 32 columns: amax = max |x|; when amax is not finite d = NaN
 *            and all q = 0; when amax < 2^-100, d = 0 and all q = 0; otherwise d = amax / 127,
 *            q = round-to-nearest-even(x * (127 / amax)). (A NaN among the x makes amax not
 *            finite.) Per block s = exact integer sum of
 *            q_w * q_x. The blocks are cut into 8 contiguous strands of ceil(blocks/8); strand
 *            sum = fma((float)s, dw * dx, sum) over its blocks in order; strands added as above.
 *
 * rope       x[rows][heads][head_dim] in place, interleaved pairs: with a = x[2i], b = x[2i+1],
 *            c and s of (position, i): x[2i] = fma(a, c, -(b * s)), x[2i+1] = fma(a, s, b * c),
 *            the inner products rounded.
 *
 * kv_write   k, v [rows][kv_heads][head_dim] are rounded to f16 (nearest even) into the page of
 *            (row's session, position). A NaN, an infinity or an overflow is stored as the quiet
 *            NaN 0x7e00, so that every attention that reads it gives NaN (an infinite key could
 *            vanish as exp(-infinity) = 0).
 *
 * attention  out[rows][heads][head_dim] from q of the same shape. Head h reads kv head
 *            h / (heads / kv_heads). With scale = 1 / sqrt((float)head_dim) (two roundings) and
 *            p running over positions 0 .. position[r]:
 *            score[p] = dot(k[p], q) * scale, dot as matmul F16 with K = head_dim;
 *            top = max score (NaN scores passed over: their e[p] is NaN anyway);
 *            e[p] = det_exp(score[p] - top);
 *            per tile of 64 absolute positions, in order: l_t += e[p];
 *            a_t[c] = fma(e[p], v[p][c], a_t[c]); both start at 0;
 *            l = 0 + l_0 + l_1 ..., a = 0 + a_0 + a_1 ... left to right; out = a / l.
 *
 * silu_mul   out = (gate / (1 + det_exp(-gate))) * up. out may be gate or up.
 *
 * add        out = (a + b) + 0 (so -0 never leaves). out may be a or b.
 *
 * all_finite *out = 1 when no element is NaN or infinite. Waits for the work queued before it.
 *
 * Non-finite values: every op that reads a NaN or infinity that can change its result produces a
 * non-finite result; which one is not defined. The engine checks after every layer span. */

#ifdef __cplusplus
}
#endif
#endif
