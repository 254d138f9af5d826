"""What `bench.agents` is made of, and the answers that `bench.demo` reads too."""
