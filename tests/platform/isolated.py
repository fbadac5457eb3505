"""Reads nothing, mounts empty folders: becomes a command in a mount namespace where nothing local is shared.

    unshare --mount python tests/platform/isolated.py COMMAND...

Temporary files, shared memory and the home are the node's own, as on machines of their own. The project itself stays
visible, as in an image.
"""

from __future__ import annotations

import os
import subprocess
import sys

OWN = ("/tmp", "/dev/shm")
HOME = "/tmp/home"

if __name__ == "__main__":
    for folder in OWN:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3g,mode=1777", "tmpfs", folder], check=True)
    os.mkdir(HOME)
    os.environ["HOME"] = HOME
    os.chdir(HOME)
    os.execv(sys.argv[1], sys.argv[1:])
