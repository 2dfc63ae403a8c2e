// What has no C++: asynchronous copies to shared memory and the tensor cores' product.
// A host build (the emulator in tests/emulator) brings its own.
#ifdef __CUDACC__

// Copy `size` (4 or 8) bytes from global to shared memory, or write zeros. Lands by copy_wait.
__device__ __forceinline__ void copy_async(void *to, const void *from, const int size, bool valid) {
  const unsigned shared = (unsigned)__cvta_generic_to_shared(to);
  const int count = valid ? size : 0;
  if (size == 4)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(from), "r"(count));
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(from), "r"(count));
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;"); }
// Wait until at most PENDING of the groups committed so far are still on their way.
template <int PENDING> __device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Round to the 10 bits of mantissa that the tensor cores multiply.
__device__ __forceinline__ unsigned to_tf32(float x) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}
// d += a b for a 16x8 and an 8x8 matrix that lie spread over a warp.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const unsigned (&a)[4],
                                         const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif
