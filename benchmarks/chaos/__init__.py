"""What `benchmarks.rollout` does to an installation."""
