/* The vector units of layers.h. */
#include "layers.h"

#if defined(__GNUC__)

#include <math.h>
#include <string.h>

#pragma GCC diagnostic ignored "-Wpsabi" /* vectors are passed between functions of one unit alone */

typedef float v8 __attribute__((vector_size(32)));
typedef int i8 __attribute__((vector_size(32)));
typedef float v8_anywhere __attribute__((vector_size(32), aligned(4), may_alias));

#define LOAD(p) (*(const v8_anywhere *)(p))
#define STORE(p, v) (*(v8_anywhere *)(p) = (v))
#define SAME(x) ((v8){x, x, x, x, x, x, x, x})
#define EACH static inline __attribute__((always_inline)) /* of what is compiled for each constant that it is given */
#define CHOOSE(mask, yes, no) ((v8)(((i8)(mask) & (i8)(yes)) | (~(i8)(mask) & (i8)(no))))

#define UNIT
#define NAME(x) x##_plain
#include "layers_loops.h"
#undef UNIT
#undef NAME

struct layers layers = {rms_norm_plain, layer_norm_plain, activate_plain, attend_plain, attend_tile_plain};

#if defined(__x86_64__) && !defined(FLASHHEAD_PLAIN)
#include <immintrin.h>
#define UNIT __attribute__((target("avx2,fma")))
#define NAME(x) x##_avx2
#define ADJACENT(a, b) ((v8)_mm256_hadd_ps((__m256)(a), (__m256)(b)))
#define HALVES(a, b, which) ((v8)_mm256_permute2f128_ps((__m256)(a), (__m256)(b), which))
#include "layers_loops.h"
#undef UNIT
#undef NAME

void choose_layers(void) {
    const struct layers avx2 = {rms_norm_avx2, layer_norm_avx2, activate_avx2, attend_avx2, attend_tile_avx2};
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) layers = avx2;
}
#else
void choose_layers(void) {}
#endif

#else
void choose_layers(void) {}
#endif
