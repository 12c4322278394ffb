/* w4a16_fused.h: a W4A16 product of up to eight rows with the steps around it in a decoder layer, in one launch. Bits are those of the launches that it
 * replaces, one after the other: fh_rms_norm, fh_w4a16_linear, fh_gated_product.
 */
#ifndef FLASHHEAD_W4A16_FUSED_H
#define FLASHHEAD_W4A16_FUSED_H

#include "elementwise.h"
#include "w4a16.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Steps before and after the product; what is zero is left out. Tensors as in fh_rms_norm, of weight->dtype, d = weight->K.
 *   a = x, or with first_norm fh_rms_norm(x, first_norm)   (a norm behind the block before, as Gemma 3 has)
 *   h = a, or with residual a + residual, which is written to sum: neither x nor residual, since all blocks read those
 *   y = fh_rms_norm(h, norm) W^T, or without norm x W^T
 *   gated: rows 0 to N / 2 - 1 of W are the gate's, the others their partners': y[M, N / 2] = activation(gate) * partner; N % 32 == 0, norm is given
 */
typedef struct {
  const void* residual; /* [M, K] */
  void* sum;            /* [M, K] */
  const void* first_norm; /* [K] */
  const void* norm;       /* [K]; needs M * (K + 32) * 2 bytes of shared memory beside fh_w4a16_plan's; K <= 16384 */
  float weight_offset;    /* of both norms */
  float epsilon;
  int gated;
  fh_activation activation;
} fh_w4a16_fusion;

/* As fh_w4a16_make_plan, for M up to 8. */
void fh_w4a16_make_fused_plan(const fh_w4a16_weight* weight, const fh_w4a16_fusion* fusion, int M, const fh_device* device, fh_w4a16_plan* plan);

/* M is 1 to 8; x[M, K], y[M, N] or gated [M, N / 2]. With device->overlap the weights and the norms are read while the launch before this one runs,
 * and the one behind may begin while several before it still run. Other launches here let the next one begin only when all before them have ended. So what
 * a launch reads before it waits must have been written before the last launch that is no fh_w4a16_fused began: of fh_attention_rope_decode these are
 * lengths and the older positions of its cache. In a decoder an embedding stands between a step's end and the first product, and attention between layers.
 */
const char* fh_w4a16_fused(const fh_w4a16_weight* weight, const fh_w4a16_fusion* fusion, const void* x, void* y, int M, const fh_device* device,
                           cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
