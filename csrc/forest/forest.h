// Builds token forests on the host: samples that share prefixes become one forest that stores each prefix once. No tensors, no torch.
// T tokens of the forest, N tokens of the samples, S samples; megatron_m2/forest.py has what each field means.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace m2::forest {

// A radix tree of samples: an edge is a run of tokens of the sample that brought it, so that what samples share is compared as memory and
// only branch points cost a look-up. In preorder an edge's tokens lie side by side, so every output is written run by run.
class SampleTree {
 public:
  // Samples laid back to back, `lengths_S` of each. Work is linear in the tokens.
  // `parents_S` (or empty): the earlier sample that a sample goes on from, whose tokens it does not repeat; -1: none.
  // Throws std::invalid_argument: no sample, an empty one, lengths that are not those of the tokens, a parent that is no earlier sample, or
  // more than 2^31 - 1 tokens merged.
  SampleTree(std::span<const int64_t> tokens_N, std::span<const int64_t> lengths_S, std::span<const int64_t> parents_S);

  int64_t size() const { return size_; }

  // What write() fills: T of each, N of place.
  struct Fields {
    std::span<int64_t> tokens;
    std::span<int32_t> parent, depth, subtree_end, multiplicity;
    std::span<float> weight;
    std::span<int64_t> place;  // in the forest, of each token of the samples
  };

  // Children of a token come in order of first appearance. A token's weight is the sum of those of the samples through it, taken in double
  // in the order of the samples (no weights: 1 each); that of a root is 0. Call once.
  void write(std::span<const float> weights_N, const Fields& out);

 private:
  struct Edge {
    int64_t begin, length;  // its tokens, in tokens_N
    int32_t parent, first_child, last_child, previous, next;
    int32_t samples;          // that end with it; once closed: that pass through it
    int32_t position, depth;  // of its first token
  };

  // (edge, first token of a child) -> child. Open addressing, at most half full.
  class Children {
   public:
    explicit Children(int64_t most);
    int32_t& operator()(int32_t edge, int64_t token);  // -1 until it is set, which the caller does before the next call

   private:
    struct Slot {
      int64_t token = 0;
      int32_t edge = 0, child = -1;
    };
    std::vector<Slot> slots_;
  };

  int32_t start(std::span<const int64_t> parents_S) const;
  int32_t add(int32_t at, int64_t begin, int64_t length);
  int32_t append(int32_t parent, int64_t begin, int64_t length);
  int32_t split(int32_t lower, int64_t at);
  void write_edge(const Edge& edge, int32_t end, const Fields& out) const;

  std::span<const int64_t> tokens_N_, lengths_S_;
  std::vector<Edge> edges_;
  std::vector<int32_t> last_S_;  // the edge that each sample ends with
  Children children_;
  int64_t size_ = 0;
};

// depth and subtree_end from each token's parent, -1 for a root.
// Throws std::invalid_argument where those are no forest in depth-first preorder.
void measure(std::span<const int32_t> parent, std::span<int32_t> depth, std::span<int32_t> subtree_end);

}  // namespace m2::forest
