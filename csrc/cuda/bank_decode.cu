#include <cmath>

#include "bank_decode.h"
#include "instructions.h"
#include "launch.h"

namespace prefixcore::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16 * kWarps;  // of scores in a block: (batch row, head of the group, query)
constexpr int kStages = 2;          // tiles of keys and values in flight
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// --- which rows a block works on ------------------------------------------------------------------

__host__ __device__ int64_t rows_of_one(const BankDecode& p) { return p.heads / p.kv_heads * p.queries; }

// A block holds several batch rows, or several blocks hold one.
__host__ __device__ int64_t batch_rows_of_block(const BankDecode& p) {
  return rows_of_one(p) < kRows ? kRows / rows_of_one(p) : 1;
}
__host__ __device__ int64_t blocks_of_batch_row(const BankDecode& p) { return ceil_div(rows_of_one(p), kRows); }

__device__ int64_t entry_of(const BankDecode& p, int64_t b) { return p.prefix_index ? p.prefix_index[b] : 0; }

constexpr int64_t kInvalid = -1;

// How many keys a row sees that names `entry`.
__device__ int64_t length_of(const BankDecode& p, int64_t entry) {
  if (entry == -1) return 0;
  if (entry < -1 || entry >= p.bank) return kInvalid;
  const int64_t length = p.prefix_lengths ? p.prefix_lengths[entry] : p.capacity;
  return length < 0 || length > p.capacity ? kInvalid : length;
}

// Where a row of scores comes from and goes to.
struct Row {
  int64_t query;    // its offset; -1: no such row
  int64_t partial;  // its place in [B, H, T]
};

// Fills `rows` and returns how many there are; 0 if the rows of this entry from `b` on are another block's.
// The k-th batch row of an entry is worked on by the block of its (k - k % batch_rows_of_block)-th.
__device__ int find_rows(const BankDecode& p, int64_t b, int64_t part, int64_t kv_head, int64_t entry, Row* rows) {
  __shared__ int64_t members[kRows];
  __shared__ int num_members;
  const int64_t capacity = batch_rows_of_block(p);
  int64_t before = 0;
  for (int64_t first = 0; first < b; first += kThreads) {
    const int64_t other = first + threadIdx.x;
    before += __syncthreads_count(other < b && entry_of(p, other) == entry);
  }
  if (before % capacity != 0) return 0;

  if (threadIdx.x < 32) {
    int64_t found = 0;
    for (int64_t first = b; first < p.batch && found < capacity; first += 32) {
      const int64_t other = first + threadIdx.x;
      const bool hit = other < p.batch && entry_of(p, other) == entry;
      const unsigned hits = __ballot_sync(0xffffffffu, hit);
      const int64_t place = found + __popc(hits & ((1u << threadIdx.x) - 1));
      if (hit && place < capacity) members[place] = other;
      found += __popc(hits);
    }
    if (threadIdx.x == 0) num_members = static_cast<int>(found < capacity ? found : capacity);
  }
  __syncthreads();

  const int64_t one = rows_of_one(p), group = p.heads / p.kv_heads;
  const int64_t left = num_members * one - part * kRows;
  if (threadIdx.x < kRows) {
    Row row{-1, -1};
    if (static_cast<int64_t>(threadIdx.x) < left) {
      const int64_t flat = part * kRows + threadIdx.x, within = flat % one;
      const int64_t member = members[flat / one], head = kv_head * group + within / p.queries, t = within % p.queries;
      row.query = member * p.query.stride[0] + head * p.query.stride[1] + t * p.query.stride[2];
      row.partial = (member * p.heads + head) * p.queries + t;
    }
    rows[threadIdx.x] = row;
  }
  __syncthreads();
  return static_cast<int>(left < kRows ? left : kRows);
}

// --- tiles in shared memory -----------------------------------------------------------------------

