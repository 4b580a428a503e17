"""`trine eval`."""


def evaluate() -> None:
    """Placeholder while the room behind it is built."""
    raise NotImplementedError
