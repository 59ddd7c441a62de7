"""One page from what benchmarks/gpu.sh measured."""