// Rows of kDim elements whose sixteen-byte chunks are permuted, so that the eight rows of a matrix that the tensor
// cores load lie in different banks.
template <class Element, int kDim>
struct Tile {
  static constexpr int kChunks = kDim / 8;
  Element* data;

  __device__ Element* chunk(int row, int chunk) const { return data + row * kDim + (chunk ^ (row & 7)) * 8; }
  __device__ const Element* at(Place origin, Place place) const {
    return chunk(origin.row + place.row, (origin.column + place.column) / 8);
  }

  // Starts copying rows `first` to `end`, `dim` elements each; the rest of the tile becomes zeros.
  __device__ void load(const Element* from, int64_t stride, int64_t first, int64_t end, int64_t dim, int rows) const {
    for (int i = threadIdx.x; i < rows * kChunks; i += kThreads) {
      const int row = i / kChunks, c = i % kChunks;
      const bool inside = first + row < end && c * 8 < dim;
      copy_async(chunk(row, c), inside ? from + (first + row) * stride + c * 8 : from, inside);
    }
  }
};

template <int kDim>
struct Layout {  // of the dynamic shared memory, in bytes
  static constexpr int kKeys = kDim > 128 ? 32 : 64;
  static constexpr int kQueryBytes = kRows * kDim * 2;
  static constexpr int kTileBytes = kKeys * kDim * 2;
  static constexpr int kBytes = kQueryBytes + kStages * 2 * kTileBytes;
  // Afterwards the warps' sums stand there: one row apart by this many numbers, which avoids bank conflicts.
  static constexpr int kSumPitch = kDim + 8;
  static_assert(kRows * kSumPitch * 4 <= kBytes);
};

// --- one warp: sixteen rows over sixteen keys at a time -------------------------------------------

template <class Element, int kDim>
struct Warp {
  static constexpr int kSteps = kDim / 16;
  static constexpr bool kKeepQuery = kDim <= 128;  // in registers; a longer one is loaded again and again

  float out[2 * kSteps][4];  // accumulators over the value's columns, eight each
  float top[2];              // the highest score so far, of the lane's two rows; scores times log2(e)
  float sum[2];              // of this lane's exponentials
  uint32_t query[kKeepQuery ? kSteps : 1][4];

  __device__ void begin(const Tile<Element, kDim>& queries, int first_row) {
    for (auto& part : out)
      for (float& x : part) x = 0.0f;
    for (int half = 0; half < 2; ++half) top[half] = -INFINITY, sum[half] = 0.0f;
    if constexpr (kKeepQuery) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) load_query(query[step], queries, first_row, step);
    }
  }

  __device__ void load_query(uint32_t (&to)[4], const Tile<Element, kDim>& queries, int first_row, int step) const {
    load_matrices(to, queries.at({first_row, step * 16}, left_place(threadIdx.x % 32)));
  }

  // Keys `first` to `first` + 15 of the tile, of which `count` are there.
  __device__ void absorb(const Tile<Element, kDim>& queries, int first_row, const Tile<Element, kDim>& keys,
                         const Tile<Element, kDim>& values, int first, int64_t count, float scale) {
    const int lane = threadIdx.x % 32;
    float scores[2][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t k[4];
      load_matrices(k, keys.at({first, step * 16}, right_place(lane)));
      if constexpr (!kKeepQuery) load_query(query[0], queries, first_row, step);
      const auto& q = query[kKeepQuery ? step : 0];
      multiply(scores[0], q, k[0], k[1], Element());
      multiply(scores[1], q, k[2], k[3], Element());
    }

    float highest[2] = {top[0], top[1]};
#pragma unroll
    for (int side = 0; side < 2; ++side)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool there = side * 8 + accumulator_column(lane, i) < count;
        scores[side][i] = there ? scores[side][i] * scale : -INFINITY;
        highest[i / 2] = fmaxf(highest[i / 2], scores[side][i]);
      }
    float shrink[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // the four lanes that share a row agree on its highest score
      highest[half] = fmaxf(highest[half], __shfl_xor_sync(0xffffffffu, highest[half], 1));
      highest[half] = fmaxf(highest[half], __shfl_xor_sync(0xffffffffu, highest[half], 2));
      shrink[half] = highest[half] == -INFINITY ? 1.0f : exp2f(top[half] - highest[half]);
      top[half] = highest[half];
      sum[half] *= shrink[half];
    }
