"""A limit of time for a block of code that somebody else wrote."""

import signal
import threading
from contextlib import contextmanager


@contextmanager
def within_seconds(seconds: float, computing: bool = False):
    """Raise TimeoutError in the block once `seconds` are over; 0 waits for ever.

    Python looks for signals between its instructions, and regular expressions do on their way.

    Args:
        computing: count the processor's seconds, which a busy machine does not stretch, not the clock's.
    """
    # Only the main thread may set a handler.
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum, frame):
        raise TimeoutError

    timer = signal.ITIMER_VIRTUAL if computing else signal.ITIMER_REAL
    number = signal.SIGVTALRM if computing else signal.SIGALRM
    before = signal.signal(number, stop)
    signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        # The timer first: if it rang between these two lines, the handler of before would meet a signal that is not
        # for it.
        signal.setitimer(timer, 0)
        signal.signal(number, before)
