/* How operators read their nodes, and how ONNX Runtime gets to know them: see operator.h. */
#include "operator.h"

#include <stdio.h>
#include <string.h>

#include "layers.h"
#include "linear.h"
#include "vector.h"

static ort_status *read_tensor(ort_api api, const ort_value *value, struct tensor *out) {
    const size_t most = sizeof out->dimensions / sizeof *out->dimensions;
    ort_shape *shape;
    void *data = NULL;
    memset(out, 0, sizeof *out);
    TRY(ORT(api, shape)(value, &shape));
    ort_status *status = ORT(api, rank)(shape, &out->rank);
    if (!status) status = ORT(api, element_type)(shape, &out->type);
    if (!status && out->rank <= most) status = ORT(api, dimensions)(shape, out->dimensions, out->rank);
    ORT(api, release_shape)(shape);
    if (status) return status;
    out->n = out->rank <= most;
    for (size_t i = 0; i < out->rank && i < most; i++) out->n *= (size_t)out->dimensions[i];
    if (out->n) TRY(ORT(api, data)((ort_value *)value, &data));
    out->data = data;
    return NULL;
}

static ort_status *refused_array(const struct node *node, const char *why) {
    char text[200];
    snprintf(text, sizeof text, "%s: an array of %s %s", node->op, node->whose, why);
    return refused(node->api, text); /* which copies it */
}

ort_status *tensor_of(const struct node *node, size_t index, struct tensor *out) {
    const ort_value *value = NULL;
    int constant = 0;
    TRY(ORT(node->api, constant_input)(node->info, index, &constant, &value));
    if (!constant) return refused_array(node, "is not an initializer, expected all inputs but the first to be");
    TRY(read_tensor(node->api, value, out));
    if (out->rank < 1 || out->rank > 3) return refused_array(node, "has neither one, two nor three dimensions");
    return NULL;
}

ort_status *array_of(struct node *node, int type, size_t n, int may_be_absent, const void **out) {
    struct tensor t;
    TRY(tensor_of(node, node->at++, &t));
    *out = t.data;
    if (t.n == 0 && (may_be_absent || n == 0)) { *out = NULL; return NULL; }
    if (t.type != type || t.n < n) return refused_array(node, "has another type or fewer elements than its sizes say");
    return NULL;
}

ort_status *op_input(ort_api api, const ort_context *context, size_t index, struct tensor *out) {
    const ort_value *value;
    TRY(ORT(api, input)(context, index, &value));
    return read_tensor(api, value, out);
}

ort_status *op_output(ort_api api, ort_context *context, size_t index, const int64_t *dimensions, size_t rank, void **out) {
    ort_value *value;
    TRY(ORT(api, output)(context, index, dimensions, rank, &value));
    return ORT(api, data)(value, out);
}

const char *ORT_CALL op_on_cpu(const struct ort_op *op) { (void)op; return NULL; }
int ORT_CALL op_required(const struct ort_op *op, size_t i) { (void)op; (void)i; return ORT_REQUIRED; }
int ORT_CALL op_plain_memory(const struct ort_op *op, size_t i) { (void)op; (void)i; return 0; }
int ORT_CALL op_one(const struct ort_op *op) { (void)op; return 1; }
int ORT_CALL op_zero(const struct ort_op *op) { (void)op; return 0; }
int ORT_CALL op_latest(const struct ort_op *op) { (void)op; return INT32_MAX; }

#define PLACE(op) &op,
static const struct ort_op *const operators[] = {OPERATORS(PLACE)};

/* Called by ONNX Runtime when the library is registered with a session's options. */
ORT_EXPORT ort_status *ORT_CALL RegisterCustomOps(ort_options *options, const struct ort_base *base) {
    ort_api api = base->api(ORT_VERSION);
    ort_domain *domain;
    if (!api) { /* the first place of every table is the same function */
        api = base->api(1);
        return failed(api, "flashhead.native: this ONNX Runtime is older than 1.17");
    }
    choose_products();
    choose_linear();
    choose_layers();
    TRY(ORT(api, create_domain)("flashhead.native", &domain)); /* lives as long as the process, as sessions may */
    for (size_t i = 0; i < sizeof operators / sizeof *operators; i++) TRY(ORT(api, add_op)(domain, operators[i]));
    return ORT(api, add_domain)(options, domain);
}
