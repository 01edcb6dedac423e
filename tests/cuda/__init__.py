"""CUDA: what the rest of the package does with a GPU, on the CPU where there is none."""
