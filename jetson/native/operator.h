/* What every operator of the library needs: its node's arrays, its inputs and outputs, and what it says of itself to ONNX Runtime.
 *
 * An operator is a `struct ort_op` in a file of its own, of domain flashhead.native, and a line of OPERATORS.
 */
#ifndef FLASHHEAD_OPERATOR_H
#define FLASHHEAD_OPERATOR_H

#include "ort_abi.h"

#if defined(__GNUC__) /* DecoderStep is written with GCC's vectors */
#define OPERATORS(each) each(head_step) each(decoder_step)
#else
#define OPERATORS(each) each(head_step)
#endif

#define DECLARED(op) extern const struct ort_op op;
OPERATORS(DECLARED)
#undef DECLARED

#define TRY(call) do { ort_status *status_ = (call); if (status_) return status_; } while (0)

struct tensor {
    const void *data; /* NULL: no elements */
    int64_t dimensions[4];
    size_t rank, n; /* of more than four dimensions neither they nor n are read */
    int type;
};

struct node { /* of which a kernel is made */
    ort_api api;
    const ort_info *info;
    const char *op, *whose; /* in errors: the operator, and what its arrays are of */
    size_t at;              /* the next input */
};

/* `why` begins with the operator's name. */
static inline ort_status *refused(ort_api api, const char *why) { return ORT(api, create_status)(ORT_ERROR_ARGUMENT, why); }
static inline ort_status *failed(ort_api api, const char *why) { return ORT(api, create_status)(ORT_ERROR_FAIL, why); }

/* An input of a node: an initializer of one to three dimensions. It stays where the session has it. */
ort_status *tensor_of(const struct node *node, size_t index, struct tensor *out);

/* The next input as an array of n elements of a type; where it may be absent, an empty one gives NULL. */
ort_status *array_of(struct node *node, int type, size_t n, int may_be_absent, const void **out);

/* Input and output of a run. */
ort_status *op_input(ort_api api, const ort_context *context, size_t index, struct tensor *out);
ort_status *op_output(ort_api api, ort_context *context, size_t index, const int64_t *dimensions, size_t rank, void **out);

/* What operators of ours say alike: places of a `struct ort_op`. */
const char *ORT_CALL op_on_cpu(const struct ort_op *op);
int ORT_CALL op_required(const struct ort_op *op, size_t i);
int ORT_CALL op_plain_memory(const struct ort_op *op, size_t i);
int ORT_CALL op_one(const struct ort_op *op);
int ORT_CALL op_zero(const struct ort_op *op);
int ORT_CALL op_latest(const struct ort_op *op);

#endif
