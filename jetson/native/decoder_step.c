/* A decoder's body as one operator of ONNX Runtime on the CPU: tokens of some texts and their caches in, hidden states out.
 *
 *   domain flashhead.native, operator DecoderStep, inputs and attributes as `export/decoder.py` writes them
 *   input_ids          in   [1, S] int64: the texts' tokens, one text behind the other
 *   texts              in   [M, 3] int64 of each text: its tokens here, its positions before them, and where in the cache it begins
 *   past keys, values  in   [1, KV, P, size] float32 of each layer: each text's positions side by side, those of no two texts the same
 *   hidden_states      out  [1, S, d] float32
 *   keys, values       out  [1, KV, max(P, the last text's end), size] float32 of each layer: where one is the buffer of its past, nothing is copied
 *
 * Without the attribute `texts`, as it was exported before there were several, the second input is
 *   attention_mask     in   [1, T] int64, of which only T is read: one text of S tokens after T - S positions, at the cache's beginning
 *
 * Judge: the standard body that it was made from (tests/export/test_decoder.py), with products of 8-bit activations.
 *
 * Threads share every product of a step (threads.h), and texts share its reads of the weights. What a token gets depends on the tokens
 * before it in its text alone, but for attention, whose sums are added in another order where several tokens of a text are fed at once.
 */
#include "operator.h"

#if defined(__GNUC__)

#include <stdlib.h>
#include <string.h>

#include "decoder.h"
#include "vector.h"

enum { MOST_HEADS = 1 << 16 }; /* of a layer, and floats of one: beyond all models, and their product no overflow */
enum { RECORD = 16, NUMBERS = 2, FIXED_INPUTS = 2 }; /* whole numbers and floats of an instruction; inputs before the cache */

struct decoder_kernel {
    ort_api api;
    struct decoder decoder;
    int64_t vocab; /* of the embedding */
    int64_t several; /* the second input says which texts there are */
    float **offsets; /* [n_instructions], of matrices with zero points */
};

/* ---- a run ---- */

static ort_status *cache_of(const struct decoder_kernel *k, ort_context *context, const struct instruction *i, struct pass *p, size_t which, float **out) {
    struct tensor past;
    void *now;
    const size_t index = FIXED_INPUTS + 2 * i->layer + which;
    size_t total = 0, before = 0; /* positions that the cache must have, and those that are read of its past */
    for (const struct text *t = p->texts; t < p->texts + p->n_texts; t++) {
        total = t->start + t->past + t->tokens > total ? t->start + t->past + t->tokens : total;
        before = t->start + t->past > before ? t->start + t->past : before;
    }
    TRY(op_input(k->api, context, index, &past));
    const int64_t *size = past.dimensions;
    const int fits_layer = past.type == ORT_FLOAT && past.rank == 4 && size[0] == 1 && size[1] == (int64_t)i->kv_heads && size[3] == (int64_t)i->n;
    if (!fits_layer || size[2] < (int64_t)before)
        return refused(k->api, "DecoderStep: a past does not have the shape [1, heads, positions, size] of its layer, with all positions before the tokens");
    const size_t had = (size_t)past.dimensions[2], room = had > total ? had : total;
    const int64_t shape[] = {1, (int64_t)i->kv_heads, (int64_t)room, (int64_t)i->n};
    TRY(op_output(k->api, context, 1 + 2 * i->layer + which, shape, 4, &now));
    if (now != past.data && before)
        for (size_t h = 0; h < i->kv_heads; h++)
            memcpy((float *)now + h * room * i->n, (const float *)past.data + h * had * i->n, before * i->n * sizeof(float));
    p->caches[i->layer].capacity = room;
    *out = now;
    return NULL;
}

