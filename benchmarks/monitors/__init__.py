"""Do monitors still read a model after it was fine-tuned? Linear probes, before and after, with and without anchors."""
