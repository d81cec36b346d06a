// The operators of served models, by PyTorch's stable ABI: one library for Python, TorchScript, AOTInductor and C++, and
// for all versions of PyTorch from 2.11 on.
//
// `layout` is int64 numbers: a version, the number of tables; for each table its operation, K, the number of its
// features, S (-1: any id), its policy for ids outside of [0, S), 1 if it has a class map, 1 if its pooling is MEAN, the
// seed of the hash of its ids (-1: none); and for each partition the type of its rows, D_j, the divisor and the modulus
// of its ids. `names` has one line a table:
// its name and those of its features, with tabs between them. `torchrec_qr.ops.served_operators` writes both.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "output_memory.h"
#include "serve.h"
#include "stored_rows.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLayoutVersion = 2;
// Ids that make up for the start of a thread.
constexpr int64_t kIdsPerThread = 1024;
// Bytes of the output that a block of bags takes, for the address translation caches.
constexpr int64_t kServedBlockBytes = 2 << 20;

// The message alone, without a place in the source.
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    throw std::runtime_error(text.str());
}

std::vector<std::string> split(const std::string& text, char separator) {
    std::vector<std::string> parts;
    std::istringstream in(text);
    for (std::string part; std::getline(in, part, separator);) parts.push_back(part);
    return parts;
}

// The tables of a call, checked: whatever `layout` says, nothing outside of the tensors is read.
struct Tables {
    std::vector<qr::ServedTable> tables;
    std::vector<int64_t> num_features;
    int64_t columns = 0, features = 0;
    const std::string& names;

    Tables(const std::vector<Tensor>& weights, const std::vector<Tensor>& class_maps, const Tensor& layout,
           const std::string& names_)
        : names(names_) {
        if (layout.scalar_type() != ScalarType::Long || layout.dim() != 1 || !layout.is_contiguous() ||
            !layout.is_cpu()) {
            refuse("layout: allowed: a contiguous vector of int64 on the CPU");
        }
        numbers_ = layout.const_data_ptr<int64_t>();
        last_ = numbers_ + layout.numel();
        const int64_t version = next();
        if (version != kLayoutVersion) {
            refuse("layout: version ", version, "; allowed: ", kLayoutVersion,
                   ", so export the model anew with this version of torchrec_qr");
        }
        const int64_t count = next();
        if (count < 1 || count > layout.numel()) refuse("layout: ", count, " tables");
        tables.resize(count);
        size_t weight = 0, map = 0;
        for (int64_t t = 0; t < count; ++t) add(t, weights, class_maps, weight, map);
        // One tensor, of any kind, stands for no class maps, because programs of AOTInductor cannot pass an empty list.
        const bool none = map == 0 && class_maps.size() == 1;
        if (numbers_ != last_ || weight != weights.size() || (map != class_maps.size() && !none)) {
            refuse("layout: it has ", weight, " weights and ", map, " class maps; given: ", weights.size(), " and ",
                   class_maps.size());
        }
    }

    std::string label(int64_t table, int64_t feature = -1) const {
        const std::vector<std::string> lines = split(names, '\n');
        if (table >= static_cast<int64_t>(lines.size())) return "table " + std::to_string(table);
        const std::vector<std::string> words = split(lines[table], '\t');
        std::string text = "table '" + (words.empty() ? "" : words[0]) + "'";
        if (feature >= 0 && feature + 1 < static_cast<int64_t>(words.size())) text += ", feature '" + words[feature + 1] + "'";
        return text;
    }

    // `feature` counts those of all tables.
    [[noreturn]] void raise(const qr::Failure& failure, int64_t feature) const {
        int64_t table = 0;
        while (feature >= num_features[table]) feature -= num_features[table++];
        if (failure.code == qr::kIdOutOfRange) {
            refuse(label(table, feature), ": id ", failure.value, " is outside [0, ", tables[table].rows.num_ids,
                   "); out_of_range may be 'error' (as here), 'clamp', 'wrap' or 'unchecked'");
        }
        refuse(label(table, feature), ": an id has row ", failure.value, " of partition ", failure.partition, ", which has ",
               tables[table].rows.partition[failure.partition].rows, " rows");
    }

private:
    const int64_t *numbers_, *last_;

