"""Products of one token in CUDA C++, compiled at run time: small programs whose warps vote what to read."""
