"""How training may end before its last step."""


class InterruptedRun(Exception):
    """The run stopped after a signal. Its state is saved."""


class TrainingHaltedError(Exception):
    """Training cannot continue. The message names the problem and a remedy."""


class LossSpikeError(Exception):
    """The loss of a step is far above the mean of the rows before."""

    def __init__(self, step: int, loss: float, mean: float):
        super().__init__(f"loss spike in step {step}: {loss:.3f}, from a mean of {mean:.3f}")
        self.step = step
