"""One command each; every figure is a ratio against a peer in the same run, or a size."""
