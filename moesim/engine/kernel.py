"""How the functions of the serving loop are compiled: without counting references to their arrays."""

from __future__ import annotations

from numba import njit

# The loop's state is some sixty arrays. Handed from one compiled function to another, Numba counts a reference to each,
# with locked instructions: two thirds of the loop's time. Functions under this decorator count none, so they may look
# into arrays and change them, but not make or return any: where one does, it does not compile.
kernel = njit(cache=True, _nrt=False)
