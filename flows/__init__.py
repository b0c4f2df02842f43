"""Order and branches only: a flow file reads as its DAG."""
