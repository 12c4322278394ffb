/* The step of a head as one operator of ONNX Runtime on the CPU: hidden states in, `head.Step` out.
 *
 *   domain flashhead.native, operator HeadStep, inputs and attributes as `export/native.py` writes them
 *   hidden_states      in   [N, d] float32
 *   token              out  [N] int64, -1 where a state is not finite
 *   candidate_ids      out  [N, C] int64, ascending, then -1
 *   candidate_logits   out  [N, C] float32, -inf where the id is -1
 *   counts             out  [N, 2 + stages] int64: clusters opened, slots scored by each code, rows scored exactly
 *   capped             out  [N] bool
 *
 * Judge: flashhead_edge/reference.py.
 *
 * What a state gets depends on that state alone, not on the batch, the threads or the width of the vector unit: vector.h and
 * matrix.h say how. Threads share the states of a batch, or the rows of a single one (threads.h). What a step costs: step.h.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "operator.h"
#include "step.h"

enum { SHARED_BYTES = 1 << 18 }; /* rotation and centroids together: below that no thread is woken */

static void write_row(const int32_t *ids, const float *logits, size_t n, size_t width, int64_t *out_ids, float *out_logits) {
    for (size_t i = 0; i < n; i++) out_ids[i] = ids[i];
    if (n) memcpy(out_logits, logits, n * sizeof *logits);
    for (size_t i = n; i < width; i++) { out_ids[i] = -1; out_logits[i] = -INFINITY; }
}

/* ---- a batch ---- */

struct found { /* of one state */
    int32_t *ids;
    float *logits;
    size_t n;
};

struct batch { /* states that threads share out among them */
    const struct kernel *k;
    const float *hidden;
    size_t n, piece;
    struct found *found;
    int64_t *counts, *token;
    unsigned char *capped;
    volatile int failed;
};

static void batch_piece(void *batch, size_t piece) {
    struct batch *b = batch;
    const size_t columns = 2 + b->k->stages;
    struct run r;
    if (!run_open(&r, b->k, 0)) { b->failed = 1; return; }
    for (size_t i = piece * b->piece; i < b->n && i < (piece + 1) * b->piece; i++) {
        struct found *f = &b->found[i];
        if (!run_step(&r, b->hidden + i * b->k->hidden, b->counts + i * columns, b->capped + i, b->token + i)) { b->failed = 1; break; }
        f->n = r.n_items;
        f->ids = malloc(f->n ? f->n * (sizeof *f->ids + sizeof *f->logits) : 1);
        if (!f->ids) { b->failed = 1; break; }
        f->logits = (float *)(f->ids + f->n);
        memcpy(f->ids, r.ids, f->n * sizeof *f->ids);
        memcpy(f->logits, r.logits, f->n * sizeof *f->logits);
    }
    run_close(&r);
}

static ort_status *compute_batch(struct batch *b, ort_context *context) {
    const struct kernel *k = b->k;
    const int64_t shape[] = {(int64_t)b->n, (int64_t)(2 + k->stages)};
    void *counts, *token, *capped, *ids, *logits;
    TRY(op_output(k->api, context, 0, shape, 1, &token));
    TRY(op_output(k->api, context, 3, shape, 2, &counts));
    TRY(op_output(k->api, context, 4, shape, 1, &capped));
    b->counts = counts, b->token = token, b->capped = capped;
    const size_t pieces = b->n < MOST_PIECES ? b->n : MOST_PIECES;
    if (b->n) {
        b->piece = (b->n + pieces - 1) / pieces;
        TRY(ORT(k->api, parallel_for)(context, batch_piece, pieces, 0, b));
    }
    if (b->failed) return failed(k->api, "HeadStep: not enough memory, or a damaged head");
    size_t width = 1;
    for (size_t i = 0; i < b->n; i++) width = b->found[i].n > width ? b->found[i].n : width;
    const int64_t wide[] = {(int64_t)b->n, (int64_t)width};
    TRY(op_output(k->api, context, 1, wide, 2, &ids));
    TRY(op_output(k->api, context, 2, wide, 2, &logits));
    for (size_t i = 0; i < b->n; i++)
        write_row(b->found[i].ids, b->found[i].logits, b->found[i].n, width, (int64_t *)ids + i * width, (float *)logits + i * width);
    return NULL;
}

