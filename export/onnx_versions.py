"""Which ONNX the servers read."""

from __future__ import annotations

# Read by ONNX Runtime 1.19 and later, hence by every Triton container since 24.10.
OPSET = 17
IR_VERSION = 9
NEWEST_OPSET = 21
