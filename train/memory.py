"""Keep freed memory in the process, on Linux with glibc.

By default glibc gives blocks of more than 128 KB back to the system as soon as they are freed. The next step then
asks for the same memory again, and the system hands out zeroed pages one by one: on a CPU that can take longer than
the arithmetic in between.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names and numbers of <malloc.h>


def keep_memory() -> bool:
    """Let malloc reuse large freed blocks. True when it was possible; elsewhere nothing happens.

    Call it once, before the first large tensor. The process then keeps its peak size until it ends.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # not glibc
        return False
    # both need setting: a block above the first number is mapped by itself and unmapped when freed, free space above
    # the second at the end of the heap is returned
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
