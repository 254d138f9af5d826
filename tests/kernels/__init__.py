"""The kernels, in torch and in Triton, against references in float64 and plain Python."""
