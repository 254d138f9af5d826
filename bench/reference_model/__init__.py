"""A small reasoning model of our own: its tasks, its tokenizer, its training and its evaluation."""