/* ---- one state ---- */

struct one {
    struct run *r;
    const float *hidden;
    int64_t *counts, *token;
    unsigned char *capped;
    int made;
};

static void step_of_one(void *one) {
    struct one *o = one;
    o->made = run_step(o->r, o->hidden, o->counts, o->capped, o->token);
}

static ort_status *compute_one(struct run *r, const float *hidden, ort_context *context) {
    const struct kernel *k = r->k;
    const int64_t shape[] = {1, (int64_t)(2 + k->stages)};
    void *counts, *token, *capped, *ids, *logits;
    TRY(op_output(k->api, context, 0, shape, 1, &token));
    TRY(op_output(k->api, context, 3, shape, 2, &counts));
    TRY(op_output(k->api, context, 4, shape, 1, &capped));
    struct one one = {r, hidden, counts, token, capped, 0};
    TRY(team_step(&r->team, k->api, context, step_of_one, &one));
    if (!one.made) return failed(k->api, "HeadStep: the head's arrays name tokens that it does not have; export it again");
    const size_t width = r->n_items ? r->n_items : 1;
    const int64_t wide[] = {1, (int64_t)width};
    TRY(op_output(k->api, context, 1, wide, 2, &ids));
    TRY(op_output(k->api, context, 2, wide, 2, &logits));
    write_row(r->ids, r->logits, r->n_items, width, ids, logits);
    return NULL;
}

/* ---- a run ---- */

static ort_status *no_memory(const struct kernel *k) { return failed(k->api, "HeadStep: not enough memory for a step"); }

static ort_status *ORT_CALL compute(void *op_kernel, ort_context *context) {
    const struct kernel *k = op_kernel;
    struct tensor hidden;
    ort_status *status;
    TRY(op_input(k->api, context, 0, &hidden));
    if (hidden.rank != 2 || hidden.dimensions[1] != (int64_t)k->hidden)
        return refused(k->api, "HeadStep: hidden_states do not have the shape [N, hidden size] that the head was made for");
    if (hidden.dimensions[0] == 1) { /* one state: threads share its rows */
        struct run r;
        const int shared = THREADS > 1 && k->turn.n * k->turn.row + k->clusters * k->centroids.row >= SHARED_BYTES;
        if (!run_open(&r, k, shared)) return no_memory(k);
        status = compute_one(&r, hidden.data, context);
        run_close(&r);
        return status;
    }
    struct batch b = {.k = k, .hidden = hidden.data, .n = (size_t)hidden.dimensions[0]};
    b.found = calloc(b.n ? b.n : 1, sizeof *b.found);
    if (!b.found) return no_memory(k);
    status = compute_batch(&b, context);
    for (size_t i = 0; i < b.n; i++) free(b.found[i].ids);
    free(b.found);
    return status;
}

/* ---- the kernel from its node ---- */

