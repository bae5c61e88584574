"""Pure tensor functions: Triton kernels, each beside its PyTorch reference."""
