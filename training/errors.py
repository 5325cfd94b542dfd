"""Bad input, said in one line."""


class TrainingError(ValueError):
    """What is wrong, with the expected and the actual value, and how to mend it."""
