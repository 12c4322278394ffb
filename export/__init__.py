"""The export room, installed as `flashhead_edge.export`: ONNX graphs of a head and TensorRT engines from them.

Empty in this version. What it will hold, and what it may import, is in docs/architecture.md.
"""
