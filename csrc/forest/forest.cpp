#include "forest.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace m2::forest {
namespace {

constexpr int32_t kNone = -1;
constexpr int32_t kRoot = 0;  // above all trees, without tokens
constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

// How many of the first n tokens are equal; the very first ones are.
int64_t common(const int64_t* a, const int64_t* b, int64_t n) {
  constexpr int64_t kStep = 32;
  int64_t i = 1;
  while (i + kStep <= n && std::memcmp(a + i, b + i, kStep * sizeof(int64_t)) == 0) i += kStep;
  while (i < n && a[i] == b[i]) ++i;
  return i;
}

}  // namespace

// ---- the tree ---------------------------------------------------------------------------------------------------------------------

SampleTree::Children::Children(int64_t most) : slots_(std::bit_ceil(static_cast<size_t>(2 * most))) {}

int32_t& SampleTree::Children::operator()(int32_t edge, int64_t token) {
  constexpr uint64_t kOdd = 0x9e3779b97f4a7c15u, kOther = 0xc2b2ae3d27d4eb4fu;
  uint64_t hash = static_cast<uint64_t>(token) * kOdd ^ static_cast<uint64_t>(edge) * kOther;
  hash = (hash ^ hash >> 32) * kOdd;
  const size_t mask = slots_.size() - 1;
  size_t i = hash >> 20 & mask;
  while (slots_[i].child != kNone && (slots_[i].edge != edge || slots_[i].token != token)) i = (i + 1) & mask;
  slots_[i].edge = edge, slots_[i].token = token;
  return slots_[i].child;
}

SampleTree::SampleTree(std::span<const int64_t> tokens_N, std::span<const int64_t> lengths_S, std::span<const int64_t> parents_S)
    : tokens_N_(tokens_N), lengths_S_(lengths_S), children_(2 * lengths_S.size()) {
  if (lengths_S.empty()) refuse("samples: empty");
  if (static_cast<int64_t>(lengths_S.size()) > kMost / 2) refuse("samples: more than 2^30");  // two edges each
  edges_.reserve(2 * lengths_S.size() + 1);
  edges_.push_back({0, 0, kNone, kNone, kNone, kNone, kNone, 0, 0, 0});
  last_S_.reserve(lengths_S.size());
  int64_t begin = 0;
  for (const int64_t length : lengths_S) {
    if (length == 0) refuse("samples[" + std::to_string(last_S_.size()) + "]: empty");
    if (length < 0 || length > static_cast<int64_t>(tokens_N.size()) - begin)
      refuse("lengths[" + std::to_string(last_S_.size()) + "] = " + std::to_string(length) + ": " +
             std::to_string(tokens_N.size() - begin) + " tokens are left");
    last_S_.push_back(add(start(parents_S), begin, length));
    begin += length;
  }
  if (begin != static_cast<int64_t>(tokens_N.size()))
    refuse("lengths: they add up to " + std::to_string(begin) + ", need the " + std::to_string(tokens_N.size()) + " of tokens");
}

// The edge that the next sample goes on from.
int32_t SampleTree::start(std::span<const int64_t> parents_S) const {
  if (parents_S.empty()) return kRoot;
  const int64_t next = static_cast<int64_t>(last_S_.size()), parent = parents_S[next];
  if (parent < kNone || parent >= next)
    refuse("parents[" + std::to_string(next) + "] = " + std::to_string(parent) + ": need an earlier sample, or -1 for none");
  return parent == kNone ? kRoot : last_S_[parent];
}

// The edge that the sample ends with; whatever is split later, it keeps its number and its end.
int32_t SampleTree::add(int32_t at, int64_t begin, int64_t length) {
  for (int64_t done = 0; done < length;) {
    const int64_t* rest = tokens_N_.data() + begin + done;
    int32_t child = children_(at, *rest);
    if (child == kNone) {
      child = append(at, begin + done, length - done);
      at = children_(at, *rest) = child;
      break;
    }
    const int64_t whole = edges_[child].length;
    const int64_t same = common(rest, tokens_N_.data() + edges_[child].begin, std::min(whole, length - done));
    if (same < whole) {
      const int32_t upper = split(child, same);
      children_(at, *rest) = upper;
      child = upper;
    }
    at = child, done += same;
  }
  ++edges_[at].samples;
  return at;
}

int32_t SampleTree::append(int32_t parent, int64_t begin, int64_t length) {
  size_ += length;
  if (size_ > kMost) refuse("samples: more than 2^31 - 1 tokens after merging");
  const int32_t edge = static_cast<int32_t>(edges_.size()), previous = edges_[parent].last_child;
  edges_.push_back({begin, length, parent, kNone, kNone, previous, kNone, 0, 0, 0});
  (previous == kNone ? edges_[parent].first_child : edges_[previous].next) = edge;
  edges_[parent].last_child = edge;
  return edge;
}

