"""What `bench.agents` and `bench.frontend_program` are made of."""
