#include "worker/model/hf_rope.h"

#include "kernels/ops.h"
#include "kernels/rope_table.h"

#include <string.h>

#define PI             3.14159265358979323846
#define LOG_2          0.693147180559945309417
#define BASE_MAX       1e12
#define FACTOR_MAX     1e6
#define BASE_LOCAL     10000.0 /* of Gemma 3's windowed layers when nothing is said */
#define PHI3_POSITIONS 4096u   /* that a Phi-3 was trained with when nothing is said */

/* One object that describes a rotation. Zeros and NULLs: not said. */
struct setting {
    const char *type;
    double base;
    double factor;
    double attention_factor;
    double low_factor;
    double high_factor;
    double partial;
    uint32_t original_positions;
    const json_t *short_factors;
    const json_t *long_factors;
};

/* ---- reading --------------------------------------------------------------------------------- */

static enum odsi_err check_members(const json_t *object)
{
    static const char *const known[] = {
        "rope_type",
        "type",
        "rope_theta",
        "factor",
        "attention_factor",
        "low_freq_factor",
        "high_freq_factor",
        "partial_rotary_factor",
        "original_max_position_embeddings",
        "short_factor",
        "long_factor",
    };
    char shown[HF_JSON_SHOWN_SIZE];
    for (void *at = json_object_iter((json_t *)object); at;
         at = json_object_iter_next((json_t *)object, at)) {
        const char *key = json_object_iter_key(at);
        int found = json_is_null(json_object_iter_value(at));
        for (size_t i = 0; i < sizeof known / sizeof known[0]; i++)
            found = found || strcmp(key, known[i]) == 0;
        if (!found)
            return odsi_fail(ODSI_ERR_UNSUPPORTED,
                             "%s is a setting of the rotation that this build does not know",
                             hf_json_shown(shown, key));
    }
    return ODSI_OK;
}

/* object may be NULL: then nothing is said. */
static enum odsi_err read_setting(struct setting *out, const json_t *object)
{
    struct hf_json fields = {.object = object};
    memset(out, 0, sizeof *out);
    out->type = "default";
    if (!object)
        return ODSI_OK;
    enum odsi_err err = check_members(object);
    if (err != ODSI_OK)
        return err;
    const char *old = hf_json_text_view(&fields, "type", NULL);
    out->type = hf_json_text_view(&fields, "rope_type", old ? old : "default");
    out->base = hf_json_f64(&fields, "rope_theta", 0.0);
    out->factor = hf_json_f64(&fields, "factor", 0.0);
    out->attention_factor = hf_json_f64(&fields, "attention_factor", 0.0);
    out->low_factor = hf_json_f64(&fields, "low_freq_factor", 0.0);
    out->high_factor = hf_json_f64(&fields, "high_freq_factor", 0.0);
    out->partial = hf_json_f64(&fields, "partial_rotary_factor", 0.0);
    out->original_positions = hf_json_u32(&fields, "original_max_position_embeddings", 0);
    out->short_factors = hf_json_array_view(&fields, "short_factor");
    out->long_factors = hf_json_array_view(&fields, "long_factor");
    if (fields.err == ODSI_OK && old && strcmp(old, out->type) != 0)
        return odsi_fail(ODSI_ERR_CORRUPT, "type and rope_type of the rotation differ");
    return fields.err;
}

/* Finds the object for all layers or those that look at everything, and for Gemma 3 the one for
 * its windowed layers (else NULL). */
static enum odsi_err find_objects(const struct hf_config *config, struct hf_json *fields,
                                  const json_t **all_out, const json_t **windowed_out)
{
    const json_t *scaling = hf_json_object_view(fields, "rope_scaling");
    const json_t *parameters = hf_json_object_view(fields, "rope_parameters");
    struct hf_json inner = {.object = parameters};
    *all_out = scaling ? scaling : parameters;
    *windowed_out = NULL;
    if (scaling && parameters)
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "both rope_scaling and rope_parameters describe the rotation; leave one");
    if (config->family != HF_GEMMA3 || !parameters || !hf_json_has(&inner, "full_attention"))
        return fields->err;
    if (json_object_size(parameters) != 2 || !hf_json_has(&inner, "sliding_attention"))
        return odsi_fail(ODSI_ERR_UNSUPPORTED, "rope_parameters describes other layers than "
                                               "full_attention and sliding_attention");
    *all_out = hf_json_object_view(&inner, "full_attention");
    *windowed_out = hf_json_object_view(&inner, "sliding_attention");
    return inner.err;
}

static enum odsi_err check_base(double base)
{
    if (base >= 1.0 && base <= BASE_MAX)
        return ODSI_OK;
    return odsi_fail(ODSI_ERR_CORRUPT, "the rotation's rope_theta is %g, not within 1 to %g", base,
                     BASE_MAX);
}

