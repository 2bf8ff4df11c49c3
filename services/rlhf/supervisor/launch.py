"""Becomes another program, which the kernel ends when the supervisor ends.

    python -I -S launch.py PARENT SIGNAL COMMAND…

A supervisor that is killed outright can stop nothing any more, so on Linux each child asks the kernel for SIGNAL at its
parent's death (prctl(2), PR_SET_PDEATHSIG; it survives exec). Elsewhere there is no such request, and the children of a
supervisor killed with SIGKILL go on. A script of its own, since code between fork and exec may deadlock in a process
with threads. Imports nothing of this project: it runs before every child and takes milliseconds.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> None:
    parent, signal, command = int(argv[0]), int(argv[1]), argv[2:]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, signal, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
        if os.getppid() != parent:
            sys.exit("the parent died before its child began")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
