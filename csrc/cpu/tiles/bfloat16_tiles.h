// Arithmetic in bfloat16 where the CPU multiplies tiles of them (AMX): rows and columns are those of pairs, and one
// instruction multiplies 16 rows of 32 numbers by 32 rows of 16, summing in float32.
//
// A product is whole tiles along k: what lies beyond the keys of a tile, and beyond a head's numbers, is zero in both
// factors. It may have any number of rows: those that fill no tile get one of their own height.
#pragma once

#if defined(__AMX_BF16__)

#include "bfloat16_pairs.h"
#include "microkernel.h"

namespace prefixcore::cpu::PREFIXCORE_ISA {

constexpr int kTileRows = 16;
constexpr int64_t kTileBytes = 64;  // of a row

// The tile registers. Four sums, and what they are sums of; two more for rows that do not fill a tile.
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

// The shapes of a thread's tile registers, for as long as it lives.
class TileRegisters {
 public:
  TileRegisters() { shape(kTileRows); }
  ~TileRegisters() { asm volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

  // The height of the last two. Changing it takes as long as ten products of tiles, and forgets what they all hold.
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
  using Registers = TileRegisters;
  static constexpr int kDepth = 16;

  // In place where elements lie whole and a row is whole tiles.
  static TileRows<Element> key_rows(Element* room, int64_t width, const ConstView& view, int64_t batch, int64_t head,
                                    int64_t start, const KeyList& list, int64_t slot, int keys, int64_t count) {
    if (count % (kPack * kDepth) == 0)
      return Bfloat16Pairs::key_rows(room, width, view, batch, head, start, list, slot, keys, count);
    pack_rows(room, width, view, batch, head, start, list, slot, keys, count);
    return {room, width};
  }

  // Zeros up to whole tiles of rows.
  static TileRows<Element> columns(Element* room, int64_t width, const TileRows<Element>& rows, int count) {
    const int64_t filled = ceil_div(count, kPack) * width, all = round_up(ceil_div(count, kPack), kDepth) * width;
    __builtin_memset(room + filled, 0, static_cast<size_t>(all - filled) * sizeof(Element));
    return Bfloat16Pairs::columns(room, width, rows, count);
  }
};

// Tiles of C side by side, summed in registers from `sum` on while k runs. Strides in bytes.
template <int sum, int left, int... vector>
PREFIXCORE_INLINE void multiply_tiles(int64_t K, const char* a, int64_t a_stride, const char* b, int64_t b_stride,
                                      char* c, int64_t c_stride, bool accumulate, Lines ahead,
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
    for (int i = 0; i < Bfloat16Tiles::kDepth; ++i) ahead.ask();
  }
  (store_tile_register<sum + vector>(c + vector * kTileBytes, c_stride), ...);
}

// The rows of C, so many vectors of columns of them.
template <int vectors>
static void multiply_strip(int64_t M, int64_t K, const char* a, int64_t a_stride, const char* b, int64_t b_stride,
                           char* c, int64_t c_stride, bool accumulate, Ahead& ahead) {
  for (; M >= kTileRows; M -= kTileRows, a += kTileRows * a_stride, c += kTileRows * c_stride)
    multiply_tiles<kSumTile, kLeftTile>(K, a, a_stride, b, b_stride, c, c_stride, accumulate, ahead.take(K),
                                        std::make_integer_sequence<int, vectors>());
  if (M == 0) return;
  TileRegisters::set_last_rows(static_cast<int>(M));
  for (int j = 0; j < vectors; ++j, b += kTileBytes, c += kTileBytes)
    multiply_tiles<kLastSumTile, kLastLeftTile>(K, a, a_stride, b, b_stride, c, c_stride, accumulate, ahead.take(K),
                                                std::make_integer_sequence<int, 1>());
}

// As multiply() of microkernel.h, with K a multiple of kDepth.
static void multiply_rows_in_tiles(int64_t M, int64_t N, int64_t K, const Bfloat16Pair* a, int64_t a_stride,
                                   const Bfloat16Pair* b, int64_t b_stride, float* c, int64_t c_stride, bool accumulate,
                                   Ahead& ahead) {
  constexpr decltype(&multiply_strip<1>) strips[kSumTiles] = {multiply_strip<1>, multiply_strip<2>, multiply_strip<3>,
                                                              multiply_strip<4>};
  constexpr int64_t kBytes = sizeof(float);
  for (int64_t j = 0; j < N; j += kSumTiles * kWidth)
    strips[min<int64_t>((N - j) / kWidth, kSumTiles) - 1](
        M, K, reinterpret_cast<const char*>(a), a_stride * kBytes, reinterpret_cast<const char*>(b + j),
        b_stride * kBytes, reinterpret_cast<char*>(c + j), c_stride * kBytes, accumulate, ahead);
}

template <>
void multiply<Bfloat16Tiles, ALayout::rows>(int64_t M, int64_t N, int64_t K, const Bfloat16Pair* a, int64_t a_stride,
                                            const Bfloat16Pair* b, int64_t b_stride, float* c, int64_t c_stride,
                                            bool accumulate, Ahead& ahead) {
  multiply_rows_in_tiles(M, N, K, a, a_stride, b, b_stride, c, c_stride, accumulate, ahead);
}
template <>
void multiply<Bfloat16Tiles, ALayout::columns>(int64_t M, int64_t N, int64_t K, const Bfloat16Pair* a, int64_t a_stride,
                                               const Bfloat16Pair* b, int64_t b_stride, float* c, int64_t c_stride,
                                               bool accumulate, Ahead& ahead) {
  // A tile's worth of rows at a time, so that they are near when they are read.
  alignas(kTileBytes) Bfloat16Pair rows[kTileRows * kKeys / Bfloat16Tiles::kPack];
  for (int64_t i = 0; i < M; i += kTileRows) {
    transpose(reinterpret_cast<float*>(rows), K, reinterpret_cast<const float*>(a + i), a_stride, K, kTileRows,
              nullptr);
    multiply_rows_in_tiles(min<int64_t>(M - i, kTileRows), N, K, rows, K, b, b_stride, c + i * c_stride, c_stride,
                           accumulate, ahead);
  }
}

}  // namespace prefixcore::cpu::PREFIXCORE_ISA

#endif
