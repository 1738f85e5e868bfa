"""What is measured, and how; the scripts are in tools/, the results in benchmarks/."""