/* The next input as a matrix of n rows (0: as many as there are) of `columns`; of a code: bytes, a `struct tail` behind each row. */
static ort_status *matrix_of(struct node *node, size_t n, size_t columns, int64_t type, int code, float half, struct matrix *m) {
    struct tensor t;
    TRY(tensor_of(node, node->at++, &t));
    memset(m, 0, sizeof *m);
    const size_t size = type == ORT_INT8 ? 1 : type == ORT_FLOAT ? 4 : 2;
    m->data = t.data, m->type = (int)type, m->half = half, m->columns = columns, m->n = (size_t)t.dimensions[0];
    m->padded = type == ORT_INT8 ? padded(columns, PAD) : columns;
    m->tail = padded(m->padded * size, PAD);
    m->row = code ? m->tail + sizeof(struct tail) : m->padded * size;
    const int known = type == ORT_INT8 || type == ORT_FLOAT || type == ORT_FLOAT16 || type == ORT_BFLOAT16;
    const int fits = t.rank == 2 && t.type == (code ? ORT_INT8 : type) && (size_t)t.dimensions[1] == (code ? m->row : m->padded);
    if (!fits || !known || columns < 1 || (n && m->n != n))
        return refused(node->api, "HeadStep: a matrix of the head has another type or shape than its sizes say");
    return NULL;
}

static ort_status *fill(struct kernel *k, const ort_info *info) {
    ort_api api = k->api;
    struct node node = {api, info, "HeadStep", "the head", 1};
    int64_t vocab, size, columns[2 + MOST_STAGES], types[2 + MOST_STAGES], caps[1 + MOST_STAGES];
    float margins[1 + MOST_STAGES], halves[2 + MOST_STAGES];
    size_t inputs, n = 1 + MOST_STAGES, margin_count = n, column_count = n + 1, type_count = n + 1, half_count = n + 1;
    TRY(ORT(api, int_attribute)(info, "vocab_size", &vocab));
    TRY(ORT(api, int_attribute)(info, "cluster_size", &size));
    TRY(ORT(api, float_attribute)(info, "state_power", &k->state_power));
    TRY(ORT(api, int_attributes)(info, "columns", columns, &column_count)); /* of the rotation, the centroids and each code */
    TRY(ORT(api, int_attributes)(info, "types", types, &type_count));
    TRY(ORT(api, float_attributes)(info, "halves", halves, &half_count));
    TRY(ORT(api, int_attributes)(info, "caps", caps, &n));
    TRY(ORT(api, float_attributes)(info, "margins", margins, &margin_count));
    TRY(ORT(api, input_count)(info, &inputs));
    if (n < 1 || margin_count != n || column_count != n + 1 || type_count != n + 1 || half_count != n + 1 || vocab < 1 || size < 1)
        return refused(api, "HeadStep: attributes of the head do not fit each other");
    k->vocab = (size_t)vocab, k->cluster_size = (size_t)size, k->stages = n - 1;
    if (inputs != 13 + 2 * k->stages) return refused(api, "HeadStep: the node has another number of inputs than its stages need");
    struct tensor t;
    TRY(tensor_of(&node, node.at, &t));
    TRY(matrix_of(&node, 0, (size_t)t.dimensions[1], t.type, 0, 0, &k->rows));
    if (k->rows.type == ORT_INT8 || k->rows.n < k->vocab) return refused(api, "HeadStep: the exact rows are not floats, or fewer than the vocabulary");
    k->hidden = k->rows.columns;
    TRY(array_of(&node, ORT_FLOAT, k->vocab, 1, (const void **)&k->bias));
    TRY(tensor_of(&node, node.at, &t));
    const size_t slots = t.n;
    k->clusters = slots / k->cluster_size;
    if (!k->clusters || slots % k->cluster_size || slots > INT32_MAX) return refused(api, "HeadStep: the token table is not of whole clusters");
    TRY(array_of(&node, ORT_INT32, slots, 0, (const void **)&k->token));
    TRY(tensor_of(&node, node.at, &t));
    k->always = t.n;
    TRY(array_of(&node, ORT_INT32, k->always, 1, (const void **)&k->always_slots));
    TRY(array_of(&node, ORT_FLOAT, k->hidden, 1, (const void **)&k->mean));
    k->coordinates = k->hidden;
    if (k->mean) {
        TRY(matrix_of(&node, 0, k->hidden, types[0], 0, halves[0], &k->turn));
        TRY(array_of(&node, ORT_FLOAT, k->hidden, 1, (const void **)&k->turn_scale));
        TRY(array_of(&node, ORT_FLOAT, k->turn.n, 1, (const void **)&k->turn.scale)); /* a step a coordinate: its row's scale */
        k->coordinates = k->turn.n + 1;
    } else node.at += 3;
    for (size_t i = 0; i <= k->stages; i++) {
        struct matrix *m = i ? &k->stage_rows[i - 1] : &k->centroids;
        struct gate *gate = i ? &k->gates[i - 1] : &k->probe;
        const size_t items = i ? slots : k->clusters;
        if (columns[1 + i] < 1 || (size_t)columns[1 + i] > k->coordinates || caps[i] < 1 || (size_t)caps[i] > items)
            return refused(api, "HeadStep: columns or caps of a stage are out of range");
        TRY(matrix_of(&node, items, (size_t)columns[1 + i], types[1 + i], i > 0, halves[1 + i], m));
        TRY(array_of(&node, ORT_FLOAT, m->columns, m->type != ORT_INT8, (const void **)&m->steps));
        if (!i) {
            TRY(array_of(&node, ORT_FLOAT, items, 1, (const void **)&m->scale));
            TRY(array_of(&node, ORT_FLOAT, items, 0, (const void **)&gate->nearness));
        }
        gate->margin = margins[i];
        gate->cap = (size_t)caps[i];
    }
    k->filled = calloc(k->clusters, sizeof *k->filled);
    if (!k->filled) return failed(api, "HeadStep: not enough memory for the operator");
    for (size_t i = 0; i < slots; i++) k->filled[i / k->cluster_size] += k->token[i] >= 0;
    for (size_t a = 0; a < k->always; a++)
        if (k->always_slots[a] < (a ? k->always_slots[a - 1] + 1 : 0) || (size_t)k->always_slots[a] >= slots || k->token[k->always_slots[a]] < 0)
            return refused(api, "HeadStep: always-scored slots are not ascending slots with a token");
    return NULL;
}

