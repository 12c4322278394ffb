"""A decoder as a list of nodes over one file of weights, both in the form that the kernels take: data, without torch. numpy only.

TensorRT's export writes the nodes as plugins of an ONNX model; the `cuda` backend runs them itself.
"""
