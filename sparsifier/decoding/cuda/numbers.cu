// Numbers and sums in fixed point, as all kernels have them.
//
// Sums are whole numbers of 1 / steps, so that they do not depend on the order in which programs add. A column's sum has
// two words: `low`, and `high`, which counts 2^16 of low's. Who adds a part of less than `limit` adds to low alone; limit
// is 2^31 over the number of those who add, so that low cannot wrap. A larger part is divided between both words, and
// the column's bit in `wide` says that high counts. What is no number at all, or 2^16 times the limit, makes the sums
// broken: they are read as NaN.
DEVICE float rounded(float v) { return stored(store_of(v)); }
#if HALF
DEVICE float lower(u32 v) { return stored((u16)v); }
DEVICE float upper(u32 v) { return stored((u16)(v >> 16)); }
#else
DEVICE float lower(u32 v) { return __uint_as_float(v << 16); }
DEVICE float upper(u32 v) { return __uint_as_float(v & 0xffff0000u); }
#endif

DEVICE void multiply_add(float* sums, uint4 w, float v) {
  sums[0] += v * lower(w.x), sums[1] += v * upper(w.x), sums[2] += v * lower(w.y), sums[3] += v * upper(w.y);
  sums[4] += v * lower(w.z), sums[5] += v * upper(w.z), sums[6] += v * lower(w.w), sums[7] += v * upper(w.w);
}

DEVICE float over_warp(float v) {
#pragma unroll
  for (int d = 16; d; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  return v;
}

enum { ANY_WIDE = 1, BROKEN = 2 };

// Where the parts of sums lie: low [width], high [width], wide [width / 32], state [1]; width is a multiple of 32.
DEVICE const int* high_of(const int* low, int width) { return low + width; }
DEVICE const u32* wide_of(const int* low, int width) { return (const u32*)low + 2 * width; }
DEVICE const u32* state_of(const int* low, int width) { return wide_of(low, width) + width / 32; }

DEVICE float both_words(const int* low, int width, int i, int word) {
  return (float)(((i64)(int)fresh(high_of(low, width) + i) << 16) + word);
}
// One sum in fixed point, as a number of steps; `state` is what state_of holds.
DEVICE float fixed_at(const int* low, int width, int i, u32 state) {
  const int word = (int)fresh(low + i);
  float v = (float)word;
  if (state) {
    if (fresh(wide_of(low, width) + i / 32) >> (i & 31) & 1) v = both_words(low, width, i, word);
    if (state & BROKEN) v = __int_as_float(0x7fffffff);
  }
  return v;
}

// Adds a part of a sum, given as a number of steps. `state` is where to say that high counts or that nothing does.
DEVICE void add_part(int* low, int width, int i, float v, float limit, u32* state) {
  if (fabsf(v) < limit) {
    add_word(low + i, __float2int_rn(v));
  } else if (fabsf(v) < limit * 65536.f) {
    const i64 q = __float2ll_rn(v);
    add_word(low + i, (int)(q & 0xffff));
    add_word(low + width + i, (int)(q >> 16));
    atomicOr((u32*)low + 2 * width + i / 32, 1u << (i & 31));
    atomicOr(state, ANY_WIDE);
  } else {
    atomicOr(state, BROKEN);
  }
}
