"""An engine behind the interface that OpenAI's clients speak."""
