"""A measured engine in a process of its own, so that its memory is its own and the engines take turns."""

import json
import subprocess
import sys


class Worker:
    """A script of this directory with other arguments; it answers each line of its stdin with a line of JSON."""

    def __init__(self, script, *arguments, stderr=None):
        self.process = subprocess.Popen(
            [sys.executable, script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    def ask(self, command):
        print(command, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit("an engine failed; nothing was written")
        return json.loads(line)

    def finish(self):
        """What there is to tell at the end; the process is over then."""
        answer = self.ask("finish")
        self.process.wait()
        return answer
