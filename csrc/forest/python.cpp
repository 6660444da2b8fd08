#include "python.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "forest.h"

namespace py = pybind11;

namespace m2::forest {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
std::span<const T> view(const char* name, const Array<T>& x) {
  if (x.ndim() != 1) throw std::invalid_argument(std::string(name) + ": " + std::to_string(x.ndim()) + " dimensions, need 1");
  return {x.data(), static_cast<size_t>(x.size())};
}

template <typename T>
std::span<T> fill(Array<T>& x) {
  return {x.mutable_data(), static_cast<size_t>(x.size())};
}

py::tuple merge(const Array<int64_t>& tokens_in, const Array<int64_t>& lengths_in, const std::optional<Array<float>>& weights_in,
                const std::optional<Array<int64_t>>& parents_in) {
  const auto tokens = view("tokens", tokens_in), lengths = view("lengths", lengths_in);
  const auto weights = weights_in ? view("weights", *weights_in) : std::span<const float>();
  if (weights_in && weights.size() != tokens.size())
    throw std::invalid_argument("weights: " + std::to_string(weights.size()) + " values for " + std::to_string(tokens.size()) + " tokens");
  const auto parents = parents_in ? view("parents", *parents_in) : std::span<const int64_t>();
  if (parents_in && parents.size() != lengths.size())
    throw std::invalid_argument("parents: " + std::to_string(parents.size()) + " for " + std::to_string(lengths.size()) + " samples");
  std::optional<SampleTree> tree;
  {
    const py::gil_scoped_release release;
    tree.emplace(tokens, lengths, parents);
  }
  const int64_t size = tree->size();
  Array<int64_t> merged(size), place(tokens.size());
  Array<int32_t> parent(size), depth(size), subtree_end(size), multiplicity(size);
  Array<float> weight(size);
  const SampleTree::Fields fields{fill(merged),       fill(parent), fill(depth), fill(subtree_end),
                                  fill(multiplicity), fill(weight), fill(place)};
  {
    const py::gil_scoped_release release;
    tree->write(weights, fields);
    tree.reset();
  }
  return py::make_tuple(merged, parent, depth, subtree_end, weight, multiplicity, place);
}

py::tuple measured(const Array<int32_t>& parent_in) {
  const auto parent = view("parent", parent_in);
  if (parent.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max()))
    throw std::invalid_argument("parent: " + std::to_string(parent.size()) + " tokens, need less than 2^31");
  Array<int32_t> depth(parent_in.size()), subtree_end(parent_in.size());
  const auto depth_T = fill(depth), subtree_end_T = fill(subtree_end);
  {
    const py::gil_scoped_release release;
    measure(parent, depth_T, subtree_end_T);
  }
  return py::make_tuple(depth, subtree_end);
}

}  // namespace

void bind(py::module_& module) {
  module.def("merge_samples", &merge, py::arg("tokens").noconvert(), py::arg("lengths").noconvert(), py::arg("weights").noconvert(),
             py::arg("parents").noconvert());
  module.def("measure_forest", &measured, py::arg("parent").noconvert());
}

}  // namespace m2::forest
