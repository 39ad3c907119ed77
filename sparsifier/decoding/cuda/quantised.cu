// Products of one token with weights of 4 and 8 bits, by tensor cores.
//
// A warp looks at PER inputs and a tile's 128 bytes of their codes (256 outputs of 4 bits, 128 of 8): it lists the active
// ones, and reads eight rows at once, four lanes' rows by eight lanes' 16 bytes. Each half of a register is one code: its
// four bits, put into the mantissa of bfloat16's 16.0, read as 16 + code by one operation for two codes (8 bits: twice,
// the high four bits apart). Two codes of a register belong to two outputs of ONE input, so that a matrix product of
// 16x16 by 16x8 takes eight inputs and 32 outputs: of its right side, an input's two rows hold the activation times the
// scale, once for even and once for odd outputs, and in three columns each, since three bfloat16 add up to a float32
// without rounding. So products are those of float32, unpacking costs no conversion, and sums are in float32.
//
// The warps of a program add up in shared memory and the programs of a cluster, which share a tile, read one another's:
// the order of all sums is fixed, nothing is written to memory but the result, and no launch zeroes anything.
struct Arguments {
  const u16* x;          // stored numbers [inputs]; of a gate and of what it opens, one after the other
  const uint4* codes;    // [inputs, tiles * 8]
  const u16* scales;     // [inputs, tiles * SCALES]
  const float* cutoff;   // [layers, inputs]
  const float* shift;    // [layers, inputs]
  const void* gain;      // [inputs], stored or float32
  const float* start;    // [outputs]
  const float* more;     // [outputs], by an earlier launch
  const float* squares;  // [squares_count]: add up to the input's sum of squares
  const u16* residual;   // [outputs]
  void* y;               // [outputs], stored or float32
  float* y_squares;      // [tiles * CLUSTER]
  float eps, scale;
  int inputs, outputs, tiles, squares_count;
  int begins[2];         // first outputs of the second and the third layer, else the number of outputs
  int first_tiles[2];    // and their first tiles
  int half_scales;       // a bit for every layer
};
static_assert(sizeof(Arguments) == ARGUMENTS_SIZE, "the arguments are packed otherwise");

#define THREADS (WARPS * 32)
#define TILE (1024 / BITS)
#define BLOCKS 8
#define MIXED 2
#define PER_SCALE (BLOCKS / SCALES)

