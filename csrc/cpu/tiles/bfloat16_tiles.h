// Arithmetic in bfloat16 where the CPU multiplies tiles of them (AMX): rows and columns are those of bfloat16_pairs.h,
// and one instruction multiplies 16 rows of 32 numbers by 32 rows of 16, summing in float32. "Tile" means a register
// here, not the tile of scores of tile.h.
//
// A product covers whole registers along k: what lies beyond the keys of a tile, and beyond a head's numbers, is zero
// in both factors. It may have any number of rows: those that fill no register get registers of their own height.
#pragma once

#if defined(__AMX_BF16__)

#include "bfloat16_pairs.h"
#include "microkernel.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

constexpr int kTileRows = 16;
constexpr int64_t kTileBytes = 64;  // of one row

// Which of the eight registers is what: four sums, their left and right factors, and a sum and a left factor for the
// last rows of a product, which do not fill a register.
constexpr int kSumTiles = 4;
constexpr int kSumTile = 0, kLeftTile = 4, kRightTile = 5, kLastSumTile = 6, kLastLeftTile = 7;

template <int tile>
PREFIXCORE_INLINE void load_tile_register(const void* from, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(tile), "r"(from), "r"(stride) : "memory");
}
template <int tile>
PREFIXCORE_INLINE void store_tile_register(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(tile), "r"(to), "r"(stride) : "memory");
}
template <int tile>
PREFIXCORE_INLINE void zero_tile_register() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}
template <int sum, int left, int right>
PREFIXCORE_INLINE void multiply_tile_registers() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(left), "i"(right));
}

// Configures the tile registers of the thread that holds it.
class TileRegisters {
 public:
  TileRegisters() { shape(kTileRows); }
  ~TileRegisters() { asm volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

  // The height of the last two. A change takes as long as ten products, and clears all registers.
  static void set_last_rows(int rows) {
    if (rows != last_rows) shape(rows);
  }

 private:
  static void shape(int rows) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int tile = 0; tile < 8; ++tile) {
      shapes.row_bytes[tile] = kTileBytes;
      shapes.rows[tile] = static_cast<uint8_t>(tile < kLastSumTile ? kTileRows : rows);
    }
    asm volatile("ldtilecfg %0" : : "m"(shapes));
    last_rows = rows;
  }

  static thread_local int last_rows;
};
thread_local int TileRegisters::last_rows = 0;

struct Bfloat16Tiles : Bfloat16Pairs {
  using ThreadState = TileRegisters;
  static constexpr int kDepth = 16;

  // In place where elements lie whole and a head's numbers fill whole registers.
  static MatrixView<Element> key_rows(Element* buffer, int64_t width, const HeadKeys& from, int64_t first, int keys) {
    if (from.dim % (kPack * kDepth) == 0) return Bfloat16Pairs::key_rows(buffer, width, from, first, keys);
    pack_keys(buffer, width, from, first, keys);
    return {buffer, width};
  }

  // Zeros after them, up to whole registers.
  static MatrixView<Element> columns(Element* buffer, int64_t width, const MatrixView<Element>& rows, int count) {
    const int64_t filled = ceil_div(count, kPack) * width, all = round_up(ceil_div(count, kPack), kDepth) * width;
    __builtin_memset(buffer + filled, 0, static_cast<size_t>(all - filled) * sizeof(Element));
    return Bfloat16Pairs::columns(buffer, width, rows, count);
  }
};

// C of one register's height and several registers' width: they stay registers `sum` and on while k runs. Strides in
// bytes.
template <int sum, int left, int... vector>
PREFIXCORE_INLINE void multiply_tiles(int64_t K, const char* a, int64_t a_stride, const char* b, int64_t b_stride,
                                      char* c, int64_t c_stride, bool accumulate, PrefetchLines lines,
                                      std::integer_sequence<int, vector...>) {
  if (accumulate)
    (load_tile_register<sum + vector>(c + vector * kTileBytes, c_stride), ...);
  else
    (zero_tile_register<sum + vector>(), ...);
  for (int64_t k = 0; k < K; k += Bfloat16Tiles::kDepth) {
    load_tile_register<left>(a, a_stride);
    ((load_tile_register<kRightTile>(b + vector * kTileBytes, b_stride),
      multiply_tile_registers<sum + vector, left, kRightTile>()),
     ...);
    a += kTileBytes;
    b += kTileRows * b_stride;
    for (int i = 0; i < Bfloat16Tiles::kDepth; ++i) lines.prefetch();
  }
  (store_tile_register<sum + vector>(c + vector * kTileBytes, c_stride), ...);
}

