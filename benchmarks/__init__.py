"""Measures onnxlate side by side with other libraries, as a client of it: ``python -m benchmarks``."""
