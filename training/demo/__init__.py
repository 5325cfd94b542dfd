"""The embedded demo model: its text, its tokenizer, its tasks and its run."""
