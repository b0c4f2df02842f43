"""What goes into a model's own environment: the contract, the trainer entry, the scorer, the HTTP server."""

__version__ = "0.1.0"