static ort_status *run(const struct decoder_kernel *k, ort_context *context, struct pass *p) {
    const struct decoder *d = &k->decoder;
    for (size_t i = 0; i < d->n_instructions; i++) {
        const struct instruction *one = &d->instructions[i];
        if (one->operation != ATTEND) continue;
        for (const struct text *t = p->texts; one->turned && t < p->texts + p->n_texts; t++)
            if (t->past + t->tokens > one->turns) return refused(k->api, "DecoderStep: the text is longer than the model's rotary tables");
        TRY(cache_of(k, context, one, p, 0, &p->caches[one->layer].keys));
        TRY(cache_of(k, context, one, p, 1, &p->caches[one->layer].values));
    }
    const int64_t shape[] = {1, (int64_t)p->tokens, (int64_t)d->hidden};
    void *hidden;
    TRY(op_output(k->api, context, 0, shape, 3, &hidden));
    if (!p->tokens) return NULL;
    TRY(team_step(&p->team, k->api, context, pass_run, p));
    for (size_t t = 0; t < p->tokens; t++) memcpy((float *)hidden + t * d->hidden, place_of(p, d->result, t), d->hidden * sizeof(float));
    return NULL;
}

/* The texts of a run, [*n], to be freed. */
static ort_status *texts_of(const struct decoder_kernel *k, const struct tensor *ids, const struct tensor *second, struct text **texts, size_t *n) {
    const int64_t *x = second->data;
    size_t tokens = 0;
    *texts = NULL, *n = 1;
    if (ids->rank != 2 || second->rank != 2 || ids->dimensions[0] != 1)
        return refused(k->api, "DecoderStep: input_ids is not [1, S], or what stands beside it has not two dimensions");
    if (k->several) {
        *n = (size_t)second->dimensions[0];
        if (second->dimensions[1] != 3) return refused(k->api, "DecoderStep: texts is not [M, 3]: tokens, positions before them, the first position in the cache");
        for (size_t t = 0; t < *n; t++) {
            for (size_t f = 0; f < 3; f++)
                if (x[3 * t + f] < 0 || x[3 * t + f] > INT32_MAX) return refused(k->api, "DecoderStep: a number of texts is below 0 or beyond all caches");
            tokens += (size_t)x[3 * t];
        }
        if (tokens != ids->n) return refused(k->api, "DecoderStep: the tokens of all texts are not those of input_ids");
    } else if (second->dimensions[0] != 1 || second->dimensions[1] < ids->dimensions[1])
        return refused(k->api, "DecoderStep: attention_mask is not [1, T] with T of at least S: one text at a time");
    *texts = malloc((*n ? *n : 1) * sizeof **texts);
    if (!*texts) return failed(k->api, "DecoderStep: not enough memory for the texts");
    if (!k->several) (*texts)[0] = (struct text){.tokens = ids->n, .past = (size_t)second->dimensions[1] - ids->n};
    for (size_t t = 0; k->several && t < *n; t++)
        (*texts)[t] = (struct text){.tokens = (size_t)x[3 * t], .past = (size_t)x[3 * t + 1], .start = (size_t)x[3 * t + 2]};
    return NULL;
}

static ort_status *ORT_CALL compute(void *op_kernel, ort_context *context) {
    const struct decoder_kernel *k = op_kernel;
    struct tensor ids, second;
    struct text *texts;
    size_t n;
    struct pass p;
    TRY(op_input(k->api, context, 0, &ids));
    TRY(op_input(k->api, context, 1, &second));
    TRY(texts_of(k, &ids, &second, &texts, &n));
    ort_status *status = NULL;
    for (size_t t = 0; !status && t < ids.n; t++) {
        const int64_t id = ((const int64_t *)ids.data)[t];
        if (id < 0 || id >= k->vocab) status = refused(k->api, "DecoderStep: a token of input_ids is none of the vocabulary");
    }
    if (!status && !pass_open(&p, &k->decoder, texts, n, THREADS > 1)) status = failed(k->api, "DecoderStep: not enough memory for the tokens");
    free(texts);
    if (status) return status;
    p.ids = ids.data;
    status = run(k, context, &p);
    pass_close(&p);
    return status;
}

/* ---- the kernel from its node ---- */

struct reader {
    struct node node;
    struct decoder_kernel *k;
    size_t inputs, first; /* inputs of the node; the first initializer */
    int64_t *records;
    float *numbers;
};

