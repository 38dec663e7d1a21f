"""For tests of checkpoints."""


class Position:
    """A data position that is a number."""

    def __init__(self, number=0):
        self.number = number

    def states(self):
        return {0: str(self.number)}

    def restore(self, read):
        self.number = int(read(0))
