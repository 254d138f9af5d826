"""One request as the policy sees it: when it is due, what it found, what it leaves behind."""