static ort_status *wrong(const struct reader *r) { return refused(r->k->api, "DecoderStep: an instruction does not fit the arrays or slots that it names"); }

static int fits(const struct decoder *d, struct place at, size_t n) {
    return at.slot >= 0 && (size_t)at.slot < d->n_slots && at.offset <= d->widths[at.slot] && n <= d->widths[at.slot] - at.offset;
}

/* Initializer `index`, of a type (ORT_ANY: of floats) and with at least n elements. */
static ort_status *initializer(struct reader *r, int64_t index, int type, size_t n, struct tensor *out) {
    if (index < 0 || (size_t)index >= r->inputs - r->first) return wrong(r);
    TRY(tensor_of(&r->node, r->first + (size_t)index, out));
    const int a_float = out->type == ORT_FLOAT || out->type == ORT_FLOAT16 || out->type == ORT_BFLOAT16;
    if (out->n < n || !out->data || (type == ORT_ANY ? !a_float : out->type != type)) return wrong(r);
    return NULL;
}

static ort_status *read_matrix(struct reader *r, const int64_t *x, struct instruction *i, float **offsets) {
    struct coded *m = &i->matrix;
    struct tensor codes, scales, zeros;
    if (x[3] < 1 || (x[4] != 32 && x[4] != 64 && x[4] != 128)) return wrong(r);
    m->n = i->n, m->k = (size_t)x[3], m->group = (size_t)x[4], m->groups = (m->k + m->group - 1) / m->group;
    TRY(initializer(r, x[0], ORT_UINT8, m->n * m->groups * m->group / 2, &codes));
    TRY(initializer(r, x[1], ORT_FLOAT, m->n * m->groups, &scales));
    m->codes = codes.data, m->scales = scales.data;
    if (x[2] < 0) return NULL;
    const size_t row = (m->groups + 1) / 2; /* two zero points in a byte */
    TRY(initializer(r, x[2], ORT_UINT8, m->n * row, &zeros));
    *offsets = malloc(m->n * m->groups * sizeof(float));
    if (!*offsets) return failed(r->k->api, "DecoderStep: not enough memory for the zero points");
    for (size_t n = 0; n < m->n; n++)
        for (size_t g = 0; g < m->groups; g++) {
            const int zero = ((const uint8_t *)zeros.data)[n * row + g / 2] >> (g % 2 * 4) & 15;
            (*offsets)[n * m->groups + g] = m->scales[n * m->groups + g] * (float)zero;
        }
    m->offsets = *offsets;
    return NULL;
}

static ort_status *read_attention(struct reader *r, const int64_t *record, struct instruction *i) {
    const struct decoder *d = &r->k->decoder;
    const int64_t *x = record + 11;
    struct tensor cosine, sine;
    if (x[0] < 0 || (size_t)x[0] >= d->n_layers || x[1] < 1 || x[2] < 1 || x[1] % x[2] || i->n % 16 || x[1] > MOST_HEADS || i->n > MOST_HEADS) return wrong(r);
    i->layer = (size_t)x[0], i->heads = (size_t)x[1], i->kv_heads = (size_t)x[2], i->window = i->repeat;
    const size_t queries = i->heads * i->n, keys = i->kv_heads * i->n;
    if (!fits(d, i->a, queries) || !fits(d, i->b, keys) || !fits(d, i->c, keys) || !fits(d, i->out, queries)) return wrong(r);
    if (x[3] < 0) return NULL;
    TRY(initializer(r, x[3], ORT_FLOAT, 1, &cosine));
    TRY(initializer(r, x[4], ORT_FLOAT, cosine.n, &sine));
    if (cosine.rank != 2 || (size_t)cosine.dimensions[1] * 2 > i->n) return wrong(r);
    i->cosine = cosine.data, i->sine = sine.data, i->turns = (size_t)cosine.dimensions[0], i->turned = (size_t)cosine.dimensions[1] * 2;
    return NULL;
}

