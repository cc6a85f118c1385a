"""Forbid the network to Python processes."""

import os
from pathlib import Path

from sparing.engine.library import _find_cache_folder

# Started by every Python process that inherits PYTHONPATH, also by those that test exported files.
REFUSE_NETWORK = """
import os, socket, sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.sendto"):
        asked = arguments[0].family != socket.AF_UNIX
    else:
        asked = event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
    if asked:
        with open(os.environ["NETWORK_LOG"], "a") as log:
            print(event, arguments, file=log)
        raise OSError("the network is forbidden")

sys.addaudithook(refuse)
"""


def environment(folder):
    """Return environment variables with which Python processes refuse to use the network and log every attempt.

    They can import the modules of this folder.

    Args:
        folder: where to write the code that refuses, and `network.log`.
    """
    (folder / "start").mkdir()
    (folder / "start" / "sitecustomize.py").write_text(REFUSE_NETWORK)
    # Some packages send statistics, but not in CI, and not if a file in the home directory says so.
    kept = {name: value for name, value in os.environ.items() if name != "CI"}
    path = os.pathsep.join([str(folder / "start"), str(Path(__file__).parent)])
    kept["SPARING_CACHE"] = str(_find_cache_folder())  # where the engine may be compiled already
    return kept | {"PYTHONPATH": path, "NETWORK_LOG": str(folder / "network.log"), "HOME": str(folder)}
