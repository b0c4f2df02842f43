"""What is registered with the Prefect server, and how a project gets there."""
