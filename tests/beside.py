"""Commands that run beside the tests, of which pytest uses one core: builds, and tests in processes of their own.

A test that waits for one is marked with the function that runs it, and with what else that is given:

    @pytest.mark.beside.with_args(build, "part")
    def test_what_was_built(beside):
        found = beside(build, "part")

conftest.py begins build(beside, "part") when the tests are chosen; tests with such a mark come last. One of them runs
at a time, two where a test waits. A run of all tests leaves FILES to test_beside.py, which runs them so.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

#: Files that take one core long: a run of all tests has a process for each.
FILES = ("test_adversarial.py", "test_compile_only.py")


class Beside:
    def __init__(self, seed: int):
        self.seed = seed
        self._root = pathlib.Path(tempfile.mkdtemp(prefix="mmfast-"))
        self._pool = concurrent.futures.ThreadPoolExecutor(2)
        self._cores = threading.Semaphore(1)
        self._begun: dict[tuple, concurrent.futures.Future] = {}
        self._running: set[subprocess.Popen] = set()
        self._waits = self._ended = False

    def begin(self, work: Callable, *given: Any) -> None:
        if (work, given) not in self._begun:
            self._begun[work, given] = self._pool.submit(self._on_a_core, work, given)

    def _on_a_core(self, work: Callable, given: tuple) -> Any:
        with self._cores:
            return work(self, *given)

    def __call__(self, work: Callable, *given: Any) -> Any:
        """What work(self, *given) returned, or the exception that it raised."""
        found = self._begun[work, given]
        if not self._waits and not found.done():
            self._waits = True
            self._cores.release()
        return found.result()

    def folder(self) -> pathlib.Path:
        return pathlib.Path(tempfile.mkdtemp(dir=self._root))

    def run(self, *command: Any, **options: Any) -> subprocess.CompletedProcess:
        """A command and what it printed."""
        if self._ended:
            raise RuntimeError("the tests have ended")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **pipes, **options) as process:
            self._running.add(process)
            try:
                out, err = process.communicate(timeout=1500)
            finally:
                process.kill()
                self._running.remove(process)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def pytest(self, name: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
        """The tests of one file in a process of their own."""
        tests = pathlib.Path(__file__).resolve().parent
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--seed={self.seed}", *options]
        # one thread each: two run at once, and OpenMP's threads would wait for each other
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        return self.run(*command, tests / name, cwd=tests.parent, env=environment)

    def end(self) -> None:
        """What still runs is not waited for."""
        self._ended = True
        for process in list(self._running):
            _terminate(process.pid)
        self._pool.shutdown(cancel_futures=True)
        shutil.rmtree(self._root, ignore_errors=True)


def _terminate(pid: int) -> None:
    """A process and what it has begun: a build's compilers, say."""
    with contextlib.suppress(OSError):
        for children in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                _terminate(int(child))
        os.kill(pid, signal.SIGTERM)
