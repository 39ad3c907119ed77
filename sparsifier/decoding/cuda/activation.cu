// What the gate of an MLP goes through: SiLU, GELU by tanh, GELU.
#if ACTIVATION
DEVICE float activated(float v) {
#if ACTIVATION == 1
  return v / (1.f + __expf(-v));
#elif ACTIVATION == 2
  const float u = 0.7978845608028654f * (v + 0.044715f * v * v * v);
  return v - v / (1.f + __expf(2.f * u));
#else
  return 0.5f * v * (1.f + erff(v * 0.7071067811865476f));
#endif
}
#endif
