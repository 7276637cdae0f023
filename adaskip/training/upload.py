"""Send a W&B run to its server while training writes it: in a process of its own, which may fail without consequences.

Training itself records offline, always: it never waits for a network, and a server that refuses, hangs or answers
nonsense has nothing of it to break. ``python -m adaskip.training.upload FILE`` is that other process.
"""

from __future__ import annotations

import logging
import os
import ssl
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

ANSWERS_WITHIN = 3.0
"""Seconds that a server has to answer at all."""
ENDS_WITHIN = 60.0
"""Seconds that an upload has, once training is done, to send what is left; `wandb sync` sends the rest."""
ASKED_AGAIN = 60.0
"""Seconds after which a server that failed is asked again, as long as training lasts."""
NICENESS = 10
"""Of the process that uploads: on a busy machine training goes first."""
LOG = "upload.log"

_log = logging.getLogger(__name__)


def find_fault(server: str, seconds: float = ANSWERS_WITHIN) -> str | None:
    """Ask a W&B server for any answer; return what is wrong with it, or None where only W&B itself can tell.

    A wrong key is W&B's to judge, and a certificate too: it has roots of its own.
    """
    try:
        question = Request(f"{server}/graphql", b'{"query": "query Viewer { viewer { id } }"}')
        question.add_header("Content-Type", "application/json")
        with urlopen(question, timeout=seconds):  # http or https: what W&B's own settings say
            return None
    except HTTPError as error:
        return f"it answers {error.code}" if error.code >= 500 else None
    except TimeoutError:
        return f"no answer within {seconds:g} s"
    except URLError as error:
        if isinstance(error.reason, ssl.SSLError):
            return None
        return f"no answer within {seconds:g} s" if isinstance(error.reason, TimeoutError) else str(error.reason)
    except (OSError, HTTPException, ValueError) as error:
        return str(error) or type(error).__name__


class Upload:
    """Begin to send an offline run to its server; nobody waits for it before `finish`.

    Args:
        file: the run's ``.wandb`` file.
        server: its address.
    """

    def __init__(self, file: Path, server: str) -> None:
        self.file, self.server = file, server
        self._process: subprocess.Popen[bytes] | None = None
        self._asked, self._ended, self._told = threading.Event(), threading.Event(), False
        self._lock = threading.Lock()  # between the last question and the end
        threading.Thread(target=self._send, name="adaskip-upload", daemon=True).start()

    @property
    def complete(self) -> bool:
        """Return whether everything has arrived; W&B leaves a file beside the run's own that says so."""
        return self.file.with_name(f"{self.file.name}.synced").exists()

    def finish(self) -> None:
        """Wait for the rest to arrive, a minute at most, and only as long as the server answers; say what is missing.

        The run must have been finished, or there is no end to wait for.
        """
        self._asked.wait(2 * ANSWERS_WITHIN)
        process, reason = self._process, f"no answer within {2 * ANSWERS_WITHIN:g} s"
        if process is not None and process.poll() is None and (fault := find_fault(self.server)) is not None:
            reason = fault
        elif process is not None:
            reason = f"not all was sent within {ENDS_WITHIN:g} s"
            with suppress(subprocess.TimeoutExpired):
                process.wait(ENDS_WITHIN)
                reason = self._last_words()
        self._stop()
        self._tell(reason)

    def _send(self) -> None:
        while (fault := find_fault(self.server)) is not None:
            self._tell(fault)
            self._asked.set()
            if self._ended.wait(ASKED_AGAIN):
                return
        with self._lock:
            if self._ended.is_set():
                return
            try:
                self._process = self._start()
            except OSError as error:
                self._tell(str(error))
            self._asked.set()
        if self._process is not None:
            self._watch(self._process)

    def _start(self) -> subprocess.Popen[bytes]:
        folder = self.file.parents[1]
        # WANDB_SERVICE would join it to what records this run, and what breaks there would break here
        environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
        environment |= {"WANDB_DIR": str(folder.parent), "WANDB_BASE_URL": self.server}
        with (folder / LOG).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(self.file)],
                stdin=subprocess.PIPE,  # closes when training ends, however it ends
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C is for training; the end of the run is to be sent as well
            )
        if hasattr(os, "setpriority"):
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
        return process

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Say at once where an upload gives up while training goes on."""
        process.wait()
        if not self._ended.is_set():
            self._tell(self._last_words())

    def _stop(self) -> None:
        with self._lock:
            self._ended.set()
            process = self._process
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        if process.poll() is None:
            process.kill()
        process.wait()

    def _last_words(self) -> str:
        log = self.file.parents[1] / LOG
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "it ended without a word")

    def _tell(self, reason: str) -> None:
        """Say, once, why not everything has arrived, and what to type."""
        if self._told or self.complete:
            return
        self._told = True
        _log.warning(
            "W&B at %s: %s; the run is recorded on this machine, and nothing of it is lost. Send it later: "
            "wandb sync %s",
            self.server,
            reason,
            self.file.parent,
        )


def main(file: str) -> None:
    """Send the run in this file until it ends, or until nobody is left to write it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from wandb.cli.cli import cli

    cli(["beta", "sync", "--live", "--yes", file])


def _end_with_parent() -> None:
    """Leave a run that ended without a last word a minute, then go; W&B would wait for that word forever."""
    while os.read(sys.stdin.fileno(), 1):  # not through sys.stdin, whose lock a leaving interpreter would wait for
        pass
    time.sleep(ENDS_WITHIN)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
