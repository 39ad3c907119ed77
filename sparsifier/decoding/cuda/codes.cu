// Rows of codes in place of numbers: how a warp reads them, and what its lanes make of them.
//
// A lane has LANE_BYTES of a row, EACH outputs. Its 8-bit codes become halves 1024 + code, two by one operation. Of 4-bit
// codes two lie where the mantissas of two bfloat16 do, and read as 16 + code: the upper one as it stands, whose further
// bits, those of the lower one, add 2^-16 of it. A scale belongs to an input, so it is multiplied into the activation;
// what all codes have too much is taken off once, times the sum of what was multiplied. Products and sums are of float32.
#if CODES
#define WORDS (LANE_BYTES / 4)
static_assert(PER % LOADS == 0 && LOADS % 4 == 0, "a list is read in whole batches, by fours");

struct Codes { u32 words[WORDS]; };
DEVICE Codes codes_at(const char* at) {
  Codes c;
#if WORDS == 4
  *(uint4*)c.words = weights4((const uint4*)at);
#elif WORDS == 2
  *(uint2*)c.words = weights2((const uint2*)at);
#else
  c.words[0] = weights1((const u32*)at);
#endif
  return c;
}

// Of the inputs of a warp first those that are active: where their rows lie, and what their codes are multiplied by.
struct __align__(16) List {
  u32 rows[PER];
  float by[SCALES][PER];
};

// An input's scales in a tile: float16, else bfloat16.
struct Scales {
  u32 words[(SCALES + 1) / 2];
  DEVICE float at(int i, bool half) const {
    const u32 v = i & 1 ? words[i / 2] >> 16 : words[i / 2] & 0xffff;
    return half ? lower_half(v) : __uint_as_float(v << 16);
  }
};
DEVICE Scales scales_at(const Arguments& a, int k) {
  const u16* at = a.scales + ((size_t)blockIdx.x * a.inputs + k) * SCALES;
  Scales s;
#if SCALES == 1
  s.words[0] = *at;
#else
#pragma unroll
  for (int i = 0; i < SCALES / 2; i++) s.words[i] = ((const u32*)at)[i];
#endif
  return s;
}

// Puts a lane's input where its place in the list is: active ones come first, in their order.
DEVICE int enlist(List& list, const Scales& scales, u32 stride, bool active, float v, bool half) {
  const int lane = threadIdx.x & 31;
  const u32 vote = __ballot_sync(~0u, active), before = (1u << lane) - 1;
  const int count = __popc(vote), place = active ? __popc(vote & before) : count + __popc(~vote & before);
  if (lane < PER) {
    list.rows[place] = lane * stride * LANE_BYTES;
#pragma unroll
    for (int i = 0; i < SCALES; i++) list.by[i][place] = active ? v * scales.at(i, half) : 0.f;
  }
  __syncwarp();
  return count;
}

// Asks for a batch of rows at once, `left` of which are there.
DEVICE void ask(Codes* found, const char* at, u32 stride, const u32* rows, int left) {
  u32 offsets[LOADS];
#pragma unroll
  for (int i = 0; i < LOADS; i += 4) {
#if READS_ALL
    for (int j = i; j < i + 4; j++) offsets[j] = j * stride * LANE_BYTES;
#else
    const uint4 four = *(const uint4*)(rows + i);
    offsets[i] = four.x, offsets[i + 1] = four.y, offsets[i + 2] = four.z, offsets[i + 3] = four.w;
#endif
  }
#pragma unroll
  for (int i = 0; i < LOADS; i++) {
    found[i] = Codes{};
    if (i < left) found[i] = codes_at(at + offsets[i]);
  }
}

#define EXPONENTS (BITS == 8 ? 0x64646464u : 0x41804180u)
// `exponents` are EXPONENTS, in a register.
DEVICE void multiply_add(float* sums, const Codes& c, float v, u32 exponents) {
#pragma unroll
  for (int i = 0; i < WORDS; i++) {
    const u32 w = c.words[i];
#if BITS == 8
    const u32 p = __byte_perm(w, exponents, 0x4140u), q = __byte_perm(w, exponents, 0x4342u);
    sums[4 * i] += v * lower_half(p), sums[4 * i + 1] += v * upper_half(p);
    sums[4 * i + 2] += v * lower_half(q), sums[4 * i + 3] += v * upper_half(q);
#else
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const u32 pair = and_or(j ? __funnelshift_r(w, w, 4 * j) : w, 0x00780078u, exponents);
      sums[8 * i + j] += v * __uint_as_float(pair << 16), sums[8 * i + j + 4] += v * __uint_as_float(pair);
    }
#endif
  }
}

// Takes off what the codes of all rows had too much; `total` is the sum of what they were multiplied by.
DEVICE void take_off(float* sums, float total) {
#if BITS == 8
#pragma unroll
  for (int i = 0; i < EACH; i++) sums[i] -= (1024.f + 128.f) * total;
#else
#pragma unroll
  for (int i = 0; i < EACH; i += 8)
#pragma unroll
    for (int j = i; j < i + 4; j++) {
      const float low = sums[j] - 16.f * total, high = sums[j + 4] - (16.f + 0x4180 / 524288.f) * total;
      sums[j] = low - 8.f * total, sums[j + 4] = high - low / 65536.f - 8.f * total;
    }
#endif
}

// Adds the listed rows, in batches; `found` holds the first where nothing rests. `hidden` is 0, which the compiler
// must not know: so constants and addresses stay in registers, and loads stay ahead of what needs them.
DEVICE void add_codes(float* sums, Codes* found, const char* at, u32 stride, const List& list, int count, u32 hidden) {
  const u32 exponents = EXPONENTS + hidden;
  const float* by = list.by[(threadIdx.x & 31) * EACH / (TILE / SCALES)];
  float total = 0;
#pragma unroll 1
  for (int first = 0; first < count; first += LOADS) {
    if (!READS_ALL || first) ask(found, at, stride, list.rows + first, count - first);
    if (READS_ALL) at += LOADS * stride * LANE_BYTES;
    if (hidden) break;  // never
#pragma unroll
    for (int i = 0; i < LOADS; i += 4) {
      const float4 four = *(const float4*)(by + first + i);
      total += four.x + four.y + four.z + four.w;
      multiply_add(sums, found[i], four.x, exponents), multiply_add(sums, found[i + 1], four.y, exponents);
      multiply_add(sums, found[i + 2], four.z, exponents), multiply_add(sums, found[i + 3], four.w, exponents);
    }
  }
  take_off(sums, total);
}
#endif