DEVICE float rounded(float v) { return stored(store_of(v)); }
DEVICE float over_warp(float v) {
#pragma unroll
  for (int d = 16; d; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  return v;
}

// A scale is float16, else bfloat16; where layers differ, each has its own kind.
DEVICE float scale_of(u32 v, bool half) {
  return (HALF_SCALES == MIXED ? half : HALF_SCALES) ? of_half(v) : __uint_as_float(v << 16);
}

// A row's scales in a tile, as they lie.
struct Scales {
  u32 words[(SCALES + 1) / 2];
  DEVICE float at(int i, bool half) const { return scale_of(i & 1 ? words[i / 2] >> 16 : words[i / 2] & 0xffff, half); }
};
DEVICE Scales scales_at(const u16* at) {
  Scales s;
#if SCALES == 1
  s.words[0] = __ldg(at);
#elif SCALES == 2
  s.words[0] = __ldg((const u32*)at);
#elif SCALES == 4
  *(uint2*)s.words = __ldg((const uint2*)at);
#else
  *(uint4*)s.words = __ldg((const uint4*)at);
#endif
  return s;
}

// The PLACE-th four bits of both halves, as 16 + what they hold.
template <int PLACE> DEVICE u32 numbers(u32 word) {
  const u32 turned = PLACE ? __funnelshift_r(word, word, 4 * PLACE) : word;
  return (turned & 0x00780078u) | 0x41804180u;
}

// The column that a lane holds of the right side: the first, second or third eight bits of a float32, for even or odd
// outputs.
struct Column {
  u32 first, second, place;
  DEVICE Column(int lane) {
    const int column = lane >> 2, part = column >> 1;
    first = part >= 1 ? 0xffff0000u : 0u;
    second = part >= 2 ? 0xffff0000u : 0u;
    place = part == 3 ? 0x4444u : column & 1 ? 0x3244u : 0x4432u;
  }
  DEVICE u32 operator()(float v) const {
    v -= __uint_as_float(__float_as_uint(v) & first);
    v -= __uint_as_float(__float_as_uint(v) & second);
    return __byte_perm(__float_as_uint(v), 0u, place);
  }
};

DEVICE void multiply_add(float (*sums)[4], float* total, const Column& column, uint4 p, uint4 q, float v, float w,
                         const Scales& s, const Scales& t, bool half) {
  const u32 first[4] = {p.x, p.y, p.z, p.w}, second[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
  for (int i = 0; i < SCALES; i++) {
    const float by = v * s.at(i, half), also = w * t.at(i, half);
    total[i] += by + also;
    const u32 b0 = column(by), b1 = column(also);
#pragma unroll
    for (int j = i * PER_SCALE; j < (i + 1) * PER_SCALE; j++) {
      const u32 a = first[j / 2], b = second[j / 2];
      if (j & 1) product(sums[j], numbers<1>(a), numbers<3>(a), numbers<1>(b), numbers<3>(b), b0, b1);
      else product(sums[j], numbers<0>(a), numbers<2>(a), numbers<0>(b), numbers<2>(b), b0, b1);
    }
  }
}

#define STEP (8 * LOADS)
// Rows of a list that are asked for together: eight for each of LOADS.
struct Batch {
  uint4 p[LOADS], q[LOADS];
  Scales s[LOADS], t[LOADS];

  template <class Row>
  DEVICE void fetch(const uint4* codes, const u16* scales, int tiles, int first, int count, Row row) {
    if (first >= count) return;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      const int j = first + 8 * i + (threadIdx.x & 3);
      p[i] = q[i] = make_uint4(0, 0, 0, 0);
      s[i] = t[i] = Scales{};
      if (j < count) {
        const u32 at = (u32)row(j) * (u32)tiles;
        p[i] = weights(codes + (size_t)at * 8), s[i] = scales_at(scales + (size_t)at * SCALES);
      }
      if (j + 4 < count) {
        const u32 at = (u32)row(j + 4) * (u32)tiles;
        q[i] = weights(codes + (size_t)at * 8), t[i] = scales_at(scales + (size_t)at * SCALES);
      }
    }
  }

  template <class Number>
  DEVICE void add(float (*sums)[4], float* total, const Column& column, int first, int count, bool half, Number number) const {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      const int j = first + 8 * i + (threadIdx.x & 3);
      if (first + 8 * i < count) multiply_add(sums, total, column, p[i], q[i], number(j), number(j + 4), s[i], t[i], half);
    }
  }
};

