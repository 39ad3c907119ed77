"""The guard: a small fixed suite that is compared with committed references, and fails when figures would move."""
