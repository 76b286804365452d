import os
import signal
import threading

import pytest

from jaxft.lab import Interrupts


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_a_request_and_gives_the_shells_status(number, status):
    with Interrupts() as stop:
        assert not stop.requested
        assert stop.exit_status == 0
        send(number)
        assert stop.requested
        assert stop.exit_status == status
    assert stop.exit_status == status


def test_a_second_ctrl_c_stops_at_once():
    with Interrupts():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_loop_ends_at_the_event_after_the_signal():
    done = []
    with Interrupts() as stop:
        for step in range(10):
            done.append(step)
            if step == 3:
                send(signal.SIGTERM)
            if stop.requested:
                break
    assert done == [0, 1, 2, 3]


def test_handlers_are_restored_after_an_exception():
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

    def work():
        with Interrupts():
            assert signal.getsignal(signal.SIGINT) != before[0]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_off_the_main_thread_nothing_is_installed():
    seen = []

    def work():
        with Interrupts() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGINT)))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
