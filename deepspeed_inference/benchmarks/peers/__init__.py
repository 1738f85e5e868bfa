"""What benchmarks need to run the peers, which are no dependencies of the project."""