static ort_status *read_instruction(struct reader *r, size_t at, struct instruction *i) {
    const struct decoder *d = &r->k->decoder;
    const int64_t *record = r->records + at * RECORD, *x = record + 11;
    struct tensor rows, bias;
    if (record[0] < 0 || record[0] >= OPERATIONS || record[1] < 1 || record[2] < 0) return wrong(r);
    for (size_t f = 3; f < 11; f++)
        if (record[f] < -1 || record[f] > INT32_MAX) return wrong(r);
    i->operation = (enum operation)record[0], i->n = (size_t)record[1], i->repeat = (size_t)record[2];
    i->out = (struct place){(int)record[3], (size_t)record[4]}, i->a = (struct place){(int)record[5], (size_t)record[6]};
    i->b = (struct place){(int)record[7], (size_t)record[8]}, i->c = (struct place){(int)record[9], (size_t)record[10]};
    i->number = r->numbers[at * NUMBERS], i->softcap = r->numbers[at * NUMBERS + 1];
    if (i->operation == ATTEND) return read_attention(r, record, i);
    const size_t width = i->n * i->repeat;
    if (!width || i->n > INT32_MAX || i->repeat > INT32_MAX || !fits(d, i->out, width)) return wrong(r);
    if (i->operation == LINEAR) {
        if (!fits(d, i->a, (size_t)x[3])) return wrong(r);
        return read_matrix(r, x, i, &r->k->offsets[at]);
    }
    if (i->operation == EMBED) {
        TRY(initializer(r, x[0], ORT_ANY, i->n, &rows));
        if (rows.rank != 2 || rows.dimensions[1] != (int64_t)i->n) return wrong(r);
        i->rows = rows.data, i->type = rows.type, r->k->vocab = rows.dimensions[0];
        return NULL;
    }
    if (!fits(d, i->a, width)) return wrong(r);
    if ((i->operation == ADD || i->operation == MULTIPLY) && !fits(d, i->b, width)) return wrong(r);
    if (i->operation == ACTIVATE && (x[0] < 0 || x[0] >= ACTIVATIONS || (i->b.slot >= 0 && !fits(d, i->b, width)))) return wrong(r);
    i->activation = i->operation == ACTIVATE ? (enum activation)x[0] : SILU;
    if (i->operation == RMS_NORM || i->operation == LAYER_NORM || i->operation == ADD_ROW || i->operation == MULTIPLY_ROW) {
        TRY(initializer(r, x[0], ORT_FLOAT, i->n, &rows));
        i->rows = rows.data;
    }
    if (i->operation == LAYER_NORM && x[1] >= 0) {
        TRY(initializer(r, x[1], ORT_FLOAT, i->n, &bias));
        i->bias = bias.data;
    }
    return NULL;
}

