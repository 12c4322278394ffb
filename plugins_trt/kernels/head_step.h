// head_step.h: what the host hands to head_step.cu. NVRTC, nvcc and a C compiler all read it; NVRTC, which has no host functions, without an include.
//
// An index reaches the kernel as one *image*: all of its arrays in one device buffer, found by byte offsets in the
// layout below (made once by flashhead_edge/kernels/packing.py, every array 256-byte aligned). All fields of the layout
// are 32 bits wide, so that a caller can carry it as a list of whole numbers. Offsets named `*_at` are bytes from the
// start of the image; `shared_*` are bytes from the start of a block's dynamic shared memory; `row_*` are bytes from the
// start of one row's workspace.
#pragma once

#define FLASHHEAD_MAX_STAGES 4
#define FLASHHEAD_MAX_TABLES (FLASHHEAD_MAX_STAGES + 1)
#define FLASHHEAD_THREADS 512
#define FLASHHEAD_MAX_ROWS 32       // states of one launch
#define FLASHHEAD_BATCH_CHUNKS 4    // chunks of four rotated coordinates that a block handles at a time
#define FLASHHEAD_EARLY 64         // exact rows that a block scores before it knows that all of them pass, at most
#define FLASHHEAD_BINS 2048         // of a pass of the threshold search
#define FLASHHEAD_PASSES 7          // of the threshold search, at most
#define FLASHHEAD_HISTOGRAM 2052    // counters of a pass: the bins, and one for keys above the first interval
#define FLASHHEAD_MAX_NUMBER 20     // bits of a slot number: 1,048,576 slots
#define FLASHHEAD_ALWAYS 0x8000u    // beside a cluster's number, which is below it
#define FLASHHEAD_BELOW 0.0078125f  // reference.BELOW
#define FLASHHEAD_PADDING -3.0e4f   // full-width logit of columns beyond the vocabulary: finite in float16, too

// A product code's tables: the sums <codebook entry, z> of 256 entries for each part of a group of columns.
struct FlashHeadTable {
    unsigned columns_at;    // [chunks * 4] of {float step, float centre, int part, 0}; part -1: no column
    unsigned book_at;       // a chunk's four columns of 256 fields: bytes in the first wide_chunks chunks, then half bytes
    unsigned bytes_at;      // [parts] unsigned char: which byte of a code names the part's entry, ascending
    int chunks, wide_chunks;
    int first_part;         // of this table among the parts of all tables
    int parts;              // groups, those of many columns cut into several parts
};

// One code, of the centroids or of the rows, with its gate (the centroids' own is in the layout).
struct FlashHeadStage {
    int table;              // product: number of its FlashHeadTable; bits: -1
    unsigned rows_at;       // [n, stride] records: code, float16 scale (bits), own error where padding leaves room
    int stride;             // bytes of a record, a multiple of 4
    int interleaved;        // 1: of all slots of a cluster first the first word, then the second, and so on
    int bytes;              // of a code
    unsigned error_at;      // [n] unsigned char: own errors, where they lie apart
    int error_byte;         // where in its record an own error lies; -1: apart
    int words;              // 32-bit words of a record that hold code
    int lanes;              // threads that share a row: a power of two up to 32; fixes the order of summation
    int shared_table;       // [256 * bytes] or [16 * 8 * words] float
    float margin;
    int cap;
};

