"""Parts of `bench.kernels`: geometry, baselines, timing, goals and reports."""
