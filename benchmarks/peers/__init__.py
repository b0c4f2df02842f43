"""Other servers of the same model, and how they are made, started and stopped."""