static ort_status *fill(struct reader *r, const ort_info *info) {
    struct decoder *d = &r->k->decoder;
    ort_api api = r->k->api;
    int64_t widths[MOST_SLOTS], layers_count, result[2];
    size_t n_records = 0, n_numbers = 0, n_slots = MOST_SLOTS, n_result = 2;
    TRY(ORT(api, int_attribute)(info, "layers", &layers_count));
    ort_status *absent = ORT(api, int_attribute)(info, "texts", &r->k->several);
    if (absent) ORT(api, release_status)(absent);
    TRY(ORT(api, int_attributes)(info, "widths", widths, &n_slots));
    TRY(ORT(api, int_attributes)(info, "result", result, &n_result));
    TRY(ORT(api, int_attributes)(info, "instructions", NULL, &n_records));
    TRY(ORT(api, float_attributes)(info, "numbers", NULL, &n_numbers));
    TRY(ORT(api, input_count)(info, &r->inputs));
    d->n_instructions = n_records / RECORD;
    if (!d->n_instructions || n_records % RECORD || n_numbers != d->n_instructions * NUMBERS || layers_count < 1 || layers_count > 4096 || n_result != 2)
        return refused(api, "DecoderStep: attributes of the body do not fit each other");
    d->n_layers = (size_t)layers_count, d->n_slots = n_slots;
    r->first = FIXED_INPUTS + 2 * d->n_layers;
    if (r->inputs <= r->first) return refused(api, "DecoderStep: the node has fewer inputs than its layers need");
    r->records = malloc(n_records * sizeof *r->records);
    r->numbers = malloc(n_numbers * sizeof *r->numbers);
    d->instructions = calloc(d->n_instructions, sizeof *d->instructions);
    r->k->offsets = calloc(d->n_instructions, sizeof *r->k->offsets);
    if (!r->records || !r->numbers || !d->instructions || !r->k->offsets) return failed(api, "DecoderStep: not enough memory for the operator");
    TRY(ORT(api, int_attributes)(info, "instructions", r->records, &n_records));
    TRY(ORT(api, float_attributes)(info, "numbers", r->numbers, &n_numbers));
    for (size_t s = 0; s < n_slots; s++) {
        if (widths[s] < 1 || widths[s] > INT32_MAX) return wrong(r);
        d->widths[s] = (size_t)widths[s];
    }
    for (size_t i = 0; i < d->n_instructions; i++) TRY(read_instruction(r, i, &d->instructions[i]));
    if (result[0] < 0 || result[1] < 0) return wrong(r);
    d->result = (struct place){(int)result[0], (size_t)result[1]};
    const struct instruction *last = &d->instructions[d->n_instructions - 1];
    d->hidden = last->n * last->repeat;
    return fits(d, d->result, d->hidden) ? NULL : wrong(r);
}

static void ORT_CALL destroy(void *kernel) {
    struct decoder_kernel *k = kernel;
    for (size_t i = 0; k->offsets && i < k->decoder.n_instructions; i++) free(k->offsets[i]);
    free(k->offsets);
    free(k->decoder.instructions);
    free(k);
}

static ort_status *ORT_CALL create(const struct ort_op *op, ort_api api, const ort_info *info, void **out) {
    (void)op;
    struct decoder_kernel *k = calloc(1, sizeof *k);
    if (!k) return failed(api, "DecoderStep: not enough memory for the operator");
    k->api = api;
    struct reader r = {.node = {api, info, "DecoderStep", "the body", 0}, .k = k};
    ort_status *status = fill(&r, info);
    free(r.records);
    free(r.numbers);
    if (status) destroy(k);
    else *out = k;
    return status;
}

/* ---- the operator ---- */

static const char *ORT_CALL name(const struct ort_op *op) { (void)op; return "DecoderStep"; }
static size_t ORT_CALL inputs(const struct ort_op *op) { (void)op; return 3; }
static size_t ORT_CALL outputs(const struct ort_op *op) { (void)op; return 2; }
static int ORT_CALL input_type(const struct ort_op *op, size_t i) { (void)op; return i < FIXED_INPUTS ? ORT_INT64 : ORT_ANY; }
static int ORT_CALL input_kind(const struct ort_op *op, size_t i) { (void)op; return i < FIXED_INPUTS ? ORT_REQUIRED : ORT_VARIADIC; }
static int ORT_CALL output_type(const struct ort_op *op, size_t i) { (void)op; (void)i; return ORT_FLOAT; }
static int ORT_CALL output_kind(const struct ort_op *op, size_t i) { (void)op; return i ? ORT_VARIADIC : ORT_REQUIRED; }

const struct ort_op decoder_step = {
    .version = ORT_VERSION, .name = name, .provider = op_on_cpu, .input_type = input_type, .inputs = inputs,
    .output_type = output_type, .outputs = outputs, .destroy = destroy, .input_kind = input_kind, .output_kind = output_kind,
    .input_memory = op_plain_memory, .variadic_input_least = op_one, .variadic_input_of_one_type = op_zero, .variadic_output_least = op_one,
    .variadic_output_of_one_type = op_one, .create = create, .compute = compute, .first_version = op_one, .last_version = op_latest,
};

#else
typedef int no_decoder_step; /* a file is not empty */
#endif
