"""Benchmarks of the kernels beside the published formulas and `torch.compile`: `python -m bench.kernels --help`.

Speed is measured on a GPU. Without one there is still what can be counted: launches, and bytes per element.
"""