struct FlashHeadLayout {
    int vocab_size, hidden_size, clusters, cluster_size, coordinates, stages, tables, always;
    unsigned token_table_at;    // [clusters * cluster_size] int
    unsigned cluster_of_at;     // [vocab_size] unsigned short: a token's cluster, and FLASHHEAD_ALWAYS where it is always scored
    unsigned filled_at;         // [clusters] unsigned char: slots that hold a token, always the first ones
    int least_filled;           // the smallest of them
    unsigned always_at;         // [always] int slots
    // rotation; chunks = 0: z is the hidden state itself and centroids are float16
    int chunks;                 // of four virtual columns of four bits; a wider column takes two of them
    unsigned rotation_at;       // [chunks][hidden_size / 8][4] unsigned: eight rows' fields of one virtual column
    unsigned virtual_at;        // [chunks * 4] of {int coordinate or -1, float factor}
    unsigned mean_at;           // [hidden_size] float
    unsigned row_scale_at;      // [hidden_size] float16
    float bound_slope, bound_base;  // every table sum is below bound_slope * sum|x| + bound_base
    float state_power;
    struct FlashHeadStage centroid;  // product or bits; without a rotation rows_at alone counts: [clusters, hidden_size] float16
    float probe_margin;
    int probe_cap;
    float tail_scale, tail_offset;  // of a cluster's score, for the full-width logits of its tokens that no code scores
    int candidates;             // most rows scored exactly
    int parts;                  // of all tables
    int capacity;               // items that a block can hold, twice
    unsigned small_at;          // [1 + stages][256] float: 1 / own error in logits, by coded error, of the clusters and of each code's slots;
                                // then of each bit of all bits codes, the centroids' first, {float half the bit's weight, int coordinate}
    int small_bytes;            // of these, a multiple of 16
    unsigned image_bytes;
    unsigned prefetch_at, prefetch_bytes;  // small arrays that every step reads
    // launch plan
    int multiprocessors;        // of the device that it is for; one block each
    int shared_bytes;           // dynamic shared memory of a block
    int blocks;                 // blocks that share one row
    int chunks_a_block, clusters_a_block;  // of the rotation and of the probe: the last blocks may have fewer
    int shared_z, shared_x, shared_state, shared_work, shared_items, shared_clusters, shared_errors, shared_small;
    unsigned row_bytes, row_messages, row_tables, row_z, row_scores, row_opened, row_histograms;
    unsigned row_items;         // 0: items lie in shared memory
    unsigned row_clusters;      // [blocks][clusters] float, 0: in shared memory
    struct FlashHeadTable table[FLASHHEAD_MAX_TABLES];
    struct FlashHeadStage stage[FLASHHEAD_MAX_STAGES];
};

struct FlashHeadArguments {
    const void* hidden;          // [rows, hidden_size] fp16 or bf16, 16-byte aligned
    const void* weight;          // [V or more, hidden_size] fp16 or bf16, 16-byte aligned, rows hidden_size apart
    const void* bias;            // [V or more] of the weight's type, or null
    const unsigned char* image;
    unsigned char* workspace;    // rows * row_bytes, zero before the first step; a step leaves it ready for the next
    long long* token;            // out [rows]
    long long* counts;           // out [rows, 2 + stages]
    unsigned char* capped;       // out [rows] 0 or 1
    long long* ids;              // out [rows, candidates], the first counts[.., 1 + stages] are written, in no order
    float* logits;               // out [rows, candidates]
    float* wide;                 // out [rows, wide_stride] the last score that a code gave to a token: what flashhead_widen goes on from; or null
    unsigned long long* totals;  // [4] grows by what a step counts: rows, clusters opened, rows scored exactly, rows that a cap cut; or null
    int rows, hidden_bf16, weight_bf16;
    int wide_stride;             // vocab_size or more
    struct FlashHeadLayout layout;
};

// What flashhead_widen reads and writes: a step's outputs, under the names that they have there, and what it left in its workspace.
struct FlashHeadWiden {
    const long long* ids;
    const float* logits;
    const long long* counts;
    const unsigned char* image;
    const unsigned char* workspace;
    float* wide;
    int rows, vocab_size, wide_stride, candidates;
    int counted;                 // numbers of a row in `counts`, the last is that of the candidates
    unsigned cluster_of_at, row_bytes, row_scores, row_opened;
    float tail_scale, tail_offset;
};

#ifndef __CUDACC_RTC__
#include "device.h"
struct CUstream_st; /* what cudaStream_t points to */

#ifdef __cplusplus
extern "C" {
#endif

/* One step as the plan in arguments->layout says (packing.plan, for the multiprocessors and the shared memory of `device`).
 * 1 <= rows <= FLASHHEAD_MAX_ROWS; one stream at a time a workspace. */
const char* fh_head_step(const struct FlashHeadArguments* arguments, const fh_device* device, struct CUstream_st* stream);

/* Full-width logits, right behind a step with `wide`. */
const char* fh_head_widen(const struct FlashHeadWiden* arguments, const fh_device* device, struct CUstream_st* stream);

#ifdef __cplusplus
}
#endif
#endif