    int64_t next() {
        if (numbers_ == last_) refuse("layout: it ends too early");
        return *numbers_++;
    }

    void add(int64_t t, const std::vector<Tensor>& weights, const std::vector<Tensor>& class_maps, size_t& weight,
             size_t& map) {
        const int64_t operation = next(), k = next(), own_features = next(), size = next(), policy = next(),
                      mapped = next(), mean = next(), hash_seed = next();
        const auto bad = [&](const char* field, int64_t value) { refuse(label(t), ": ", field, " ", value); };
        if (operation < qr::kMult || operation > qr::kConcat) bad("operation", operation);
        if (k < 1 || k > qr::kMaxPartitions) bad("partitions", k);
        if (own_features < 1) bad("features", own_features);
        if (policy < qr::kError || policy > qr::kUnchecked) bad("policy", policy);
        if (size < 1 && (size != -1 || mapped || policy != qr::kUnchecked)) bad("number of ids", size);
        if (hash_seed < -1 || hash_seed > std::numeric_limits<int32_t>::max()) bad("seed of a hash", hash_seed);
        if (hash_seed >= 0 && (size < 1 || policy != qr::kUnchecked)) bad("seed of a hash, with policy", policy);
        const void* class_map = nullptr;
        int32_t map_type = qr::kInt64;
        int64_t bytes_of_map = 0;
        if (mapped) {
            if (map == class_maps.size()) refuse("class_maps: there are ", map, ", too few");
            const Tensor& given = class_maps[map++];
            const bool narrow = given.scalar_type() == ScalarType::Int;
            if ((!narrow && given.scalar_type() != ScalarType::Long) || !given.is_cpu() || !given.is_contiguous() ||
                given.dim() != 2 || given.size(0) != k || given.size(1) != size) {
                refuse(label(t), ": class map; allowed: contiguous int32 or int64 (", k, ", ", size, ") on the CPU");
            }
            class_map = given.const_data_ptr();
            map_type = narrow ? qr::kInt32 : qr::kInt64;
            bytes_of_map = size * (narrow ? 4 : 8);
        }
        qr::Partition partitions[qr::kMaxPartitions] = {};
        int64_t dim = 0;
        for (int64_t j = 0; j < k; ++j) {
            const int64_t type = next(), width = next(), divisor = next(), modulus = next();
            if (width < 1 || width > qr::kMaxWidth) bad("width", width);
            if (!mapped && (divisor < 1 || modulus < 1)) bad("modulus", modulus);
            if (weight == weights.size()) refuse("weights: there are ", weight, ", too few");
            const Tensor& w = weights[weight++];
            const int64_t columns_of_row = qr::bytes_of_row(static_cast<int32_t>(type), width) /
                                           qr::bytes_of(static_cast<int32_t>(type));
            if (!is_of_type(w, type) || !w.is_cpu() || w.dim() != 2 || w.stride(1) != 1 || w.size(1) < columns_of_row ||
                w.stride(0) < w.size(1)) {
                refuse(label(t), ": partition ", j, "; allowed: rows on the CPU of type ", type, " with ",
                       columns_of_row, " elements or more");
            }
            qr::Partition& p = partitions[j];
            p.weight = const_cast<void*>(w.const_data_ptr());
            p.rows = w.size(0);
            p.width = width;
            p.row_stride = w.stride(0);
            p.weight_type = static_cast<int32_t>(type);
            p.class_map = class_map ? static_cast<const char*>(class_map) + j * bytes_of_map : nullptr;
            p.class_map_type = map_type;
            p.divisor = divisor;
            p.modulus = modulus;
            dim = operation == qr::kConcat ? dim + width : width;
            if (operation != qr::kConcat && width != partitions[0].width) bad("width", width);
        }
        qr::Table table = {};
        table.operation = static_cast<int32_t>(operation);
        table.num_partitions = static_cast<int32_t>(k);
        table.num_ids = size;
        table.hash_seed = static_cast<int32_t>(hash_seed);
        qr::Group group = {};
        group.tables = &table;
        group.partitions = partitions;
        qr::ServedTable& served = tables[t];
        served.rows.set(group, 0);
        served.operation = static_cast<int32_t>(operation);
        served.policy = static_cast<int32_t>(policy);
        served.dim = dim;
        served.mean = mean != 0;
        num_features.push_back(own_features);
        features += own_features;
        columns += own_features * dim;
    }