/* Of the layers with a window. Only Gemma 3 says it, and they have no scaling. */
static enum odsi_err read_windowed(struct hf_config *config, struct hf_json *fields,
                                   const json_t *object)
{
    struct setting setting;
    if (config->family != HF_GEMMA3 || config->params.window == 0) {
        config->params.rope_base_windowed = config->params.rope_base;
        return ODSI_OK;
    }
    double base = hf_json_f64(fields, "rope_local_base_freq", BASE_LOCAL);
    enum odsi_err err = read_setting(&setting, object);
    if (err == ODSI_OK && strcmp(setting.type, "default") != 0)
        err = odsi_fail(ODSI_ERR_UNSUPPORTED,
                        "the rotation of layers with a window is scaled; this build does not");
    if (setting.base > 0.0)
        base = setting.base;
    if (err == ODSI_OK)
        err = fields->err;
    if (err == ODSI_OK)
        err = check_base(base);
    config->params.rope_base_windowed = (float)base;
    return err;
}

/* How many dims of a head turn. */
static enum odsi_err read_dim(struct hf_config *config, struct hf_json *fields,
                              const struct setting *setting)
{
    struct model_params *p = &config->params;
    const double outer = hf_json_f64(fields, "partial_rotary_factor", 0.0);
    const double part = setting->partial > 0.0 ? setting->partial : outer > 0.0 ? outer : 1.0;
    if (fields->err != ODSI_OK)
        return fields->err;
    if (!(part > 0.0 && part <= 1.0) || (outer > 0.0 && outer != part))
        return odsi_fail(ODSI_ERR_CORRUPT, "partial_rotary_factor is %g, or two different numbers",
                         part);
    if (part != 1.0 && config->family != HF_PHI3)
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "partial_rotary_factor is %g; this build does that for Phi-3 alone", part);
    p->rope_dim = (uint32_t)((double)p->head_dim * part);
    if (p->rope_dim < 2 || p->rope_dim % 2 != 0)
        return odsi_fail(ODSI_ERR_CORRUPT, "%u dims of a head turn, which are no pairs",
                         p->rope_dim);
    return ODSI_OK;
}

/* ---- scaling --------------------------------------------------------------------------------- */

/* For x at least 1, within a few units in the last place of binary64: e * log 2 plus the series of
 * 2 atanh((m - 1) / (m + 1)) for m within [sqrt 1/2, sqrt 2]. The libraries' differ in their last
 * bits, and what is made of it is a part of the model's identity. */
static double natural_log(double x)
{
    int exponent = 0;
    while (x > 1.4142135623730951) {
        x *= 0.5;
        exponent++;
    }
    const double t = (x - 1.0) / (x + 1.0);
    const double square = t * t;
    double sum = 0.0;
    for (int power = 25; power >= 1; power -= 2)
        sum = sum * square + 1.0 / (double)power;
    return (double)exponent * LOG_2 + 2.0 * t * sum;
}

static enum odsi_err check_factor(const char *what, double factor, double min)
{
    if (factor >= min && factor <= FACTOR_MAX)
        return ODSI_OK;
    return odsi_fail(ODSI_ERR_CORRUPT, "the rotation's %s is %g, not within %g to %g", what, factor,
                     min, FACTOR_MAX);
}

/* Llama 3: long waves turn slower by factor, short ones stay, those between by something between.
 */
static enum odsi_err scale_llama3(struct hf_config *config, const struct setting *setting)
{
    double frequency[HF_CONFIG_ROPE_FACTOR_MAX];
    struct model_params *p = &config->params;
    enum odsi_err err = check_factor("factor", setting->factor, 1.0);
    if (err == ODSI_OK)
        err = check_factor("low_freq_factor", setting->low_factor, 1.0 / FACTOR_MAX);
    if (err == ODSI_OK)
        err = check_factor("high_freq_factor", setting->high_factor, 1.0 / FACTOR_MAX);
    if (err != ODSI_OK)
        return err;
    if (setting->high_factor <= setting->low_factor || setting->original_positions == 0)
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "high_freq_factor is not above low_freq_factor, or "
                         "original_max_position_embeddings is missing from the rotation");
    config->rope_factor_count = p->rope_dim / 2;
    p->features |= MODEL_ROPE_FACTORS;
    rope_table_frequencies(frequency, config->rope_factor_count, (double)p->rope_base, 1.0, NULL);
    for (uint32_t i = 0; i < config->rope_factor_count; i++) {
        const double waves = (double)setting->original_positions * frequency[i] / (2.0 * PI);
        double smooth =
            (waves - setting->low_factor) / (setting->high_factor - setting->low_factor);
        smooth = smooth < 0.0 ? 0.0 : smooth > 1.0 ? 1.0 : smooth;
        config->rope_factors[i] = (float)(1.0 / ((1.0 - smooth) / setting->factor + smooth));
    }
    return ODSI_OK;
}

static enum odsi_err copy_factors(struct hf_config *config, const json_t *factors)
{
    const uint32_t count = config->params.rope_dim / 2;
    if (!factors || json_array_size(factors) != count)
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "the rotation's long_factor or short_factor is not a list of %u numbers",
                         count);
    for (uint32_t i = 0; i < count; i++) {
        const json_t *factor = json_array_get(factors, i);
        const enum odsi_err err =
            check_factor("long_factor or short_factor", json_number_value(factor), 1.0);
        if (err != ODSI_OK)
            return err;
        config->rope_factors[i] = (float)json_number_value(factor);
    }
    config->rope_factor_count = count;
    config->params.features |= MODEL_ROPE_FACTORS;
    return ODSI_OK;
}

