// The residual stream: stored numbers become sums that products add to, and are made of them again at the end.
struct Arguments {
  u16* x;          // stored numbers [count]
  int* low;        // sums
  float* squares;  // [1]
  float steps, unit, limit;
  int count, width;
};
static_assert(sizeof(Arguments) == ARGUMENTS_SIZE, "the arguments are packed otherwise");
#define THREADS (WARPS * 32)

// Both are one program.
extern "C" __global__ void __launch_bounds__(THREADS) begin(const __grid_constant__ Arguments a) {
  const int t = threadIdx.x;
  wait_for_earlier();
  let_next_begin();
  for (int i = t; i < 2 * a.width + a.width / 32 + 1; i += THREADS) a.low[i] = 0;
  __syncthreads();
  for (int i = t; i < a.count; i += THREADS)
    add_part(a.low, a.width, i, stored(fresh16(a.x + i)) * a.steps, a.limit, (u32*)state_of(a.low, a.width));
}

extern "C" __global__ void __launch_bounds__(THREADS) finish(const __grid_constant__ Arguments a) {
  __shared__ float room[32];
  const int t = threadIdx.x, lane = t & 31;
  wait_for_earlier();
  let_next_begin();
  const u32 state = fresh(state_of(a.low, a.width));
  float s = 0;
  for (int i = t; i < a.count; i += THREADS) {
    const u16 v = store_of(fixed_at(a.low, a.width, i, state) * a.unit);
    a.x[i] = v;
    s += stored(v) * stored(v);
  }
  s = over_warp(s);
  if (lane == 0) room[t / 32] = s;
  __syncthreads();
  s = over_warp(lane < WARPS ? room[lane] : 0.f);
  if (t == 0) a.squares[0] = s;
}