    static bool is_of_type(const Tensor& w, int64_t type) {
        switch (type) {
            case qr::kFloat32: return w.scalar_type() == ScalarType::Float;
            case qr::kFloat16: return w.scalar_type() == ScalarType::Half;
            case qr::kBFloat16: return w.scalar_type() == ScalarType::BFloat16;
            case qr::kInt8Rows:
            case qr::kInt4Rows: return w.scalar_type() == ScalarType::Byte;
            default: return false;
        }
    }
};

int32_t type_of_integers(const Tensor& t, const char* name) {
    if (!t.is_cpu() || !t.is_contiguous() || t.dim() != 1 ||
        (t.scalar_type() != ScalarType::Int && t.scalar_type() != ScalarType::Long)) {
        refuse(name, ": allowed: a contiguous vector of int32 or int64 on the CPU");
    }
    return t.scalar_type() == ScalarType::Int ? qr::kInt32 : qr::kInt64;
}

// (bags + 1,): the first id of each bag of each feature, and the number of ids.
std::vector<int64_t> offsets_of(const Tensor& lengths, int32_t type, int64_t num_ids) {
    const void* data = lengths.const_data_ptr();
    const int64_t count = lengths.numel();
    std::vector<int64_t> offsets(count + 1);
    for (int64_t i = 0; i < count; ++i) {
        const int64_t length = qr::integer_at(data, type, i);
        if (length < 0 || length > num_ids) refuse("lengths: ", length, "; allowed: 0 to ", num_ids);
        offsets[i + 1] = offsets[i] + length;
    }
    if (offsets.back() != num_ids) refuse("lengths: their sum is ", offsets.back(), "; allowed: ", num_ids);
    return offsets;
}

Tensor new_output(int64_t rows, int64_t columns) {
    const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
    const int64_t bytes = rows * columns * static_cast<int64_t>(sizeof(float));
    if (bytes < qr::kRecycledFrom) return torch::stable::empty({rows, columns}, ScalarType::Float, std::nullopt, cpu);
    return torch::stable::from_blob(qr::OutputMemory::take(bytes), {rows, columns}, {columns, 1}, cpu, ScalarType::Float,
                                    &qr::OutputMemory::give_back);
}

// The best instruction set that the machine has and the environment allows.
int32_t chosen_isa() {
    static const int32_t isa = [] {
        const char* given = std::getenv("TORCHREC_QR_CPU_KERNELS");
        const std::string choice = given ? given : "auto";
        if (choice == "baseline") return qr::usable_isa(qr::kBaseline);
        if (choice == "avx2") return qr::usable_isa(qr::kAvx2);
        if (choice != "avx512" && choice != "auto") {
            refuse("environment variable TORCHREC_QR_CPU_KERNELS='", choice,
                   "'; allowed in a process that has loaded the operators: auto, baseline, avx2, avx512");
        }
        return qr::best_isa();
    }();
    return isa;
}

// Looks all tasks up, and returns the number of the first that failed, or -1. Nothing may be thrown in a thread.
int64_t serve_all(const std::vector<qr::ServedTask>& tasks, int64_t num_ids, qr::Failure& failure) {
    const int64_t count = static_cast<int64_t>(tasks.size());
    const int32_t isa = chosen_isa();
    std::vector<qr::Failure> failures(count);
    const int64_t grain = std::max<int64_t>(1, count * kIdsPerThread / std::max<int64_t>(num_ids, 1));
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) qr::serve(isa, tasks[i], failures[i]);
    });
    for (int64_t i = 0; i < count; ++i) {
        if (failures[i].code != qr::kOk) {
            failure = failures[i];
            return i;
        }
    }
    return -1;
}