static void ORT_CALL destroy(void *kernel) {
    free(((struct kernel *)kernel)->filled);
    free(kernel);
}

static ort_status *ORT_CALL create(const struct ort_op *op, ort_api api, const ort_info *info, void **out) {
    (void)op;
    struct kernel *k = calloc(1, sizeof *k);
    if (!k) return failed(api, "HeadStep: not enough memory for the operator");
    k->api = api;
    ort_status *status = fill(k, info);
    if (status) destroy(k);
    else *out = k;
    return status;
}

/* ---- the operator ---- */

static const char *ORT_CALL name(const struct ort_op *op) { (void)op; return "HeadStep"; }
static size_t ORT_CALL inputs(const struct ort_op *op) { (void)op; return 2; }
static size_t ORT_CALL outputs(const struct ort_op *op) { (void)op; return 5; }
static int ORT_CALL input_type(const struct ort_op *op, size_t i) { (void)op; return i ? ORT_ANY : ORT_FLOAT; }
static int ORT_CALL input_kind(const struct ort_op *op, size_t i) { (void)op; return i ? ORT_VARIADIC : ORT_REQUIRED; }

static int ORT_CALL output_type(const struct ort_op *op, size_t i) {
    static const int types[] = {ORT_INT64, ORT_INT64, ORT_FLOAT, ORT_INT64, ORT_BOOL};
    (void)op;
    return types[i];
}

const struct ort_op head_step = {
    .version = ORT_VERSION, .name = name, .provider = op_on_cpu, .input_type = input_type, .inputs = inputs,
    .output_type = output_type, .outputs = outputs, .destroy = destroy, .input_kind = input_kind, .output_kind = op_required,
    .input_memory = op_plain_memory, .variadic_input_least = op_one, .variadic_input_of_one_type = op_zero, .variadic_output_least = op_one,
    .variadic_output_of_one_type = op_zero, .create = create, .compute = compute, .first_version = op_one, .last_version = op_latest,
};
