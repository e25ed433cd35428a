// Answers of an artefact's package.pt2 without Python: serve ARTEFACT ROWS [BAG] < numbers
//
// ROWS is the batch's size; BAG the length of its bags, of an artefact whose features have several ids. The numbers
// are ids, lengths (with bags) and dense values (where there are any), each as `load_program` in Python takes it.
// Rows stay in the artefact's files, mapped. Build it with the torch that compiled the package (docs/programs.md).
#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/headeronly/version.h>

#include <filesystem>
#include <fstream>
#include <iostream>
#include <sstream>

using Loader = torch::inductor::AOTIModelPackageLoader;

void check_fits(std::unordered_map<std::string, std::string>& facts) {
  if (facts["torch"] != TORCH_VERSION)
    throw std::runtime_error("the package was compiled for torch " + facts["torch"] + ", this is " TORCH_VERSION);
  std::stringstream processor, wanted(facts["processor"]);
  processor << std::ifstream("/proc/cpuinfo").rdbuf();
  for (std::string set; wanted >> set;)
    if (processor.str().find(" " + set) == std::string::npos)
      throw std::runtime_error("the package was compiled for a processor with " + set + ", which this one has not");
}

// "file first_byte type size size ...": a tensor that stays in its file, mapped.
at::Tensor mapped(const std::filesystem::path& folder, const std::string& line) {
  static const std::unordered_map<std::string, at::ScalarType> types = {
      {"uint8", at::kByte}, {"int32", at::kInt}, {"int64", at::kLong}, {"float16", at::kHalf}, {"float32", at::kFloat}};
  std::istringstream words(line);
  std::string file, type;
  int64_t start = 0, size = 0, length = 1;
  std::vector<int64_t> sizes;
  for (words >> file >> start >> type; words >> size; length *= size) sizes.push_back(size);
  const std::string path = (folder / file).string();
  const auto bytes = at::from_file(path, false, std::filesystem::file_size(path), at::TensorOptions(at::kByte));
  length *= c10::elementSize(types.at(type));
  return bytes.narrow(0, start, length).view(types.at(type)).view(sizes);
}

template <class T>
at::Tensor read(at::ScalarType type, const std::vector<int64_t>& sizes) {
  at::Tensor made = at::empty(sizes, type);
  for (int64_t n = 0; n < made.numel(); ++n)
    if (!(std::cin >> made.data_ptr<T>()[n])) throw std::runtime_error("too few numbers came");
  return made;
}

// Compiled code answers NaN where a method refuses an id; here it is told.
void check_ids(const at::Tensor& ids, std::istringstream limits) {
  int64_t limit = 0;
  for (int64_t n = 0; limits >> limit; ++n) {
    const at::Tensor own = ids.select(1, n);
    if (limit >= 0 && (own.lt(0) | own.ge(limit)).any().item<bool>())
      throw std::runtime_error("an id of feature " + std::to_string(n) + " is not in [0, " + std::to_string(limit) + ")");
  }
}

void serve(const std::filesystem::path& folder, int64_t rows, int64_t bag) {
  const std::string path = (folder / "package.pt2").string();
  auto facts = Loader::load_metadata_from_package(path, "model");
  check_fits(facts);
  Loader package(path);
  std::istringstream names(facts.at("inputs"));
  std::vector<at::Tensor> inputs;
  const int64_t features = std::stoll(facts.at("features")), dense = std::stoll(facts.at("dense"));
  for (std::string name; names >> name;) {
    std::vector<int64_t> sizes = {rows, name == "dense" ? dense : features};
    if (name == "ids" && facts.at("inputs").find("lengths") != std::string::npos) sizes.push_back(bag);
    inputs.push_back(name == "dense" ? read<float>(at::kFloat, sizes) : read<int64_t>(at::kLong, sizes));
  }
  check_ids(inputs[0], std::istringstream(facts.at("limits")));
  for (int64_t n = 0; n < std::stoll(facts.at("tables")); ++n)
    inputs.push_back(mapped(folder, facts.at("table." + std::to_string(n))));
  std::cout.precision(9);
  for (const at::Tensor& answer : package.run(inputs))  // one line for each output
    for (int64_t n = 0; n < answer.numel(); ++n)
      std::cout << answer.contiguous().data_ptr<float>()[n] << (n + 1 < answer.numel() ? ' ' : '\n');
}

int main(int count, char** words) try {
  if (count < 3) return std::cerr << "serve ARTEFACT ROWS [BAG] < numbers\n", 2;
  return serve(words[1], std::stoll(words[2]), count > 3 ? std::stoll(words[3]) : 1), 0;
} catch (const std::exception& error) {
  const std::string told = error.what();
  return std::cerr << told.substr(0, told.find('\n')) << '\n', 1;
}
