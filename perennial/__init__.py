"""The core of Perennial: values, pure decisions and capabilities. Knows nothing of Prefect."""
