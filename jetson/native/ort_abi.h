/* The part of ONNX Runtime's C interface that a custom operator needs, said in our own words.
 *
 * ONNX Runtime hands its functions over as one table of pointers, whose order never changes: new functions are added
 * at its end. So a place in the table is all that there is to know of a function, and no header of ONNX Runtime is
 * needed. The places below are those of version 17 of the interface (ONNX Runtime 1.17) and every later one.
 *
 * A function that can fail returns a status, NULL where all went well.
 */
#ifndef FLASHHEAD_ORT_ABI_H
#define FLASHHEAD_ORT_ABI_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define ORT_CALL __stdcall
#define ORT_EXPORT __declspec(dllexport)
#else
#define ORT_CALL
#define ORT_EXPORT __attribute__((visibility("default")))
#endif

#define ORT_VERSION 17 /* the first with ort_parallel_for */

typedef void *const *ort_api;        /* the table of functions */
typedef struct ort_status ort_status;
typedef struct ort_value ort_value;
typedef struct ort_shape ort_shape;  /* type and shape of a tensor */
typedef struct ort_info ort_info;    /* of a node, while its kernel is made */
typedef struct ort_context ort_context; /* of one run of a kernel */
typedef struct ort_options ort_options; /* of a session */
typedef struct ort_domain ort_domain;

struct ort_base {
    ort_api(ORT_CALL *api)(uint32_t version); /* NULL: this ONNX Runtime is older */
    const char *(ORT_CALL *version)(void);
};

enum { ORT_ERROR_FAIL = 1, ORT_ERROR_ARGUMENT = 2 };

enum { /* element types */
    ORT_ANY = 0, ORT_FLOAT = 1, ORT_UINT8 = 2, ORT_INT8 = 3, ORT_INT32 = 6, ORT_INT64 = 7, ORT_BOOL = 9, ORT_FLOAT16 = 10, ORT_BFLOAT16 = 16
};

enum { ORT_REQUIRED = 0, ORT_OPTIONAL = 1, ORT_VARIADIC = 2 };

/* A function of the table: its place, and its type. */
#define ORT_FUNCTION(name, place, result, arguments) \
    typedef result(ORT_CALL *ort_##name##_type) arguments; \
    enum { ort_##name##_place = place };

ORT_FUNCTION(create_status, 0, ort_status *, (int code, const char *message))
ORT_FUNCTION(create_domain, 26, ort_status *, (const char *name, ort_domain **out))
ORT_FUNCTION(add_op, 27, ort_status *, (ort_domain *domain, const void *op))
ORT_FUNCTION(add_domain, 28, ort_status *, (ort_options *options, ort_domain *domain))
ORT_FUNCTION(data, 51, ort_status *, (ort_value *value, void **out))
ORT_FUNCTION(element_type, 60, ort_status *, (const ort_shape *shape, int *out))
ORT_FUNCTION(rank, 61, ort_status *, (const ort_shape *shape, size_t *out))
ORT_FUNCTION(dimensions, 62, ort_status *, (const ort_shape *shape, int64_t *out, size_t n))
ORT_FUNCTION(shape, 65, ort_status *, (const ort_value *value, ort_shape **out))
ORT_FUNCTION(float_attribute, 85, ort_status *, (const ort_info *info, const char *name, float *out))
ORT_FUNCTION(int_attribute, 86, ort_status *, (const ort_info *info, const char *name, int64_t *out))
ORT_FUNCTION(input, 90, ort_status *, (const ort_context *context, size_t index, const ort_value **out))
ORT_FUNCTION(output, 91, ort_status *, (ort_context *context, size_t index, const int64_t *dimensions, size_t n, ort_value **out))
ORT_FUNCTION(release_status, 93, void, (ort_status *status))
ORT_FUNCTION(release_shape, 99, void, (ort_shape *shape))
ORT_FUNCTION(float_attributes, 162, ort_status *, (const ort_info *info, const char *name, float *out, size_t *n))
ORT_FUNCTION(int_attributes, 163, ort_status *, (const ort_info *info, const char *name, int64_t *out, size_t *n))
ORT_FUNCTION(input_count, 230, ort_status *, (const ort_info *info, size_t *out))
ORT_FUNCTION(constant_input, 249, ort_status *, (const ort_info *info, size_t index, int *is_constant, const ort_value **out))
ORT_FUNCTION(parallel_for, 274, ort_status *, (const ort_context *context, void (*work)(void *, size_t), size_t total, size_t batches, void *data))

/* Call a function of the table. */
#define ORT(api, name) ((ort_##name##_type)(api)[ort_##name##_place])

/* What an operator says of itself. ONNX Runtime reads as much of it as `version` has. */
struct ort_op {
    uint32_t version;
    void *(ORT_CALL *create_without_status)(const struct ort_op *, ort_api, const ort_info *);
    const char *(ORT_CALL *name)(const struct ort_op *);
    const char *(ORT_CALL *provider)(const struct ort_op *); /* NULL: the CPU's */
    int(ORT_CALL *input_type)(const struct ort_op *, size_t);
    size_t(ORT_CALL *inputs)(const struct ort_op *);
    int(ORT_CALL *output_type)(const struct ort_op *, size_t);
    size_t(ORT_CALL *outputs)(const struct ort_op *);
    void(ORT_CALL *compute_without_status)(void *, ort_context *);
    void(ORT_CALL *destroy)(void *);
    int(ORT_CALL *input_kind)(const struct ort_op *, size_t);
    int(ORT_CALL *output_kind)(const struct ort_op *, size_t);
    int(ORT_CALL *input_memory)(const struct ort_op *, size_t);
    int(ORT_CALL *variadic_input_least)(const struct ort_op *);
    int(ORT_CALL *variadic_input_of_one_type)(const struct ort_op *);
    int(ORT_CALL *variadic_output_least)(const struct ort_op *);
    int(ORT_CALL *variadic_output_of_one_type)(const struct ort_op *);
    ort_status *(ORT_CALL *create)(const struct ort_op *, ort_api, const ort_info *, void **);
    ort_status *(ORT_CALL *compute)(void *, ort_context *);
    ort_status *(ORT_CALL *infer_shapes)(const struct ort_op *, void *);
    int(ORT_CALL *first_version)(const struct ort_op *); /* of the operator's domain */
    int(ORT_CALL *last_version)(const struct ort_op *);
    size_t(ORT_CALL *may_be_in_place)(int **, int **); /* from here on: version 18 and later */
    void(ORT_CALL *release_in_place)(int *, int *);
    size_t(ORT_CALL *aliases)(int **, int **);
    void(ORT_CALL *release_aliases)(int *, int *);
};

#endif
