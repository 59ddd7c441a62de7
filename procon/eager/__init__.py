"""The plain PyTorch twins of :mod:`procon.kernels`: the path on CPU, and what the Triton kernels are compared with.

Accumulation is in float32 (float64 for float64 hidden states). All products go through ``out=`` variants, which
autocast leaves alone. The one global setting that reaches these files is
``torch.set_float32_matmul_precision("medium")``, which lowers float32 products on CPU as it does for any other matmul.
"""
