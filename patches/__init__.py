"""Everything that knows SGLang: which functions are hooked, and what the hooks do."""
