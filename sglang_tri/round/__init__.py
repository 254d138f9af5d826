"""A round, from "these requests are due" to "their rows are moved": `plan`, then `run`."""
