"""One annotator of the torture test, as a process that may be killed at any moment: `python FILE JOB.json`.

It does what the page's script does: a submit that is not acknowledged is sent again with the same key, to whichever
server answers. What is acknowledged goes to a log of its own, with a single write.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

HIDDEN = re.compile(r'<input type="hidden" name="(\w+)" value="([^"]*)">')
UNREACHABLE = (OSError, http.client.HTTPException)


class Annotator:
    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.random = random.Random(job["seed"])
        self.headers = {"Cookie": f"rlhf={job['session']}", "Accept": "application/json"}
        self.log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.connection: http.client.HTTPConnection | None = None

    def work(self) -> None:
        while not Path(self.job["stop"]).exists():
            status, text = self.ask("GET", "/")
            form = dict(HIDDEN.findall(text.partition('<form id="task"')[2]))
            if status != 200 or not form:
                time.sleep(0.1)
                continue
            if self.random.random() < self.job["dawdles"]:
                time.sleep(self.job["lease_s"] * 1.5)
            self.answer(form)

    def answer(self, form: dict[str, str]) -> None:
        ranks = [self.random.randint(1, 3) for _ in range(3)]
        body = {**form, **{f"rank-{place}": str(rank) for place, rank in enumerate(ranks)}}
        for _ in range(1 + (self.random.random() < 0.05)):  # now and then twice, as after a double click
            status, text = self.ask("POST", "/answer", urllib.parse.urlencode(body))
            if status != 200:
                raise SystemExit(f"{status}: {text}")
            saved = {"saved": json.loads(text)["saved"], "key": form["key"], "ranks": ranks, "form": form}
            os.write(self.log, (json.dumps(saved) + "\n").encode())

    def ask(self, method: str, path: str, body: str | None = None) -> tuple[int, str]:
        """Until a server has answered."""
        while True:
            try:
                status, text = self.ask_once(method, path, body)
                if status < 500:
                    return status, text
            except UNREACHABLE:
                self.connection = None
            if Path(self.job["stop"]).exists():
                raise SystemExit(0)
            time.sleep(0.05)

    def ask_once(self, method: str, path: str, body: str | None) -> tuple[int, str]:
        if self.connection is None:
            self.connection = http.client.HTTPConnection("127.0.0.1", self.random.choice(self.job["ports"]), timeout=10)
        headers = {**self.headers, "Content-Type": "application/x-www-form-urlencoded"} if body else self.headers
        self.connection.request(method, path, body, headers)
        response = self.connection.getresponse()
        return response.status, response.read().decode()


if __name__ == "__main__":
    Annotator(json.loads(Path(sys.argv[1]).read_text())).work()
