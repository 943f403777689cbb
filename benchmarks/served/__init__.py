"""Served: load on onnxlate's gRPC server and on CTranslate2 behind a server that batches, side by side.

Text in, text out; real captions of mixed length. Closed loop (so many clients, each sends when it was answered) and open loop
(random arrivals at a rate, up to saturation). An ``Experiment``; ``python -m benchmarks.served`` has two more measurements, of
onnxlate alone.
"""

from benchmarks.served.comparison import METHOD, TITLE, run
from benchmarks.served.page import plot, render

__all__ = ["METHOD", "TITLE", "plot", "render", "run"]