// All rows of C, `vectors` registers wide.
template <int vectors>
static void multiply_strip(int64_t M, int64_t K, const char* a, int64_t a_stride, const char* b, int64_t b_stride,
                           char* c, int64_t c_stride, bool accumulate, Prefetcher& prefetcher) {
  for (; M >= kTileRows; M -= kTileRows, a += kTileRows * a_stride, c += kTileRows * c_stride)
    multiply_tiles<kSumTile, kLeftTile>(K, a, a_stride, b, b_stride, c, c_stride, accumulate, prefetcher.next_lines(K),
                                        std::make_integer_sequence<int, vectors>());
  if (M == 0) return;
  TileRegisters::set_last_rows(static_cast<int>(M));
  for (int j = 0; j < vectors; ++j, b += kTileBytes, c += kTileBytes)
    multiply_tiles<kLastSumTile, kLastLeftTile>(K, a, a_stride, b, b_stride, c, c_stride, accumulate,
                                                prefetcher.next_lines(K), std::make_integer_sequence<int, 1>());
}

// As multiply() of microkernel.h, with K a multiple of kDepth.
static void multiply_rows_in_tiles(int64_t M, int64_t N, int64_t K, const Bfloat16Pair* a, int64_t a_stride,
                                   const Bfloat16Pair* b, int64_t b_stride, float* c, int64_t c_stride, bool accumulate,
                                   Prefetcher& prefetcher) {
  constexpr decltype(&multiply_strip<1>) strips[kSumTiles] = {multiply_strip<1>, multiply_strip<2>, multiply_strip<3>,
                                                              multiply_strip<4>};
  constexpr int64_t kBytes = sizeof(float);
  for (int64_t j = 0; j < N; j += kSumTiles * kLanes)
    strips[min<int64_t>((N - j) / kLanes, kSumTiles) - 1](
        M, K, reinterpret_cast<const char*>(a), a_stride * kBytes, reinterpret_cast<const char*>(b + j),
        b_stride * kBytes, reinterpret_cast<char*>(c + j), c_stride * kBytes, accumulate, prefetcher);
}

template <>
void multiply<Bfloat16Tiles, ALayout::rows>(int64_t M, int64_t N, int64_t K, const Bfloat16Pair* a, int64_t a_stride,
                                            const Bfloat16Pair* b, int64_t b_stride, float* c, int64_t c_stride,
                                            bool accumulate, Prefetcher& prefetcher) {
  multiply_rows_in_tiles(M, N, K, a, a_stride, b, b_stride, c, c_stride, accumulate, prefetcher);
}
template <>
void multiply<Bfloat16Tiles, ALayout::columns>(int64_t M, int64_t N, int64_t K, const Bfloat16Pair* a, int64_t a_stride,
                                               const Bfloat16Pair* b, int64_t b_stride, float* c, int64_t c_stride,
                                               bool accumulate, Prefetcher& prefetcher) {
  // One register's height at a time: the transposed rows are then still in the first cache when they are multiplied.
  alignas(kTileBytes) Bfloat16Pair rows[kTileRows * kBlockN / Bfloat16Tiles::kPack];
  for (int64_t i = 0; i < M; i += kTileRows) {
    transpose(reinterpret_cast<float*>(rows), K, reinterpret_cast<const float*>(a + i), a_stride, K, kTileRows,
              nullptr);
    multiply_rows_in_tiles(min<int64_t>(M - i, kTileRows), N, K, rows, K, b, b_stride, c + i * c_stride, c_stride,
                           accumulate, prefetcher);
  }
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA

#endif
