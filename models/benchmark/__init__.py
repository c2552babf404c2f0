"""Everything that only benchmark_inference.py needs."""
