// What is said in the words of the machine: stored numbers, loads, adds, and the beginning of dependent launches.
typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;
#define DEVICE __device__ __forceinline__

// Numbers in the model's dtype.
#if HALF
DEVICE float stored(u16 v) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v)); return f; }
DEVICE u16 store_of(float v) { u16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v)); return h; }
#else
DEVICE float stored(u16 v) { return __uint_as_float((u32)v << 16); }
DEVICE u16 store_of(float v) { u16 h; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v)); return h; }
#endif

// Weights are read once, by nobody else.
DEVICE uint4 weights(const uint4* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
  return v;
}

// The same where no compiler may move it behind what comes later, and narrower.
DEVICE uint4 weights4(const uint4* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
  return v;
}
DEVICE uint2 weights2(const uint2* at) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at) : "memory");
  return v;
}
DEVICE u32 weights1(const u32* at) {
  u32 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
  return v;
}

// v & mask | bits, in one operation.
DEVICE u32 and_or(u32 v, u32 mask, u32 bits) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(v), "r"(mask), "r"(bits));
  return r;
}

// The halves of a word as float16.
DEVICE float lower_half(u32 v) {
  float f;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(f) : "r"(v));
  return f;
}
DEVICE float upper_half(u32 v) {
  float f;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(v));
  return f;
}

// What an earlier launch wrote is read from the L2 alone.
DEVICE u32 fresh(const void* at) {
  u32 v;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
  return v;
}
DEVICE u16 fresh16(const void* at) {
  u16 v;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(at) : "memory");
  return v;
}
DEVICE uint2 fresh2(const void* at) {
  uint2 v;
  asm volatile("ld.global.cg.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at) : "memory");
  return v;
}
DEVICE uint4 fresh4(const void* at) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory");
  return v;
}

// Adds that nobody waits for.
DEVICE void add_word(int* at, int v) { asm volatile("red.global.add.s32 [%0], %1;" ::"l"(at), "r"(v) : "memory"); }
DEVICE void add_float(float* at, float v) { asm volatile("red.global.add.f32 [%0], %1;" ::"l"(at), "f"(v) : "memory"); }

#if CHAINED
DEVICE void wait_for_earlier() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
#else
DEVICE void wait_for_earlier() {}
DEVICE void let_next_begin() {}
#endif
