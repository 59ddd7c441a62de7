"""Triton kernels of ProCon: tensors in, tensors out. Installed as ``procon.kernels``."""
