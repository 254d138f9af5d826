"""Whether answers are right, and what eviction costs in them; measures no speed."""
