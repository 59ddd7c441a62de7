"""What the kernels and the constraint cost, counted where no GPU is: traffic, builds and live bytes."""
