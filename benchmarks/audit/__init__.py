"""What the kernels and the constraint cost, counted without a GPU: traffic, builds and live bytes."""
