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

#define OPS_BLOCK       32u  /* columns that share a scale when activations are quantized */
#define OPS_STRANDS     8u   /* contiguous pieces of a dot product's K dimension */
#define OPS_LANES       256u /* lanes of a long sum: index modulo 256 */
#define OPS_TILE_TOKENS 64u  /* absolute positions of one attention tile */
#define KV_PAGE_TOKENS  64u  /* tokens of one KV page: exactly one attention tile */

/* Numbers are those of GGUF (ggml_type). Block formats: kernels/quant.h. */
enum tensor_type {
    TENSOR_F32 = 0,
    TENSOR_F16 = 1,
    TENSOR_Q4_0 = 2,
    TENSOR_Q4_1 = 3,
    TENSOR_Q5_0 = 6,
    TENSOR_Q5_1 = 7,
    TENSOR_Q8_0 = 8,
    TENSOR_Q2_K = 10,
    TENSOR_Q3_K = 11,
    TENSOR_Q4_K = 12,
    TENSOR_Q5_K = 13,
    TENSOR_Q6_K = 14,
    TENSOR_BF16 = 30,
};

/* One matrix [rows][cols] on a backend, or several of one shape and type (the experts of a layer),
 * repacked as that backend likes it; row-major in its source. */
struct weight;

enum rope_style {
    ROPE_PAIRS = 0,  /* dims 2i and 2i + 1 turn together */
    ROPE_HALVES = 1, /* dims i and half_dim + i */
};

/* Rotation table, rounded from binary64 once on the host (kernels/rope_table.h makes it):
 * [positions][half_dim] of cosine and of sine. The first 2 * half_dim dims of a head turn, the
 * others stay. */
struct rope_table {
    const float *cos_dev;
    const float *sin_dev;
    uint32_t position_count;
    uint32_t half_dim;
    enum rope_style style;
};

/* What a layer's attention looks like. */
struct attention_params {
    uint32_t heads;
    float scale;     /* of the scores */
    float softcap;   /* 0: none; else score = softcap * tanh(score / softcap) */
    uint32_t window; /* 0: none; else row r looks at its own position and window - 1 before it */
};

/* What the gate of a feed-forward block goes through. */
enum act_kind { ACT_SILU = 0, ACT_GELU_TANH = 1 };

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
 * embed      out[rows][cols]: row tokens[r] of table, converted to f32 (quantized:
 *            fma(scale_w, q_w, min_w), see matmul). tokens is host memory; each id < table rows.
 *
 * rmsnorm    out[rows][cols]. Lane i of 256 starts at 0 and takes sum = fma(x[c], x[c], sum) for
 *            c = i, i+256, ... in order; then for width = 128, 64, ..., 1:
 *            lane[i] += lane[i + width]. mean = lane[0] / (float)cols;
 *            scale = 1 / sqrt(mean + eps), or NaN when mean is not finite (a row whose squares
 *            overflow must not become silent zeros); out = (x * scale) * weight. out may be x.
 *
 * matmul     out[rows][w.rows] from x[rows][w.cols]: each element one dot product over w.cols.
 *            F32, F16, BF16: the columns are cut into 8 contiguous strands of ceil(cols/8);
 *            strand s starts at 0 and takes sum = fma(w, x, sum) in order; result =
 *            0 + s0 + s1 ... + s7, left to right (starting from +0, so it is never -0).
 *            Quantized weights: x is quantized per 32 columns: amax = max |x|; when amax is not
 *            finite d = NaN and all q = 0; when amax < 2^-100, d = 0 and all q = 0; otherwise
 *            d = amax / 127, q = round-to-nearest-even(x * (127 / amax)). (A NaN among the x makes
 *            amax not finite.) The blocks of 32 are cut into 8 contiguous strands of
 *            ceil(blocks/8). A block is one group of columns, or two of 16 for Q2_K, Q3_K and
 *            Q6_K; per group, in order, s = exact integer sum of q_w * q, u = exact integer sum of
 *            q:
 *            sum = fma((float)s, scale_w * d, sum), then, for types with a minimum,
 *            sum = fma(min_w, (float)u * d, sum). q_w, scale_w and min_w are those of
 *            kernels/quant.h, all exact in f32. Strands are added as above.
 *
 * matmul_experts  out[slots][w.rows]: slot i is matrix ids[i] of w times row i / slots_per_row of
 *            x; each element as matmul. ids is device memory; each id < the number of matrices.
 *
 * add_bias   x[rows][cols] = (x + bias[cols]) + 0, in place.
 *
 * rope       x[rows][heads][head_dim] in place: for pair i of half_dim, with a = x[2i],
 *            b = x[2i+1] (ROPE_PAIRS) or a = x[i], b = x[half_dim + i] (ROPE_HALVES) and c and s of
 *            (position, i): a becomes fma(a, c, -(b * s)), b becomes fma(a, s, b * c), the inner
 *            products rounded.
 *
 * kv_write   k, v [rows][kv_heads][head_dim] are rounded to f16 (nearest even) into the page of
 *            (row's session, position). A NaN, an infinity or an overflow is stored as the quiet
 *            NaN 0x7e00, so that every attention that reads it gives NaN (an infinite key could
 *            vanish as exp(-infinity) = 0).
 *
 * attention  out[rows][heads][head_dim] from q of the same shape. Head h reads kv head
 *            h / (heads / kv_heads). p runs over positions first .. position[r], where first is 0,
 *            or position[r] - window + 1 when there is a window and that is above 0:
 *            score[p] = dot(k[p], q) * scale, dot as matmul F16 with K = head_dim;
 *            with a softcap, score[p] = softcap(score[p]) as the op below;
 *            top = max score (NaN scores passed over: their e[p] is NaN anyway);
 *            e[p] = det_exp(score[p] - top);
 *            per tile of 64 absolute positions, in order: l_t += e[p];
 *            a_t[c] = fma(e[p], v[p][c], a_t[c]); both start at 0;
 *            l = 0 + l_0 + l_1 ..., a = 0 + a_0 + a_1 ... left to right over the tiles that have a
 *            position in the range; out = a / l.
 *
 * act_mul    out = act(gate) * up. ACT_SILU: gate / (1 + det_exp(-gate)). ACT_GELU_TANH:
 *            (0.5 * gate) * (1 + det_tanh((0.797884583 * gate) * fma(0.0447149985 * gate, gate,
 *            1))). out may be gate or up.
 *
 * scale      x = x * factor, in place.
 *
 * softcap    x = det_tanh(x / cap) * cap + (x - x), in place; so a NaN or infinity gives a NaN.
 *
 * route      For each of rows: ids[r][used], weights[r][used] from logits[r][experts]: the used
 *            largest logits in descending order, equal ones by ascending id; e_j =
 *            det_exp(l_j - l_0), s = 0 + e_0 + e_1 ...; weight_j = e_j / s. When one of the row's
 *            logits is not finite: ids 0, 1, ... and NaN weights. used <= experts.
 *
 * combine    out[rows][cols] from y[rows][used][cols]: sum starts at 0 and takes
 *            sum = fma(weights[r][j], y[r][j][c], sum) for j = 0 .. used - 1.
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