// (bags, columns): of each feature of each table, pooled. Feature i of the tables is feature features[i] of the batch.
Tensor pooled(std::vector<Tensor> weights, std::vector<Tensor> class_maps, const Tensor& layout, std::string names,
              const Tensor& ids, const Tensor& lengths, std::optional<Tensor> id_weights, std::vector<int64_t> features,
              int64_t bags, int64_t columns) {
    const Tables given(weights, class_maps, layout, names);
    if (given.columns != columns) refuse("columns: ", columns, "; allowed: ", given.columns);
    if (given.features != static_cast<int64_t>(features.size())) {
        refuse("features: ", features.size(), "; allowed: ", given.features);
    }
    const int32_t id_type = type_of_integers(ids, "ids"), length_type = type_of_integers(lengths, "lengths");
    if (bags < 0 || (bags == 0 ? lengths.numel() != 0 : lengths.numel() % bags != 0)) {
        refuse("lengths: ", lengths.numel(), "; allowed: a multiple of the number of bags, ", bags);
    }
    const float* weights_of_ids = nullptr;
    if (id_weights) {
        if (id_weights->scalar_type() != ScalarType::Float || !id_weights->is_cpu() || !id_weights->is_contiguous() ||
            id_weights->numel() != ids.numel()) {
            refuse("weights of ids: allowed: contiguous fp32 on the CPU, one for each of the ", ids.numel(), " ids");
        }
        weights_of_ids = id_weights->const_data_ptr<float>();
    }
    Tensor out = new_output(bags, columns);
    if (bags == 0) return out;
    const int64_t in_batch = lengths.numel() / bags;
    for (int64_t f : features) {
        if (f < 0 || f >= in_batch) refuse("features: ", f, "; allowed: at least 0 and below ", in_batch);
    }
    const std::vector<int64_t> offsets = offsets_of(lengths, length_type, ids.numel());

    std::vector<qr::ServedTask> tasks;
    float* values = out.mutable_data_ptr<float>();
    const int64_t step = std::clamp<int64_t>(kServedBlockBytes / (4 * columns), 64, 1024);
    for (int64_t b = 0; b < bags; b += step) {
        int64_t feature = 0, column = 0;
        for (size_t t = 0; t < given.tables.size(); ++t) {
            for (int64_t f = 0; f < given.num_features[t]; ++f, ++feature) {
                const int64_t first = features[feature] * bags + b;
                tasks.push_back({&given.tables[t], ids.const_data_ptr(), id_type, weights_of_ids, offsets.data(), first,
                                 first + std::min(step, bags - b), values + b * columns + column, columns});
                column += given.tables[t].dim;
            }
        }
    }
    qr::Failure failure{};
    const int64_t failed = serve_all(tasks, ids.numel(), failure);
    if (failed >= 0) given.raise(failure, failed % given.features);
    return out;
}

// (N, D) of the ids of one feature, not pooled.
Tensor composed(std::vector<Tensor> weights, std::vector<Tensor> class_maps, const Tensor& layout, std::string names,
                const Tensor& ids, int64_t columns) {
    const Tables given(weights, class_maps, layout, names);
    if (given.features != 1) refuse("features: the layout has ", given.features, "; allowed: 1");
    if (given.columns != columns) refuse("columns: ", columns, "; allowed: ", given.columns);
    const int32_t id_type = type_of_integers(ids, "ids");
    const int64_t n = ids.numel();
    Tensor out = new_output(n, columns);
    std::vector<qr::ServedTask> tasks;
    float* values = out.mutable_data_ptr<float>();
    for (int64_t i = 0; i < n; i += kIdsPerThread) {
        tasks.push_back({&given.tables[0], ids.const_data_ptr(), id_type, nullptr, nullptr, i,
                         std::min(i + kIdsPerThread, n), values + i * columns, columns});
    }
    qr::Failure failure{};
    if (serve_all(tasks, n, failure) >= 0) given.raise(failure, 0);
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(torchrec_qr_serving, m) {
    m.def(
        "pooled(Tensor[] weights, Tensor[] class_maps, Tensor layout, str names, Tensor ids, Tensor lengths, "
        "Tensor? id_weights, int[] features, SymInt bags, int columns) -> Tensor");
    m.def(
        "composed(Tensor[] weights, Tensor[] class_maps, Tensor layout, str names, Tensor ids, int columns) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(torchrec_qr_serving, CPU, m) {
    m.impl("pooled", TORCH_BOX(&pooled));
    m.impl("composed", TORCH_BOX(&composed));
}
