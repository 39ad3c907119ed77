// Products of one token by many small programs, which the hardware balances over the multiprocessors.
//
// A warp looks at PER inputs and a tile's outputs (256 numbers; of codes EACH a lane): its lanes vote which inputs are active, and ask for the weights of those at
// once, LOADS rows of 512 bytes at a time. The warps of a program add up in shared memory, and the program adds its part
// to memory. There is no list, nothing is waited for but the input, and no program waits for another.

// Adds the rows `mask` of this warp's, each times its lane's `v`.
DEVICE void add_rows(float* sums, const uint4* at, size_t stride, u32 mask, float v, bool inside) {
  while (mask) {
    uint4 found[LOADS];
    float by[LOADS];
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      found[i] = make_uint4(0, 0, 0, 0), by[i] = 0;
      if (mask) {
        const int k = __ffs(mask) - 1;
        mask &= mask - 1;
        if (inside) found[i] = weights(at + k * stride);
        by[i] = __shfl_sync(~0u, v, k);
      }
    }
#pragma unroll
    for (int i = 0; i < LOADS; i++) multiply_add(sums, found[i], by[i]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) columns(const __grid_constant__ Arguments a) {
  __shared__ __align__(16) float parts[WARPS * TILE];
  __shared__ float room[32];
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
  const int layer = LAYERS == 1 ? 0 : ((int)blockIdx.x >= a.tiles[0]) + ((int)blockIdx.x >= a.tiles[1]);
  const int begin = layer == 0 ? 0 : a.begins[layer - 1];
  const int end = LAYERS == 1 || layer == 2 ? a.outputs : a.begins[layer];
  const int first = begin + ((int)blockIdx.x - (layer == 0 ? 0 : a.tiles[layer - 1])) * TILE;
  const bool inside = first + lane * EACH < end;
  const bool ranked = RANKED && (int)blockIdx.y >= a.rows;
  const int k0 = (((int)blockIdx.y - (ranked ? a.rows : 0)) * WARPS + warp) * PER;
  const int k = k0 + (lane & (PER - 1));
  float sums[EACH] = {};
#if CHAINED && EARLY
  let_next_begin();
#endif
  if (!ranked) {
    const bool there = lane < PER && k < a.inputs;
#if CODES
    __shared__ __align__(16) List lists[WARPS];
    const u32 hidden = __shfl_sync(~0u, (u32)a.zeros >> 31, lane);  // is 0, which the compiler must not know
    const char* at = (const char*)a.weight + (((size_t)k0 * a.stride + blockIdx.x * 32 + lane) * LANE_BYTES + hidden);
    const Scales scales = there ? scales_at(a, k) : Scales{};
#else
    const uint4* at = a.weight + (size_t)k0 * a.stride + first / 8 + lane;
#endif
    const float least = there && !READS_ALL ? a.cutoff[layer * a.inputs + k] : 0.f;
    const float moved = SHIFTED && there ? a.shift[layer * a.inputs + k] : 0.f;
    const float gain = INPUT == NORMED && there ? a.gain[k] : 1.f;
#if CODES
    Codes found[LOADS];
    if (READS_ALL) ask(found, at, a.stride, lists[warp].rows, a.inputs - k0);
#elif READS_ALL
    constexpr int AHEAD = LOADS < PER ? LOADS : PER;
    uint4 found[AHEAD];  // weights do not depend on the input, so they are asked for before it is there
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      found[i] = inside && k0 + i < a.inputs ? weights(at + i * (size_t)a.stride) : make_uint4(0, 0, 0, 0);
#endif
    wait_for_earlier();
#if CHAINED && !EARLY
    let_next_begin();
#endif
    const u32 state = SOURCE == FIXED ? fresh(state_of((const int*)a.x, a.x_width)) : 0;
    float v = there ? number(a, k, state) : 0.f;
#if INPUT == 0
    if (SOURCE != STORED && ROUNDS) v = rounded(v);
#elif INPUT == 1
    v *= rate(a, state, room);
    v = rounded(ROUNDS_FIRST ? rounded(v) * gain : v * gain);
#else
    const float opened = there ? number(a, a.inputs + k, state) : 0.f;
    v = rounded(rounded(activated(rounded(v))) * rounded(opened));
#endif
    if (SHIFTED) v = rounded(v - moved);
#if CODES
    const bool active = there && (READS_ALL || !(fabsf(v) <= least));  // NaN does not rest
    const int count = enlist(lists[warp], scales, a.stride, active, v, a.half_scales >> layer & 1);
    add_codes(sums, found, at, a.stride, lists[warp], count, hidden);
#elif READS_ALL
#pragma unroll
    for (int i = 0; i < AHEAD; i++) multiply_add(sums, found[i], __shfl_sync(~0u, v, i));
    if (PER > AHEAD) add_rows(sums, at, a.stride, __ballot_sync(~0u, there) & ~(u32)((1ull << AHEAD) - 1), v, inside);
#else
    const bool rests = fabsf(v) <= least;  // NaN does not rest
    add_rows(sums, at, a.stride, __ballot_sync(~0u, there && (RESTING ? rests : !rests)), v, inside);
#endif
  } else {
    wait_for_earlier();
#if CHAINED && !EARLY
    let_next_begin();
#endif
#if RANKED
    const bool there = lane < PER && k < a.ranks[2 * layer + 1];
    const float v = there ? __uint_as_float(fresh((const float*)a.z + a.ranks[2 * layer] + k)) : 0.f;
    add_rows(sums, a.u + (size_t)k0 * a.u_stride + first / 8 + lane, a.u_stride, __ballot_sync(~0u, there), v, inside);
#endif
  }
  const int programs = gridDim.x * gridDim.y, program = blockIdx.y * gridDim.x + blockIdx.x;
  for (int i = program * THREADS + t; i < a.zeros; i += programs * THREADS) a.zero[i] = make_uint4(0, 0, 0, 0);
  float4* mine = (float4*)(parts + warp * TILE + lane * EACH);
#pragma unroll
  for (int i = 0; i < EACH / 4; i++) mine[i] = make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
  __syncthreads();
  u32* state = FINISHED ? a.counter + 2 * blockIdx.x + 1 : (u32*)state_of(a.y, a.y_width);
  for (int c = t; c < TILE && first + c < end; c += THREADS) {  // neighbours add to neighbours: few sectors are touched
    float s = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) s += parts[i * TILE + c];
    if (STARTED && blockIdx.y == 0) s += a.start[first + c];
    s *= a.steps;
    if (FLOAT_SUMS)
      add_float((float*)a.y + first + c, s);
    else
      add_part(a.y, a.y_width, first + c, s, a.limit, state);
  }
#if FINISHED
  // The last program of a tile makes stored numbers of its sums, and leaves zeros.
  __shared__ u32 last;
  __threadfence();
  __syncthreads();
  if (t == 0) last = atomicAdd(a.counter + 2 * blockIdx.x, 1u) == gridDim.y - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  const u32 found = FLOAT_SUMS ? 0 : fresh(state);
  for (int c = t; c < TILE && first + c < end; c += THREADS) {
    const int i = first + c;
    float v = FLOAT_SUMS ? __uint_as_float(fresh(a.y + i)) : (float)(int)fresh(a.y + i);
    if (found) {
      if (fresh(wide_of(a.y, a.y_width) + i / 32) >> (i & 31) & 1) {
        v = both_words(a.y, a.y_width, i, (int)fresh(a.y + i));
        a.y[a.y_width + i] = 0;
      }
      if (found & BROKEN) v = __int_as_float(0x7fffffff);
    }
    a.y[i] = 0;
#if WIDE_OUT
    ((float*)a.out)[i] = v * a.y_unit;
#else
    ((u16*)a.out)[i] = store_of(v * a.y_unit);
#endif
  }
  __syncthreads();
  if (found)
    for (int i = first / 32 + t; i * 32 < min(first + TILE, end); i += THREADS) ((u32*)a.y)[2 * a.y_width + i] = 0;
  if (t == 0) a.counter[2 * blockIdx.x] = 0, a.counter[2 * blockIdx.x + 1] = 0;
#endif
}