#pragma unroll
    for (int side = 0; side < 2; ++side)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // A score of -infinity is a probability of 0, also where all scores so far are.
        scores[side][i] = scores[side][i] == -INFINITY ? 0.0f : exp2f(scores[side][i] - top[i / 2]);
        sum[i / 2] += scores[side][i];
      }
#pragma unroll
    for (auto& part : out)
#pragma unroll
      for (int i = 0; i < 4; ++i) part[i] *= shrink[i / 2];

    // The accumulators of scores are laid out as matrix A of the next product is.
    const uint32_t weights[4] = {pack<Element>(scores[0][0], scores[0][1]), pack<Element>(scores[0][2], scores[0][3]),
                                 pack<Element>(scores[1][0], scores[1][1]), pack<Element>(scores[1][2], scores[1][3])};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t v[4];
      load_matrices_transposed(v, values.at({first, step * 16}, right_transposed_place(lane)));
      multiply(out[2 * step], weights, v[0], v[1], Element());
      multiply(out[2 * step + 1], weights, v[2], v[3], Element());
    }
  }

  // Leaves its sums in shared memory: sixteen rows of accumulators, their highest scores and sums of exponentials.
  __device__ void leave(float* sums, int pitch, float* tops, float* totals) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 1);
      sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], 2);
      if (lane % 4 == 0) {
        tops[accumulator_row(lane, 2 * half)] = top[half];
        totals[accumulator_row(lane, 2 * half)] = sum[half];
      }
    }
#pragma unroll
    for (int part = 0; part < 2 * kSteps; ++part)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[accumulator_row(lane, i) * pitch + part * 8 + accumulator_column(lane, i)] = out[part][i];
  }
};

// --- one block: one stretch of one prefix, for one KV head ----------------------------------------