// Cuts an edge before its token `at`. The lower part keeps the number, and with it children and samples; a new edge takes its place.
int32_t SampleTree::split(int32_t lower, int64_t at) {
  const int32_t upper = static_cast<int32_t>(edges_.size());
  edges_.push_back(Edge(edges_[lower]));
  Edge &above = edges_[upper], &below = edges_[lower];
  (above.previous == kNone ? edges_[above.parent].first_child : edges_[above.previous].next) = upper;
  (above.next == kNone ? edges_[above.parent].last_child : edges_[above.next].previous) = upper;
  above.length = at, above.first_child = above.last_child = lower, above.samples = 0;
  below.begin += at, below.length -= at, below.parent = upper, below.previous = below.next = kNone;
  children_(upper, tokens_N_[below.begin]) = lower;
  return upper;
}

// ---- the forest -------------------------------------------------------------------------------------------------------------------

void SampleTree::write(std::span<const float> weights_N, const Fields& out) {
  int64_t next = 0;
  for (int32_t at = edges_[kRoot].first_child; at != kRoot;) {
    Edge& edge = edges_[at];
    const Edge& above = edges_[edge.parent];
    edge.position = static_cast<int32_t>(next), edge.depth = above.depth + static_cast<int32_t>(above.length);
    next += edge.length;
    if (edge.first_child != kNone) {
      at = edge.first_child;
      continue;
    }
    while (at != kRoot) {  // closes what ends here
      const Edge& closed = edges_[at];
      write_edge(closed, static_cast<int32_t>(next), out);
      edges_[closed.parent].samples += closed.samples;
      at = closed.next == kNone ? closed.parent : closed.next;
      if (closed.next != kNone) break;
    }
  }
  std::vector<double> sums_T(weights_N.empty() ? 0 : size_);
  int64_t end = 0;
  for (size_t s = 0; s < last_S_.size(); ++s) {
    const int64_t first = end;
    int64_t begin = end += lengths_S_[s];
    for (int32_t at = last_S_[s]; begin > first; at = edges_[at].parent) {  // not into what the sample goes on from
      const Edge& edge = edges_[at];
      begin -= edge.length;
      std::iota(out.place.begin() + begin, out.place.begin() + begin + edge.length, edge.position);
      if (weights_N.empty()) continue;
      for (int64_t i = 0; i < edge.length; ++i) sums_T[edge.position + i] += weights_N[begin + i];
    }
  }
  if (!weights_N.empty()) std::copy(sums_T.begin(), sums_T.end(), out.weight.begin());
  for (int32_t tree = edges_[kRoot].first_child; tree != kNone; tree = edges_[tree].next) out.weight[edges_[tree].position] = 0;
}

// All but sums of weights.
void SampleTree::write_edge(const Edge& edge, int32_t end, const Fields& out) const {
  const int64_t first = edge.position, last = first + edge.length;
  const Edge& above = edges_[edge.parent];
  std::copy_n(tokens_N_.begin() + edge.begin, edge.length, out.tokens.begin() + first);
  std::iota(out.parent.begin() + first, out.parent.begin() + last, static_cast<int32_t>(first - 1));
  out.parent[first] = edge.parent == kRoot ? -1 : static_cast<int32_t>(above.position + above.length - 1);
  std::iota(out.depth.begin() + first, out.depth.begin() + last, edge.depth);
  std::fill(out.subtree_end.begin() + first, out.subtree_end.begin() + last, end);
  std::fill(out.multiplicity.begin() + first, out.multiplicity.begin() + last, edge.samples);
  std::fill(out.weight.begin() + first, out.weight.begin() + last, static_cast<float>(edge.samples));
}

void measure(std::span<const int32_t> parent, std::span<int32_t> depth, std::span<int32_t> subtree_end) {
  const int32_t count = static_cast<int32_t>(parent.size());
  int32_t last = -1;  // the innermost token whose subtree is open
  for (int32_t t = 0; t < count; ++t) {
    const int32_t up = parent[t];
    const auto here = [&] { return "parent[" + std::to_string(t) + "] = " + std::to_string(up) + ": "; };
    if (up >= t || up < -1) refuse(here() + "a parent lies before its child, or is -1 for a root");
    while (last > up) subtree_end[last] = t, last = parent[last];
    if (last != up) refuse(here() + "not in depth-first preorder, the parent's subtree has ended");
    depth[t] = up < 0 ? 0 : depth[up] + 1;
    last = t;
  }
  for (; last >= 0; last = parent[last]) subtree_end[last] = count;
}

}  // namespace m2::forest
