"""CUDA kernels for torch: sources in plugins_trt/kernels, compiled by NVRTC on the user's machine, no toolchain needed."""
