"""Who sent a signal, as the kernel tells a thread that waits for it.

Where `listen` was called the main thread blocks these signals, and the waiting thread hands each on to the
handler that the main thread has set for it. Whatever lets them through again, such as the start of a process,
costs no more than the sender's name: they then reach their handlers as in any other program.
"""

from __future__ import annotations

import _thread
import atexit
import pwd
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

POLITE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_NAMES = ("SIGQUIT", "SIGUSR2", "SIGXCPU", "SIGPWR")  # End a process that has no handler for them.
WAITED_FOR = (*POLITE, *(signal.Signals[name] for name in _NAMES if name in signal.Signals.__members__))
STARTS = frozenset({"subprocess.Popen", "os.posix_spawn", "os.fork", "os.forkpty", "os.system", "os.exec"})
SENT_BY_KERNEL = 128  # si_code SI_KERNEL (asm-generic/siginfo.h)
BY_KERNEL = {
    signal.SIGINT: "the keyboard",
    signal.SIGQUIT: "the keyboard",
    signal.SIGHUP: "the terminal, which was closed",
}

Farewell = Callable[[signal.Signals, str], None]
_senders: dict[int, str] = {}
_farewell: Farewell | None = None
_is_listening = False
_has_begun = False


def listen(farewell: Farewell) -> None:
    """From now on `sender_of` knows. `farewell` is told of a signal (and its sender, as `sender_of` says it)
    that is about to end the process, since nothing handles it; it is called in another thread.

    To be called by the main thread before others are started, which else may be given the signals in its
    stead; does nothing in another thread, or where the system has no such waiting."""
    global _farewell, _is_listening, _has_begun
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "sigwaitinfo"):
        return
    _farewell, _is_listening = farewell, True
    _senders.clear()
    if not _has_begun:
        _has_begun = True
        signal.signal(_wake(), _nothing)
        sys.addaudithook(_let_children_have_them)
        atexit.register(stop_listening)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, WAITED_FOR)
        main = threading.get_ident()
        threading.Thread(target=_wait, args=(main,), name="signals", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    listen_again()


def listen_again() -> None:
    """In the main thread, after what may have let the signals through. Costs a microsecond."""
    if _is_listening and threading.current_thread() is threading.main_thread():
        signal.pthread_sigmask(signal.SIG_BLOCK, WAITED_FOR)


def stop_listening() -> None:
    """The signals reach their handlers directly from now on."""
    global _is_listening
    if _is_listening and threading.current_thread() is threading.main_thread():
        _is_listening = False
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WAITED_FOR)


def sender_of(number: int) -> str:
    """Of the last such signal, such as ", from process 4711 (bash, user ada)"; empty where nobody knows."""
    return _senders.get(number, "")


def _wake() -> int:
    return int(signal.SIGRTMIN) + 9


def _nothing(number: int, frame: Any) -> None:
    """Its coming alone ends a wait of the main thread, so that the handlers run."""


def _let_children_have_them(event: str, _: tuple[Any, ...]) -> None:
    """Called by Python before a process is started, which would inherit what is blocked."""
    if event in STARTS and _is_listening:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, WAITED_FOR)


def _wait(main: int) -> None:
    while True:
        told = signal.sigwaitinfo(WAITED_FOR)
        number = signal.Signals(told.si_signo)
        sender = _described(number, told)
        _senders[number] = f", from {sender}" if sender else ""
        handler = signal.getsignal(number)
        if handler is signal.SIG_IGN:
            continue
        if handler is signal.SIG_DFL:
            if _farewell is not None and _is_listening:
                _farewell(number, sender_of(number))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
            signal.raise_signal(number)
            signal.pthread_sigmask(signal.SIG_BLOCK, {number})
        else:
            _thread.interrupt_main(number)
            signal.pthread_kill(main, _wake())


def _described(number: signal.Signals, told: signal.struct_siginfo) -> str:
    if told.si_code == SENT_BY_KERNEL:
        return BY_KERNEL.get(number, "the kernel")
    if told.si_pid == 0:
        return "a process outside of this container"
    name = "gone since"
    with suppress(OSError):
        name = Path(f"/proc/{told.si_pid}/comm").read_text().strip()
    user = str(told.si_uid)
    with suppress(KeyError):
        user = pwd.getpwuid(told.si_uid).pw_name
    return f"process {told.si_pid} ({name}, user {user})"