/* Phi-3: a list of factors for texts within the length of the training and one for longer ones. A
 * model is one function here, whatever the length of a text: the list is chosen by how long texts
 * may be (context_length), as engines that keep the rotated keys have to. */
static enum odsi_err scale_longrope(struct hf_config *config, struct hf_json *fields,
                                    const struct setting *setting)
{
    struct model_params *p = &config->params;
    const uint32_t outer = hf_json_u32(fields, "original_max_position_embeddings", 0);
    uint32_t original = outer ? outer : setting->original_positions;
    if (fields->err != ODSI_OK)
        return fields->err;
    if (original == 0)
        original = PHI3_POSITIONS;
    if (original < 2 || (setting->original_positions && setting->original_positions != original))
        return odsi_fail(ODSI_ERR_CORRUPT,
                         "original_max_position_embeddings is %u, or two "
                         "different numbers",
                         original);
    const double factor = (double)p->context_length / (double)original;
    if (setting->factor > 0.0 && setting->factor != factor)
        return odsi_fail(ODSI_ERR_UNSUPPORTED,
                         "the rotation's factor is %g, but max_position_embeddings over "
                         "original_max_position_embeddings is %g",
                         setting->factor, factor);
    double amplitude = 1.0;
    if (setting->attention_factor > 0.0)
        amplitude = setting->attention_factor;
    else if (factor > 1.0)
        amplitude = __builtin_sqrt(1.0 + natural_log(factor) / natural_log((double)original));
    const enum odsi_err err = check_factor("attention_factor", amplitude, 1.0 / FACTOR_MAX);
    if (err != ODSI_OK)
        return err;
    p->rope_amplitude = (float)amplitude;
    return copy_factors(config, factor > 1.0 ? setting->long_factors : setting->short_factors);
}

static enum odsi_err scale(struct hf_config *config, struct hf_json *fields,
                           const struct setting *setting)
{
    char shown[HF_JSON_SHOWN_SIZE];
    struct model_params *p = &config->params;
    const int phi3 = config->family == HF_PHI3;
    enum odsi_err err = ODSI_OK;
    if (strcmp(setting->type, "default") == 0)
        return ODSI_OK;
    if (strcmp(setting->type, "linear") == 0 && !phi3) {
        err = check_factor("factor", setting->factor, 1.0);
        p->rope_linear = (float)setting->factor;
    } else if (strcmp(setting->type, "llama3") == 0 && !phi3) {
        err = scale_llama3(config, setting);
    } else if (phi3 && (strcmp(setting->type, "longrope") == 0 ||
                        strcmp(setting->type, "su") == 0 || strcmp(setting->type, "yarn") == 0)) {
        /* Phi-3's own code takes all three names for this. */
        err = scale_longrope(config, fields, setting);
    } else {
        err = odsi_fail(ODSI_ERR_UNSUPPORTED,
                        "the rotation is scaled by %s, which this build does not do for this "
                        "architecture",
                        hf_json_shown(shown, setting->type));
    }
    /* model.h: factors divide in all layers, a linear factor in those without a window alone. */
    const int is_linear = strcmp(setting->type, "linear") == 0;
    if (err == ODSI_OK && p->window > 0 && is_linear != (config->family == HF_GEMMA3))
        err = odsi_fail(ODSI_ERR_UNSUPPORTED,
                        "the rotation is scaled by %s in a model with windows, which this build "
                        "does not do for this architecture",
                        hf_json_shown(shown, setting->type));
    return err;
}

enum odsi_err hf_rope_read(struct hf_config *config, struct hf_json *fields, double base)
{
    struct model_params *p = &config->params;
    const json_t *all, *windowed;
    struct setting setting;
    p->rope_style = ROPE_HALVES;
    p->rope_linear = p->rope_amplitude = 1.0f;
    enum odsi_err err = find_objects(config, fields, &all, &windowed);
    if (err == ODSI_OK)
        err = read_setting(&setting, all);
    if (err != ODSI_OK)
        return err;
    const double outer = hf_json_f64(fields, "rope_theta", 0.0);
    if (outer != 0.0 && setting.base != 0.0 && outer != setting.base)
        return odsi_fail(ODSI_ERR_CORRUPT, "rope_theta is %g in one place and %g in another", outer,
                         setting.base);
    if (outer != 0.0 || setting.base != 0.0)
        base = outer != 0.0 ? outer : setting.base;
    err = fields->err != ODSI_OK ? fields->err : check_base(base);
    if (err == ODSI_OK)
        err = read_dim(config, fields, &setting);
    if (err != ODSI_OK)
        return err;
    p->rope_base = (float)base;
    err = read_windowed(config, fields, windowed);
    if (err == ODSI_OK)
        err = scale(config, fields, &setting);
    return err;
}
