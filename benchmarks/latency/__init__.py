"""Wall-clock time: matrices through the kernels, and models that decode token by token."""