template <class Element, int kDim>
__global__ void __launch_bounds__(kThreads) decode(BankDecode p) {
  using L = Layout<kDim>;
  __shared__ Row rows[kRows];
  __shared__ float tops[kRows], totals[kRows];

  const int64_t blocks = blocks_of_batch_row(p);
  const int64_t split = blockIdx.x % p.splits, place = blockIdx.x / p.splits;
  const int64_t b = place / blocks, part = place % blocks, kv_head = blockIdx.y;
  const int64_t entry = entry_of(p, b), length = length_of(p, entry);
  const int64_t begin = split * p.split_keys;
  const int64_t end = begin + p.split_keys < length ? begin + p.split_keys : length;
  if (begin >= end) return;  // nothing to see here, or the index or the length is out of range
  const int count = find_rows(p, b, part, kv_head, entry, rows);
  if (count == 0) return;

  Element* memory = reinterpret_cast<Element*>(dynamic_shared());
  const Tile<Element, kDim> queries{memory};
  const auto tile = [&](int stage, int which) {
    return Tile<Element, kDim>{memory + (L::kQueryBytes + (stage * 2 + which) * L::kTileBytes) / 2};
  };
  const Element* key = static_cast<const Element*>(p.key.data) + entry * p.key.stride[0] + kv_head * p.key.stride[1];
  const Element* value =
      static_cast<const Element*>(p.value.data) + entry * p.value.stride[0] + kv_head * p.value.stride[1];
  const int tiles = static_cast<int>(ceil_div(end - begin, L::kKeys));
  const auto load = [&](int i) {
    if (i < tiles) {
      const int64_t first = begin + static_cast<int64_t>(i) * L::kKeys;
      tile(i % kStages, 0).load(key, p.key.stride[2], first, end, p.head_dim, L::kKeys);
      tile(i % kStages, 1).load(value, p.value.stride[2], first, end, p.value_dim, L::kKeys);
    }
    commit_copies();
  };

  const Element* query = static_cast<const Element*>(p.query.data);
  for (int i = threadIdx.x; i < kRows * queries.kChunks; i += kThreads) {
    const int row = i / queries.kChunks, c = i % queries.kChunks;
    const bool inside = row < count && c * 8 < p.head_dim;
    copy_async(queries.chunk(row, c), inside ? query + rows[row].query + c * 8 : query, inside);
  }
  load(0);  // in one group with the queries

  // Few rows: the warps share the keys of a tile between them. Many: each has sixteen rows of its own.
  const int row_warps = count <= 16 ? 1 : count <= 32 ? 2 : 4, key_warps = kWarps / row_warps;
  const int warp = threadIdx.x / 32, first_row = warp % row_warps * 16, key_warp = warp / row_warps;
  const float scale = p.scale * kLog2e;
  Warp<Element, kDim> state;
  for (int i = 0; i < tiles; ++i) {
    load(i + 1);
    wait_for_copies<1>();
    __syncthreads();
    if (i == 0) state.begin(queries, first_row);
    const int64_t left = end - begin - static_cast<int64_t>(i) * L::kKeys;
#pragma unroll 1
    for (int first = key_warp * 16; first < L::kKeys && first < left; first += key_warps * 16)
      state.absorb(queries, first_row, tile(i % kStages, 0), tile(i % kStages, 1), first, left - first, scale);
    __syncthreads();  // before the tile is overwritten
  }

  float* sums = reinterpret_cast<float*>(memory);
  state.leave(sums + warp * 16 * L::kSumPitch, L::kSumPitch, tops + warp * 16, totals + warp * 16);
  __syncthreads();

  // Adds up the parts of the key warps, in their order; one warp writes one row.
  for (int row = warp; row < count; row += kWarps) {
    float highest = -INFINITY, total = 0.0f;
    for (int k = 0; k < key_warps; ++k) highest = fmaxf(highest, tops[k * row_warps * 16 + row]);
    float share[kWarps];
#pragma unroll
    for (int k = 0; k < kWarps; ++k) {
      const int from = k * row_warps * 16 + row;
      share[k] = k < key_warps ? exp2f(tops[from] - highest) : 0.0f;
      if (k < key_warps) total += share[k] * totals[from];
    }
    const int64_t to = split * p.batch * p.heads * p.queries + rows[row].partial;
    for (int d = threadIdx.x % 32; d < p.value_dim; d += 32) {
      float x = 0.0f;
#pragma unroll
      for (int k = 0; k < kWarps; ++k)
        if (k < key_warps) x += share[k] * sums[(k * row_warps * 16 + row) * L::kSumPitch + d];
      p.partial_out[to * p.value_dim + d] = x / total;
    }
    if (threadIdx.x % 32 == 0) p.partial_lse[to] = (highest + log2f(total)) * kLn2;
  }
}

// --- the merge of the splits: one block a row -----------------------------------------------------

constexpr int kMostColumns = 256;
constexpr int kColumns = kMostColumns / 32;  // of a lane