extern "C" __global__ void __cluster_dims__(1, CLUSTER, 1) __launch_bounds__(THREADS)
quantised_columns(const __grid_constant__ Arguments a) {
  __shared__ __align__(16) float parts[WARPS * TILE];
  __shared__ __align__(16) float whole[TILE];
  __shared__ float2 lists[WARPS][PER];  // which input, and its number
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5, mine = lane & 3;
  const int tile = blockIdx.x, k0 = (blockIdx.y * WARPS + warp) * PER;
  const int layer = LAYERS == 1 ? 0 : (tile >= a.first_tiles[0]) + (tile >= a.first_tiles[1]);
  const int begin = layer == 0 ? tile * TILE : a.begins[layer - 1] + (tile - a.first_tiles[layer - 1]) * TILE;
  const int end = LAYERS == 1 || layer == 2 ? a.outputs : a.begins[layer];
  const uint4* codes = a.codes + (size_t)tile * 8 + (lane >> 2);
  const size_t stride = (size_t)a.tiles * 8;
  const u16* scales = a.scales + tile * SCALES;
  const bool half = HALF_SCALES == MIXED ? a.half_scales >> layer & 1 : HALF_SCALES;
  const Column column(lane);
  float2* list = lists[warp];
  float sums[BLOCKS][4] = {}, total[SCALES] = {};
  const int most = READS_ALL ? min(max(a.inputs - k0, 0), PER) : PER;
  Batch one, two;
#if READS_ALL  // weights do not depend on the input, so they are asked for before it is there
  one.fetch(codes, scales, a.tiles, 0, most, [&](int j) { return k0 + j; });
  two.fetch(codes, scales, a.tiles, STEP, most, [&](int j) { return k0 + j; });
#endif
  constexpr int VOTES = PER / 32;
  float least[VOTES], gain[VOTES];
#pragma unroll
  for (int i = 0; i < VOTES; i++) {
    const int k = k0 + 32 * i + lane;
    least[i] = READS_ALL || k >= a.inputs ? 0.f : a.cutoff[layer * a.inputs + k];
    gain[i] = !NORMED || k >= a.inputs ? 0.f : GAIN_FLOAT ? ((const float*)a.gain)[k] : stored(((const u16*)a.gain)[k]);
  }
#if EARLY
  let_next_begin();
#endif
  wait_for_earlier();
#if !EARLY
  let_next_begin();
#endif
  float given[VOTES], opened[VOTES];
#pragma unroll
  for (int i = 0; i < VOTES; i++) {
    const int k = k0 + 32 * i + lane;
    given[i] = k < a.inputs ? stored(fresh16(a.x + k)) : 0.f;
    opened[i] = ACTIVATION && k < a.inputs ? stored(fresh16(a.x + a.inputs + k)) : 0.f;
  }
#if NORMED
  float square_sum = 0;
  for (int i = lane; i < a.squares_count; i += 32) square_sum += __uint_as_float(fresh(a.squares + i));
  const float rate = rsqrtf(over_warp(square_sum) / a.inputs + a.eps);
#endif
  int count = 0;
#pragma unroll
  for (int i = 0; i < VOTES; i++) {
    const int k = k0 + 32 * i + lane;
    float v = given[i];
#if NORMED
    v = ROUNDS_FIRST ? rounded(rounded(v * rate) * gain[i]) : rounded(v * rate * gain[i]);
#endif
#if ACTIVATION
    v = rounded(rounded(activated(v)) * opened[i]);
#endif
#if READS_ALL
    list[32 * i + lane] = make_float2(__int_as_float(k), v);
#else
    if (SHIFTED && k < a.inputs) v = rounded(v - a.shift[layer * a.inputs + k]);
    const bool active = k < a.inputs && !(fabsf(v) <= least[i]);  // NaN does not rest
    const u32 vote = __ballot_sync(~0u, active);
    if (active) list[count + __popc(vote & ((1u << lane) - 1))] = make_float2(__int_as_float(k), v);
    count += __popc(vote);
#endif
  }
  __syncwarp();
  if (READS_ALL) count = most;
  const auto row = [&](int j) { return READS_ALL ? k0 + j : __float_as_int(list[j].x); };
  const auto number = [&](int j) { return j < count ? list[j].y : 0.f; };
#if !READS_ALL
  one.fetch(codes, scales, a.tiles, 0, count, row);
  two.fetch(codes, scales, a.tiles, STEP, count, row);
#endif
  for (int first = 0; first < count; first += 2 * STEP) {  // while one batch is multiplied, the other is under way
    one.add(sums, total, column, first, count, half, number);
    one.fetch(codes, scales, a.tiles, first + 2 * STEP, count, row);
    two.add(sums, total, column, first + STEP, count, half, number);
    two.fetch(codes, scales, a.tiles, first + 3 * STEP, count, row);
  }
  // Four lanes hold the three parts of the same sums. Each takes a quarter of them: both planes of one word.
  const bool right = mine & 1, upper = mine & 2;
  float pair[4][4], quarter[2][4];
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float keep = right ? sums[j + 4][e] : sums[j][e], give = right ? sums[j][e] : sums[j + 4][e];
      pair[j][e] = keep + __shfl_xor_sync(~0u, give, 1);
    }
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float keep = upper ? pair[j + 2][e] : pair[j][e], give = upper ? pair[j][e] : pair[j + 2][e];
      quarter[j][e] = keep + __shfl_xor_sync(~0u, give, 2);
    }
  const int word = (right ? 2 : 0) + (upper ? 1 : 0);
  float less[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < SCALES; i++) {
    float v = total[i];
    v += __shfl_xor_sync(~0u, v, 1);
    v += __shfl_xor_sync(~0u, v, 2);
#pragma unroll
    for (int j = 0; j < 2; j++)
      if ((2 * word + j) / PER_SCALE == i) less[j] = v;
  }
  float* at = parts + warp * TILE + (lane >> 2) * 4;
