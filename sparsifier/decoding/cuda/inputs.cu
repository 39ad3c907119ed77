// What the products of one token are told, and how they take their input: as it is, after RMSNorm, or opened by a gate.
struct Arguments {
  const void* x;        // stored numbers [inputs], or sums; of a gate and of what it opens, one after the other
  const uint4* weight;  // [inputs, stride]
  const float* cutoff;  // [layers, inputs]
  const float* shift;   // [layers, inputs]
  const float* gain;    // [inputs]
  const float* start;   // [outputs]
  const void* z;        // float32, what the rows of u are multiplied by; of `rows` the gate
  const uint4* u;       // [rank, u_stride]
  const int* ranks;     // [layers, 2]: where in z a layer's begin, and how many they are
  int* y;               // sums
  void* out;            // stored numbers [outputs]
  u32* counter;         // [tiles, 2]: programs that have added, and the state of the tile
  uint4* zero;          // sums that are neither read nor added to here
  const u16* scales;    // of codes [tiles, inputs, SCALES]
  float eps, x_unit, z_unit, steps, y_unit, limit;  // steps: of a sum in 1, with the product's scale; units: of sums
  int inputs, outputs, stride, u_stride, x_width, z_width, y_width, zeros, rows;
  int begins[2];        // first outputs of the second and the third layer
  int tiles[2];         // and their first tiles
  int half_scales;      // a bit for every layer: its scales are float16, else bfloat16
};
static_assert(sizeof(Arguments) == ARGUMENTS_SIZE, "the arguments are packed otherwise");

enum { PLAIN, NORMED, GATED };
enum { STORED, FIXED, FLOATS };
#define THREADS (WARPS * 32)
#define CODES (BITS < 16)
#define EACH (LANE_BYTES * 8 / BITS)  // outputs of a lane
#define TILE (32 * EACH)

DEVICE float number(const Arguments& a, int i, u32 state) {
#if SOURCE == 0
  return stored(fresh16((const u16*)a.x + i));
#elif SOURCE == 1
  return fixed_at((const int*)a.x, a.x_width, i, state) * a.x_unit;
#else
  return __uint_as_float(fresh((const float*)a.x + i));
#endif
}

#if INPUT == 1
// 1 / root mean square of the input, which every program computes for itself: 4 inputs a thread and turn.
DEVICE float rate(const Arguments& a, u32 state, float* room) {
  const int t = threadIdx.x;
  constexpr int TURNS = (INPUTS / 4 + THREADS - 1) / THREADS;
  float s = 0;
#if SOURCE == 0
#pragma unroll
  for (int i = 0; i < TURNS; i++) {
    const int j = i * THREADS + t;
    const uint2 q = j < INPUTS / 4 ? fresh2((const uint2*)a.x + j) : make_uint2(0, 0);
    const float v[4] = {lower(q.x), upper(q.x), lower(q.y), upper(q.y)};
#pragma unroll
    for (int e = 0; e < 4; e++) s += v[e] * v[e];
  }
#else
  uint4 q[TURNS];
#pragma unroll
  for (int i = 0; i < TURNS; i++) {
    const int j = i * THREADS + t;
    q[i] = j < INPUTS / 4 ? fresh4((const uint4*)a.x + j) : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < TURNS; i++) {
#if SOURCE == 2
    float v[4] = {__uint_as_float(q[i].x), __uint_as_float(q[i].y), __uint_as_float(q[i].z), __uint_as_float(q[i].w)};
#else
    float v[4] = {(float)(int)q[i].x, (float)(int)q[i].y, (float)(int)q[i].z, (float)(int)q[i].w};
    if (state) {
      const int j = (i * THREADS + t) * 4;
      const u32 wide = j < INPUTS ? fresh(wide_of((const int*)a.x, a.x_width) + j / 32) >> (j & 31) : 0;
      const u32 words[4] = {q[i].x, q[i].y, q[i].z, q[i].w};
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (wide >> e & 1) v[e] = both_words((const int*)a.x, a.x_width, j + e, (int)words[e]);
    }
#endif
    const float unit = SOURCE == 1 ? a.x_unit : 1.f;
#pragma unroll
    for (int e = 0; e < 4; e++) s += (v[e] * unit) * (v[e] * unit);
  }
#endif
  s = over_warp(s);
  if ((t & 31) == 0) room[t / 32] = s;
  __syncthreads();
  s = over_warp((t & 31) < WARPS ? room[t & 31] : 0.f);
  return rsqrtf(s / INPUTS + a.eps);
}
#endif
