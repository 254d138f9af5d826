"""What `bench.demo` is made of."""