#if BITS == 4
#pragma unroll
  for (int j = 0; j < 2; j++)
    *(float4*)(at + (2 * word + j) * 32) = make_float4(quarter[j][0] - 24.f * less[j], quarter[j][1] - 24.f * less[j],
                                                        quarter[j][2] - 24.f * less[j], quarter[j][3] - 24.f * less[j]);
#else
  float v[4];
#pragma unroll
  for (int e = 0; e < 4; e++) v[e] = fmaf(16.f, quarter[1][e] - 24.f * less[0], quarter[0][e] - 16.f * less[0]);
  *(float4*)(at + word * 32) = make_float4(v[0], v[1], v[2], v[3]);
#endif
  __syncthreads();
  for (int c = t; c < TILE; c += THREADS) {
    float s = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) s += parts[i * TILE + c];
    whole[c] = s;
  }
  const int rank = CLUSTER > 1 ? rank_in_cluster() : 0;
  if (CLUSTER > 1) cluster_arrives(), cluster_waits();
  else __syncthreads();
  constexpr int SHARE = TILE / CLUSTER;
#if ADDED
  float square = 0;
#endif
  for (int c = t; c < SHARE; c += THREADS) {
    const int o = rank * SHARE + c, n = begin + o;
    float s = 0;
    if (CLUSTER > 1) {
      float v[CLUSTER];
#pragma unroll
      for (int i = 0; i < CLUSTER; i++) v[i] = of_program(whole + o, i);
#pragma unroll
      for (int i = 0; i < CLUSTER; i++) s += v[i];
    } else {
      s = whole[o];
    }
    if (n < end) {
      if (STARTED) s += a.start[n];
      if (MORE) s += __uint_as_float(fresh(a.more + n));
#if ADDED
      s = rounded(rounded(s) * a.scale);  // rounded where a model rounds: the product, then the sum
      s = rounded(s + stored(fresh16(a.residual + n)));
      square += s * s;
#endif
      if (WIDE) ((float*)a.y)[n] = s;
      else ((u16*)a.y)[n] = store_of(s);
    }
  }
  if (CLUSTER > 1) cluster_arrives();  // no program ends while another reads what it holds
#if ADDED
  constexpr int HOLDERS = (SHARE < THREADS ? SHARE : THREADS) <= 32 ? 1 : (SHARE < THREADS ? SHARE : THREADS) / 32;
  __shared__ float room[HOLDERS];
  square = over_warp(square);
  if (lane == 0 && warp < HOLDERS) room[warp] = square;
  __syncthreads();
  if (t == 0) {
    float s = 0;
    for (int i = 0; i < HOLDERS; i++) s += room[i];
    a.y_squares[tile * CLUSTER + rank] = s;
  }
#endif
  if (CLUSTER > 1) cluster_waits();
}
