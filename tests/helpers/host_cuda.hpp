// Runs a kernel on the processor, one program after another: its threads take turns, and meet where they exchange what
// they have. Only what the machine says in words of its own (machine.cu) is said otherwise here.
#define _GLIBCXX_INCLUDE_NEXT_C_HEADERS  // C's headers alone: those of C++ take longer to compile than the kernel
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__
typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;
#define DEVICE inline
struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { u32 x, y, z; };
static Index blockIdx, gridDim;

struct Meeting {
  u32 expected, arrived = 0, turn = 0, bits[2][32] = {};
};
struct Thread {
  ucontext_t begin;
  jmp_buf here;
  char stack[1 << 15];
  Index index;
  bool begun, done;
};
static Thread threads[1024];
static Meeting warps[32], everyone;
static jmp_buf scheduler;
static Thread* now;
#define threadIdx (now->index)
// Others take their turn. Jumps, since a change of context asks the operating system for signals each time.
inline void leave() { if (!_setjmp(now->here)) _longjmp(scheduler, 1); }
inline u32 meet(Meeting& m) {
  const u32 turn = m.turn;
  if (++m.arrived == m.expected) m.arrived = 0, m.turn++;
  else while (m.turn == turn) leave();
  return turn & 1;
}
template <class T> u32 bits_of(T v) { u32 b; memcpy(&b, &v, 4); return b; }
template <class T> T of_bits(u32 b) { T v; memcpy(&v, &b, 4); return v; }
template <class T> T exchanged(T v, int from) {
  Meeting& m = warps[now->index.x / 32];
  m.bits[m.turn & 1][now->index.x & 31] = bits_of(v);
  const u32 side = meet(m);
  return of_bits<T>(m.bits[side][from & 31]);
}
template <class T> T __shfl_sync(u32, T v, int from) { return exchanged(v, from); }
template <class T> T __shfl_xor_sync(u32, T v, int d) { return exchanged(v, (now->index.x & 31) ^ d); }
inline u32 __ballot_sync(u32, bool v) {
  Meeting& m = warps[now->index.x / 32];
  m.bits[m.turn & 1][now->index.x & 31] = v;
  const u32 side = meet(m);
  u32 out = 0;
  for (int i = 0; i < 32; i++) out |= m.bits[side][i] << i;
  return out;
}
inline void __syncthreads() { meet(everyone); }
inline void __threadfence() {}
inline u32 atomicAdd(u32* at, u32 v) { u32 old = *at; *at += v; return old; }
inline u32 atomicOr(u32* at, u32 v) { u32 old = *at; *at |= v; return old; }
inline int __ffs(u32 v) { return __builtin_ffs((int)v); }
inline int __float2int_rn(float v) { return (int)nearbyintf(v); }
inline long long __float2ll_rn(float v) { return (long long)nearbyintf(v); }
inline float __uint_as_float(u32 v) { return of_bits<float>(v); }
inline float __int_as_float(int v) { return of_bits<float>((u32)v); }
inline float rsqrtf(float v) { return 1.f / sqrtf(v); }
inline float __expf(float v) { return expf(v); }

#if HALF
inline float stored(u16 v) { _Float16 h; memcpy(&h, &v, 2); return (float)h; }
inline u16 store_of(float v) { const _Float16 h = (_Float16)v; u16 b; memcpy(&b, &h, 2); return b; }
#else
inline float stored(u16 v) { return of_bits<float>((u32)v << 16); }
inline u16 store_of(float v) {
  const u32 b = bits_of(v);
  return v != v ? 0x7fff : (u16)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
#endif
template <class T> T read(const void* at) { T v; memcpy(&v, at, sizeof v); return v; }
inline uint4 weights(const uint4* at) {
  if ((uintptr_t)at % 16) abort();
  return read<uint4>(at);
}
inline u32 fresh(const void* at) { return read<u32>(at); }
inline u16 fresh16(const void* at) { return read<u16>(at); }
inline uint2 fresh2(const void* at) { return read<uint2>(at); }
inline uint4 fresh4(const void* at) { if ((uintptr_t)at % 16) abort(); return read<uint4>(at); }
inline void add_word(int* at, int v) { if (__builtin_add_overflow(*at, v, at)) abort(); }
inline void add_float(float* at, float v) { *at += v; }
inline void wait_for_earlier() {}
inline void let_next_begin() {}

struct Arguments;
extern "C" void KERNEL(const Arguments a);
static const Arguments* given;
extern "C" void begin_thread();
static void take_turn(Thread& t) {
  now = &t;
  if (_setjmp(scheduler)) return;
  if (t.begun) _longjmp(t.here, 1);
  t.begun = true;
  setcontext(&t.begin);
}
// `order` says which program is the first, and how far the next is from it, so that all take their turn.
extern "C" void run_programs(u32 x, u32 y, u32 count, const Arguments* arguments, u32 first, u32 step) {
  given = arguments, gridDim = {x, y, 1};
  for (u32 n = 0, program = first; n < x * y; n++, program = (program + step) % (x * y)) {
    blockIdx = {program % x, program / x, 0};
    everyone = Meeting();
    everyone.expected = count;
    for (u32 w = 0; w < count / 32; w++) warps[w] = Meeting(), warps[w].expected = 32;
    for (u32 i = 0; i < count; i++) {
      Thread& t = threads[i];
      t.index = {i, 0, 0}, t.begun = t.done = false;
      getcontext(&t.begin);
      t.begin.uc_stack.ss_sp = t.stack, t.begin.uc_stack.ss_size = sizeof t.stack;
      makecontext(&t.begin, begin_thread, 0);
    }
    for (u32 left = count; left;)
      for (u32 i = 0; i < count; i++)
        if (!threads[i].done) take_turn(threads[i]), left -= threads[i].done;
  }
}
