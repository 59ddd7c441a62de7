"""What the benchmarks share: shapes and machines, contenders in turn, agreement before timing."""