// The splits go round the warps, so that more of them are read at a time; first each warp adds up its own, in their
// order, then the warps' sums are added in theirs.
__global__ void __launch_bounds__(kThreads) merge_splits(BankDecode p) {
  __shared__ float sums[kWarps][kMostColumns], totals[kWarps];
  const int64_t rows = p.batch * p.heads * p.queries, row = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t length = length_of(p, entry_of(p, row / (p.heads * p.queries)));
  const int64_t splits = length <= 0 ? 0 : ceil_div(length, p.split_keys);

  float highest = -INFINITY, total = 0.0f, sum[kColumns] = {};
  for (int64_t split = lane; split < splits; split += 32) highest = fmaxf(highest, p.partial_lse[split * rows + row]);
  for (int distance = 16; distance > 0; distance /= 2)
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, distance));
#pragma unroll 2
  for (int64_t split = warp; split < splits; split += kWarps) {
    const float share = expf(p.partial_lse[split * rows + row] - highest);
    total += share;
    const float* from = p.partial_out + (split * rows + row) * p.value_dim + lane;
#pragma unroll
    for (int i = 0; i < kColumns; ++i)
      if (lane + 32 * i < p.value_dim) sum[i] += share * from[32 * i];
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) sums[warp][lane + 32 * i] = sum[i];
  if (lane == 0) totals[warp] = total;
  __syncthreads();

  total = totals[0];
  for (int w = 1; w < kWarps; ++w) total += totals[w];
  const float nothing = length == kInvalid ? NAN : 0.0f;
  for (int d = threadIdx.x; d < p.value_dim; d += kThreads) {
    float x = sums[0][d];
    for (int w = 1; w < kWarps; ++w) x += sums[w][d];
    p.out[row * p.value_dim + d] = splits == 0 ? nothing : x / total;
  }
  if (threadIdx.x == 0) p.lse[row] = splits > 0 ? highest + logf(total) : length == kInvalid ? NAN : -INFINITY;
}

template <class Element, int kDim>
cudaError_t launch_decode(const BankDecode& p, cudaStream_t stream) {
  constexpr int kBytes = Layout<kDim>::kBytes;
  const auto kernel = decode<Element, kDim>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(p.batch * blocks_of_batch_row(p) * p.splits),
                  static_cast<unsigned>(p.kv_heads));
  return launch(kernel, p, grid, kThreads, stream, kBytes);
}

template <class Element>
cudaError_t launch_for_dim(const BankDecode& p, cudaStream_t stream) {
  const int64_t dim = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  if (dim <= 64) return launch_decode<Element, 64>(p, stream);
  if (dim <= 128) return launch_decode<Element, 128>(p, stream);
  return launch_decode<Element, 256>(p, stream);
}

}  // namespace

cudaError_t plan(BankDecode& p) {
  if (p.batch * p.heads * p.queries == 0) return cudaSuccess;
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  constexpr int64_t kTile = Layout<64>::kKeys;
  constexpr int64_t kBlocksOfProcessor = 2, kMostSplits = 128;
  // How many blocks a split has at most: rows that share an entry share a block, at most `bank` entries are partly
  // filled. Without a look at the indices it cannot be known better.
  const int64_t shared = ceil_div(p.batch, batch_rows_of_block(p)) + p.bank - 1;
  const int64_t blocks = (shared < p.batch ? shared : p.batch) * blocks_of_batch_row(p) * p.kv_heads;
  const int64_t tiles = p.capacity > 0 ? ceil_div(p.capacity, kTile) : 1;
  int64_t splits = blocks > 0 ? ceil_div(processors * kBlocksOfProcessor, blocks) : 1;  // none: an empty bank
  splits = splits < kMostSplits ? splits : kMostSplits;
  splits = splits < tiles ? splits : tiles;
  p.split_keys = ceil_div(tiles, splits) * kTile;
  p.splits = ceil_div(tiles * kTile, p.split_keys);
  return cudaSuccess;
}

cudaError_t bank_decode(const BankDecode& p, cudaStream_t stream) {
  if (p.batch * p.heads * p.queries == 0) return cudaSuccess;
  if (p.capacity > 0 && p.bank > 0) {
    const cudaError_t error =
        p.query.dtype == DType::bf16 ? launch_for_dim<__nv_bfloat16>(p, stream) : launch_for_dim<__half>(p, stream);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(p.batch * p.heads * p.queries));
  return launch(merge_splits, p, grid, kThreads, stream);
}

}  // namespace prefixcore::cuda
