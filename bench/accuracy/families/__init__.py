"""Whether the policy runs, and is right, on architectures other than the tests' own."""
