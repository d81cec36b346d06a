// The C interface of the CPU kernels: plain structs of pointers and sizes, so that one library serves every PyTorch.
//
// A *group* is a list of tables that are looked up together. For feature f of table t and bag b it computes
//
//     out[b, f] = Σ_{ids x of bag (b, f)} w_x · compose_j( W_j[row_j(x)] )
//
// or, not pooled, out[n] = compose_j( W_j[row_j(x_n)] ).
// Shapes: F features, B bags per feature, N ids, K partitions per table.
//
// The layouts below are mirrored in `cpu_structs.py`, which compares sizes with `qr_struct_sizes` when it loads.
#pragma once

#include <cstdint>

#if defined(__GNUC__)
#define QR_EXPORT extern "C" __attribute__((visibility("default")))
#else
#define QR_EXPORT extern "C"
#endif

namespace qr {

constexpr int kMaxPartitions = 4;
constexpr int64_t kMaxWidth = 1024;
constexpr int kMaxStates = 3;

enum Type : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kInt32 = 3, kInt64 = 4, kInt8Rows = 5, kInt4Rows = 6 };
enum Operation : int32_t { kMult = 0, kAdd = 1, kConcat = 2 };
enum Rule : int32_t {
    kNoStep = 0,
    kSgd = 1,
    kAdagrad = 2,
    kRowWiseAdagrad = 3,
    kAdam = 4,
    kAmsGrad = 5,
    kPartialRowWiseAdam = 6,
    kLamb = 7,
    kPartialRowWiseLamb = 8,
};
enum Isa : int32_t { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

enum Code : int32_t {
    kOk = 0,
    kIdOutOfRange = 1,       // value: the id
    kRowOutOfRange = 2,      // value: the row, of `partition`
    kOffsetsDecrease = 3,    // position: of the offset; value: the offset
    kOffsetsDoNotCover = 4,  // value: the last offset
    kTooLarge = 5,           // rows and ids of a table do not fit the sort keys
    kNoMemory = 6,
    kBadArgument = 7,
};

// How ids select rows of a partition, where these lie, and what the backward does with their gradients.
struct Partition {
    void* weight;            // row 0
    int64_t rows, width, row_stride;  // in elements of `weight_type`
    int64_t divisor, modulus;         // class = (id / divisor) % modulus, …
    const void* class_map;            // … or class_map[id], where not null
    int64_t first_row;                // row = class - first_row
    int32_t weight_type, class_map_type;
    // Backward. One of: a dense gradient (rows, width), zeroed by the caller; an optimizer step; nothing.
    float* gradient;
    uint8_t* touched;            // (rows,), set to 1 where a row was looked up; may be null
    float* state[kMaxStates];    // (rows, width) each; (rows,) the first of rowwise Adagrad, the second of partial rules
    int32_t rule;
    float learning_rate, eps, beta1, beta2, correction1, correction2, max_gradient;  // corrections: 1 - beta^t
    float l2, decay;             // weight decay: g + l2 · w, and w - lr · decay · w
};

struct Table {
    int32_t operation, first_partition, num_partitions, first_feature, num_features;
    int64_t dim;        // columns of its output
    int64_t column;     // pooled: of its first feature in a row of `out`
    int64_t num_ids;    // S; negative: any id, closed forms only
    // Where rows of a partition are split over ranks, ids travel as codes (`torchrec_qr.distributed.codes`):
    // row = code / codes_per_row + code_first_row, rest = code % codes_per_row,
    // id = rest % code_stride + code_stride · (row + code_size · (rest / code_stride)); code_stride = 0: id = rest.
    int64_t codes_per_row, code_stride, code_size, code_first_row;  // codes_per_row = 0: ids travel
    int64_t hash_seed = -1;  // of the hash that brings any ids into [0, S): `torchrec_qr.id_hash`; -1: none, as of codes
};

struct Group {
    const Table* tables;
    const Partition* partitions;
    const void* ids;              // (N,), feature after feature
    const void* offsets;          // pooled: (F·B + 1,), of bags; else (F + 1,), of features
    const float* id_weights;      // (N,) w_x, or null: 1
    float* out;                   // forward
    const float* out_gradient;    // backward
    float* id_weights_gradient;   // backward, (N,), or null
    int64_t num_tables, num_features, num_ids, num_bags;
    int64_t out_stride;           // pooled: floats between rows of `out`; else 0 and (n, dim) blocks end to end
    int32_t id_type, offset_type, pooled, threads, isa;
};

struct Failure {
    int32_t code, table, partition, reserved;
    int64_t position, value;
};

}  // namespace qr

// Both return failure->code. Where it is not kOk, `out` holds nothing of use; the backward, which meets ids that the
// forward has checked, may have stepped other tables of the group by then, but reads and writes no wrong row.
QR_EXPORT int32_t qr_forward(const qr::Group* group, qr::Failure* failure);
QR_EXPORT int32_t qr_backward(const qr::Group* group, qr::Failure* failure);
// One step of n rows of a partition, each once, by their gradients (n, width).
QR_EXPORT int32_t qr_step_rows(const qr::Partition* partition, const int64_t* rows, const float* gradients, int64_t n,
                               int32_t isa, qr::Failure* failure);
// Least and largest id of each of n features, whose ids are [starts[f], starts[f + 1]): bounds (n, 2), of no ids (0, -1).
QR_EXPORT void qr_id_bounds(const void* ids, int32_t id_type, const int64_t* starts, int64_t n, int32_t isa,
                            int64_t* bounds);
// The best instruction set of this machine that the kernels have.
QR_EXPORT int32_t qr_best_isa();
// Sizes of Partition, Table, Group and Failure in bytes.
QR_EXPORT void qr_struct_sizes(int64_t* sizes);
