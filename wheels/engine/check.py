"""Load each library of an installed sparing-engine, also those that this processor cannot run."""

import ctypes

import sparing_engine

libraries = sorted(sparing_engine.FOLDER.glob("*.so"))
assert "generic.so" in [path.name for path in libraries], libraries
for path in libraries:
    ctypes.CDLL(str(path))
    print(f"{path.name} loads, sources {sparing_engine.SOURCES}")
