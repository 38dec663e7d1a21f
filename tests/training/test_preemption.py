"""A signal stops a run after its step, a second one at once, and none is lost."""

import gc
import signal

import pytest

from mla_moe.training.errors import InterruptedRun, LossSpikeError
from mla_moe.training.preemption import PreemptionSignals, remember_interrupts


def test_second_signal_raises_keyboard_interrupt():
    def receive_two():
        with PreemptionSignals() as signals:
            signal.raise_signal(signal.SIGINT)
            assert signals.received is signal.SIGINT
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        receive_two()


@pytest.mark.parametrize("error", [None, LossSpikeError(7, 9.0, 3.0), ValueError("another error")])
def test_a_signal_after_the_last_step_or_in_one_with_a_loss_spike_stops_the_run(error):
    def receive_and_raise():
        with PreemptionSignals():
            signal.raise_signal(signal.SIGTERM)
            if error:
                raise error

    with pytest.raises(ValueError if isinstance(error, ValueError) else InterruptedRun):
        receive_and_raise()


def test_an_interrupt_that_python_drops_stops_the_run_before_its_first_step(monkeypatch):
    """As in a callback of the garbage collector, of which JAX registers one."""
    monkeypatch.setattr("sys.unraisablehook", lambda _: None)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it

    def interrupt(*_: object) -> None:
        gc.callbacks.remove(interrupt)
        signal.raise_signal(signal.SIGINT)

    with remember_interrupts():
        gc.callbacks.append(interrupt)
        gc.collect()
        with pytest.raises(KeyboardInterrupt), PreemptionSignals():
            raise AssertionError("a step begins")
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
