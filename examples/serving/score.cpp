// Scores rows by an exported model, as score.py does: score FOLDER/model.pt2 FOLDER/rows.pt
#include <ATen/Version.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

static void score(const std::string& package, const std::string& rows) {
    const std::string library = std::filesystem::path(package).replace_filename("serving_operators.so");
    // Load the operators first: their library registers them, and the package calls them.
    if (!dlopen(std::filesystem::absolute(library).c_str(), RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
    torch::inductor::AOTIModelPackageLoader model(package);
    const std::string needed = model.get_metadata()["torchrec_qr.cpu"], own = at::get_cpu_capability();
    if (own != "AVX512" && (own != "AVX2" || needed != "x86-64-v3")) {
        throw std::runtime_error(package + " needs a CPU of the level " + needed + "; this one has " + own);
    }
    std::ifstream file(rows, std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    const c10::IValue tensors = torch::pickle_load(bytes);
    std::vector<at::Tensor> inputs;
    for (const c10::IValue& input : tensors.toTupleRef().elements()) inputs.push_back(input.toTensor());
    const at::Tensor scores = model.run(inputs).at(0);
    for (int64_t b = 0; b < scores.numel(); ++b) std::printf("%.9g\n", scores.const_data_ptr<float>()[b]);
}

int main(int argc, char** argv) {
    if (argc != 3) {
        std::fprintf(stderr, "usage: %s FOLDER/model.pt2 FOLDER/rows.pt\n", argv[0]);
        return 2;
    }
    try {
        const torch::InferenceMode guard;
        score(argv[1], argv[2]);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
