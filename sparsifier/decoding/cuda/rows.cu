// Rows of ``up`` under a mask of the activated gate: a row that rests is not read. A program takes 32 rows; its lanes
// vote which of them are active, and its warps take those in turn. `z` is the gate, `cutoff` and `start` are of rows.
#define ROWS 32

extern "C" __global__ void __launch_bounds__(THREADS) rows(const __grid_constant__ Arguments a) {
  constexpr int CHUNKS = (INPUTS + 255) / 256;
  __shared__ __align__(16) u16 input[CHUNKS * 256];
  __shared__ float room[32];
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
  const int row = blockIdx.x * ROWS + lane;
  const bool there = row < a.outputs;
  const float least = there ? a.cutoff[row] : 0.f, start = STARTED && there ? a.start[row] : 0.f;
#if CHAINED && EARLY
  let_next_begin();
#endif
  wait_for_earlier();
#if CHAINED && !EARLY
  let_next_begin();
#endif
#if GATE_SOURCE == 0
  float gate = there ? stored(fresh16((const u16*)a.z + row)) : 0.f;
#else
  float gate = there ? rounded(fixed_at((const int*)a.z, a.z_width, row, fresh(state_of((const int*)a.z, a.z_width))) * a.z_unit) : 0.f;
#endif
#if ACTIVATION
  gate = rounded(activated(gate));
#endif
  const u32 state = SOURCE == FIXED ? fresh(state_of((const int*)a.x, a.x_width)) : 0;
  u32 mask = __ballot_sync(~0u, there && !(fabsf(gate) <= least));
  if (warp == 0 && there && !(mask >> lane & 1)) ((u16*)a.out)[row] = 0;
#if INPUT == 1
  const float by = rate(a, state, room);
#endif
  for (int k = t; k < CHUNKS * 256; k += THREADS) {
    float v = k < INPUTS ? number(a, k, state) : 0.f;
#if INPUT == 1
    if (k < INPUTS) v *= by, v = ROUNDS_FIRST ? rounded(v) * a.gain[k] : v * a.gain[k];
#endif
    input[k] = store_of(v);
  }
  __syncthreads();
  for (int n = 0; mask; n++) {
    const int i = __ffs(mask) - 1;
    mask &= mask - 1;
    if (n % WARPS != warp) continue;
    const uint4* at = a.weight + (size_t)(blockIdx.x * ROWS + i) * a.stride + lane;
    float s = 0;
#pragma unroll
    for (int c0 = 0; c0 < CHUNKS; c0 += LOADS) {
      uint4 found[LOADS];
#pragma unroll
      for (int c = 0; c < LOADS; c++)
        found[c] = c0 + c < CHUNKS && (c0 + c) * 256 + lane * 8 < INPUTS ? weights(at + (c0 + c) * 32) : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int c = 0; c < LOADS; c++) {
        if (c0 + c >= CHUNKS) break;
        const uint4 w = found[c], x = *(const uint4*)(input + (c0 + c) * 256 + lane * 8);
        s += lower(w.x) * lower(x.x) + upper(w.x) * upper(x.x) + lower(w.y) * lower(x.y) + upper(w.y) * upper(x.y) +
             lower(w.z) * lower(x.z) + upper(w.z) * upper(x.z) + lower(w.w) * lower(x.w) + upper(w.w) * upper(x.w);
      }
    }
    s = over_warp(s) + __shfl_sync(~0u, start, i);
    const float opened = __shfl_sync(~0u, gate, i);
    if (lane == 0) ((u16*)a.out)[blockIdx.x * ROWS + i] = store_of(opened * rounded(s));
  }
  for (int i = blockIdx.x * THREADS + t; i < a.zeros; i += gridDim.x * THREADS) a.zero[i] = make_uint4(0, 0, 0, 0);
}
