// The instructions that C++ has no word for: tensor-core products of one warp, the loads that feed them, and copies
// from global to shared memory that no register sees. Compiled by anything but nvcc they are only declared: the tests
// define them and run the kernels on the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace prefixcore::cuda {

// Where element `i` of a lane's share of a 16 x 8 accumulator stands (PTX: mma.m16n8k16, matrix D).
__host__ __device__ constexpr int accumulator_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
__host__ __device__ constexpr int accumulator_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

// `load_matrices` loads four 8 x 8 matrices: lane l names row l % 8 of matrix l / 8, sixteen bytes. Which row and which
// column of a 16 x 16 tile that is, when the four are to be ...
struct Place {
  int row, column;
};
// ... matrix A of a product (rows x depth): upper and lower half at depth 0, then both at depth 8;
__host__ __device__ constexpr Place left_place(int lane) { return {lane % 16, lane / 16 * 8}; }
// ... matrix B, stored a row for each of its columns (columns x depth): both depths of columns 0 to 7, then of 8 to 15;
__host__ __device__ constexpr Place right_place(int lane) { return {lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8}; }
// ... matrix B, stored as it is (depth x columns) and transposed by the load.
__host__ __device__ constexpr Place right_transposed_place(int lane) { return {lane % 16, lane / 16 * 8}; }

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a b, sixteen rows, eight columns, sixteen deep.
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                         __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Sixteen bytes, aligned; zeros if not `inside`, and nothing is read then.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(inside ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `kPending` of this thread's groups of copies are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ uint4* dynamic_shared() {
  extern __shared__ uint4 memory[];
  return memory;
}

#else

void load_matrices(uint32_t (&m)[4], const void* row);
void load_matrices_transposed(uint32_t (&m)[4], const void* row);
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half);
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __nv_bfloat16);
void copy_async(void* shared, const void* global, bool inside);
void commit_copies();
void wait_for_copies(int pending);
template <int kPending>
void wait_for_copies() {
  wait_for_copies(kPending);
}
uint4* dynamic_shared();

#endif

// Two neighbours of a row as one register, the first in the lower half.
template <class Element>
__device__ __forceinline__ uint32_t pack(float first, float second) {
  const Element pair[2] = {Element(first), Element(second)};
  uint32_t bits;
  memcpy(&bits, pair, sizeof(bits));
  return bits;
}

}  // namespace prefixcore::cuda
